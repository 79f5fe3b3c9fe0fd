"""What studies, the search and the credit refuse before anything is trained or read."""

import pytest

from fgalign.config import Profile
from fgalign.errors import ConfigError
from fgalign.stages.compare import run_credit
from fgalign.study import search_section


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (["a", "c"], "'c' has another; "),
        (["a", "d"], "'d' has none or is no method; "),
        (["a", "none"], "'none' has none or is no method; "),
        (["none", "a"], "'none' has none or is no method; "),
        # They agree, but there is nothing to choose from.
        (["none", "empty"], "'none' has none or is no method; "),
        (["empty"], "'empty' has none or is no method; "),
    ],
)
def test_methods_of_a_group_have_a_grid_and_the_same(tmp_path, group, message):
    grids = {"a": {"x": [1]}, "b": {"x": [1]}, "c": {"x": [2]}, "empty": {}}
    methods = {**{name: {"search": grid} for name, grid in grids.items()}, "none": {}}

    def section(together):
        params = {"seeds": [1], "methods": methods, "search": {"seed": 1, "together": together}}
        return search_section(Profile("t", tmp_path, params, tmp_path / "params.yaml"))

    assert section([["a", "b"]]).together == [["a", "b"]]
    with pytest.raises(ConfigError, match=f"search.together: expected methods with the same `search` grid.*{message}"):
        section([["a", "b"], group])


def test_two_methods_with_one_reward_are_no_two_rows_of_credit(tmp_path):
    methods = {name: {"needs": needs} for name, needs in (("a", "rm_edit"), ("b", "rm_token"), ("c", "rm_edit"))}
    profile = Profile("t", tmp_path, {"seeds": [1], "methods": methods}, tmp_path / "params.yaml")
    with pytest.raises(ConfigError, match=r"methods\.c\.needs: expected another reward model than that of a, by which"):
        run_credit(profile, ["a", "b", "c"])
