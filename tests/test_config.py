"""Profiles: found, parsed, refused with file and key; and every field of every config is read somewhere."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fgalign
from fgalign.config import (
    ConfigError,
    Profile,
    Section,
    find_root,
    known_profiles,
    load_profile,
    parse_section,
)

SOURCE = Path(fgalign.__file__).parent


class Inner(Section):
    rate: float = 0.5


class Outer(Section):
    name: str
    count: int = 3
    inner: Inner | None = Inner()


@pytest.fixture
def root(tmp_path):
    (tmp_path / "src" / "fgalign").mkdir(parents=True)
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").write_text("profile: mini\nseeds: [1, 2]\nsft: {name: x, inner: {rate: 1}}\n")
    other = tmp_path / "reproduce" / "profiles" / "human"
    other.mkdir(parents=True)
    (other / "params.yaml").write_text("profile: human\nseeds: [7]\n")
    return tmp_path


def test_load(root, monkeypatch):
    monkeypatch.delenv("FGALIGN_PROFILE", raising=False)
    mini = load_profile(root=root)
    assert (mini.name, mini.seeds, mini.file) == ("mini", [1, 2], root / "params.yaml")
    assert (mini.data, mini.results) == (root / "data" / "mini", root / "results" / "mini")
    assert mini.section("sft", Outer) == Outer(name="x", count=3, inner=Inner(rate=1.0))
    assert load_profile("human", root).seeds == [7]
    monkeypatch.setenv("FGALIGN_PROFILE", "human")
    assert load_profile(root=root).name == "human"
    assert load_profile("mini", root=root).name == "mini"
    assert known_profiles(root) == ["mini", "human"]


def test_root(root, tmp_path_factory):
    assert find_root(root / "src" / "fgalign") == root
    outside = tmp_path_factory.mktemp("outside")
    with pytest.raises(ConfigError, match="not inside the fgalign repository"):
        find_root(outside)


def test_unknown_profile(root):
    with pytest.raises(ConfigError, match="unknown profile 'maxi'; expected one of mini, human"):
        load_profile("maxi", root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("profile: [", r"params\.yaml: not YAML: "),
        ("profile: human", r"params\.yaml: profile: expected 'mini', found 'human'"),
        ("- 1", r"params\.yaml: profile: expected 'mini', found \[1\]"),
    ],
)
def test_bad_file(root, text, message):
    (root / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_profile("mini", root)


@pytest.mark.parametrize(
    "name", ["api_key", "Token", "password", "openai_api_key", "api-key", "hf_token", "key_variable"]
)
def test_a_secret_in_a_profile_is_refused_before_anything_reads_it(root, name):
    path = root / "params.yaml"
    path.write_text(f"profile: mini\nannotator:\n  other: [{{{name}: sk-123}}]\n")
    with pytest.raises(ConfigError, match=rf"params\.yaml: annotator: other: 0: {name}: a secret must not") as error:
        load_profile("mini", root)
    assert "sk-123" not in str(error.value)
    for other in ("headers: {Authorization: Bearer sk-123}", 'base_url: "https://u:sk-123@h/v1"', "auth: [sk-123]"):
        path.write_text(f"profile: mini\nannotator:\n  {other}\n")
        with pytest.raises(ConfigError, match=r"params\.yaml: annotator: .*: a secret must not") as error:
            load_profile("mini", root)
        assert "sk-123" not in str(error.value)
    path.write_text("profile: mini\nannotator: {key_variable: MY_KEY, max_tokens: 4, token: null, unit: token}\n")
    assert load_profile("mini", root).params["annotator"]["max_tokens"] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "needed_token_model: [a]",
            r"params\.yaml: needed_token_model: no such key; did you mean needed_token_models\?",
        ),
        ("zzz: 1", r"params\.yaml: zzz: no such key; known keys: profile, root, "),
        ("seeds: [1]\nsft: {a: 1}\nseeds: [7]", r"params\.yaml:4: the key 'seeds' stands twice in this section"),
        ("sft:\n  a: {b: 1, b: 1}", r"params\.yaml:3: the key 'b' stands twice"),
        ("methods:", r"params\.yaml: methods: expected a section, found None"),
        ("base_model: x", r"params\.yaml: base_model: expected a section, found 'x'"),
        ("methods: {dpo: null}", r"params\.yaml: methods: expected a section under each name, found None"),
        ("token_models: 3", r"params\.yaml: token_models: expected a section under each name, found 3"),
    ],
)
def test_a_slip_in_a_profile_is_refused(root, text, message):
    (root / "params.yaml").write_text(f"profile: mini\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        load_profile("mini", root)


def test_a_merged_section_may_override_keys(root):
    text = "sft: &a {x: 1, y: 2}\nrm_edit: &b {<<: *a, x: 3}\nrm_token: {<<: *b, y: 4}\nstudies:\n"
    (root / "params.yaml").write_text(f"profile: mini\n{text}")
    params = load_profile("mini", root).params
    assert params["rm_token"] == {"x": 3, "y": 4} and params["studies"] is None


def test_a_profile_that_is_not_utf8(root):
    (root / "params.yaml").write_bytes("profile: mini # café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"params\.yaml: not YAML: .*utf-8"):
        load_profile("mini", root)


def test_missing_section(root):
    with pytest.raises(ConfigError, match=r"params\.yaml: section `labels` is missing; expected name, count, inner"):
        load_profile("mini", root).section("labels", Outer)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        # What stands there may be a secret.
        ({"name": "x", "cuont": 4}, r"^here\.cuont: Extra inputs are not permitted; known keys: name, count, inner$"),
        ({"name": "x", "inner": {"rat": 4}}, r"^here\.inner\.rat: Extra inputs are not permitted; known keys: rate$"),
        ({"name": "x", "pass": "abc"}, r"^here\.pass: Extra inputs are not permitted; known keys: name, count, inner$"),
        ({"name": "x", "count": "many"}, r"^here\.count: .*integer.*found 'many'$"),
        ({"count": 1}, r"^here\.name: Field required$"),
        ([1], r"^here\.\(section\): .*found \[1\]$"),
    ],
)
def test_bad_section(value, message):
    with pytest.raises(ConfigError, match=message):
        parse_section(value, Outer, "here")


@pytest.mark.parametrize("seeds", [None, [], [1, 1], "1", 3, ["a"], [True], [1.5], [[1]], [-1], [2**32]])
def test_bad_seeds(tmp_path, seeds):
    profile = Profile("mini", tmp_path, {"seeds": seeds}, tmp_path / "params.yaml")
    with pytest.raises(ConfigError, match=r"params\.yaml: seeds: expected a list of different integers from 0 "):
        _ = profile.seeds


# --- every field of every config is read ------------------------------------------------------------------------------

CONFIGS = {"Section", "FineGrainedPPOConfig", "FIGAConfig"}
EXCEPTIONS = {
    "FIGAConfig.remove_unused_columns": "transformers' Trainer reads it",
    "Questions.validation": "read by the split's name, in split_questions",
    "Questions.test": "read by the split's name, in split_questions",
}
"""``Class.field`` of fields that are nowhere an attribute access in the package, each with its reason."""


def config_classes(tree: ast.Module) -> list[ast.ClassDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def unread_fields(sources: dict[str, str]) -> set[str]:
    """``Class.field`` of config fields whose name is nowhere an attribute access outside their class's definition.

    Configs are the classes named in CONFIGS and all that inherit from ``Section``, directly or not.
    """
    trees = {path: ast.parse(text) for path, text in sources.items()}
    classes = [(path, node) for path, tree in trees.items() for node in config_classes(tree)]
    sections = set(CONFIGS)
    while True:
        more = {
            node.name
            for _, node in classes
            if node.name not in sections and any(ast.unparse(base).split(".")[-1] in sections for base in node.bases)
        }
        if not more:
            break
        sections |= more
    reads: dict[str, list[tuple[str, int]]] = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                reads.setdefault(node.attr, []).append((path, node.lineno))
    unread = set()
    for path, node in classes:
        if node.name not in sections:
            continue
        for item in node.body:
            if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
                continue
            outside = [
                where
                for where in reads.get(item.target.id, [])
                if not (where[0] == path and node.lineno <= where[1] <= node.end_lineno)
            ]
            if not outside:
                unread.add(f"{node.name}.{item.target.id}")
    return unread


def package() -> dict[str, str]:
    return {str(path.relative_to(SOURCE)): path.read_text("utf-8") for path in SOURCE.rglob("*.py")}


def test_every_config_field_is_read():
    assert unread_fields(package()) == set(EXCEPTIONS)


def test_the_check_sees_a_field_that_nothing_reads():
    text = """
class Mine(Section):
    read: int = 1
    unread: int = 2
    own: int = 3
    written: int = 4

    def method(self):
        return self.own

class Child(Mine):
    late: int = 5

def use(config):
    config.written = 3
    return config.read
"""
    assert unread_fields({"a.py": text}) == {"Mine.unread", "Mine.own", "Mine.written", "Child.late"}


def test_the_check_finds_the_configs():
    names = {node.name for text in package().values() for node in config_classes(ast.parse(text))}
    assert CONFIGS - names == set()


@pytest.mark.parametrize(
    ("file", "name"), [("ppo_trainer.py", "FineGrainedPPOConfig"), ("methods/figa.py", "FIGAConfig")]
)
def test_trainers_read_their_own_fields(file, name):
    """Stricter: as ``args.<field>``, in the trainer's own file."""
    tree = ast.parse((SOURCE / file).read_text("utf-8"))
    (config,) = (node for node in config_classes(tree) if node.name == name)
    fields = {item.target.id for item in config.body if isinstance(item, ast.AnnAssign)}
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args")
    }
    assert fields - read - {field.split(".")[1] for field in EXCEPTIONS} == set()


OTHER_OPTIM = {
    "learning_rate": 0.5,
    "epochs": 7.0,
    "max_steps": 7,
    "batch_size": 7,
    "accumulation": 7,
    "warmup_steps": 7,
    "schedule": "linear",
    "weight_decay": 0.5,
    "adam_beta2": 0.5,
    "max_grad_norm": 0.5,
    "gradient_checkpointing": True,
    "sampling": "group_by_length",
}
OTHER_LORA = {"r": 7, "alpha": 7, "dropout": 0.5, "target_modules": ["q_proj"]}


def test_every_field_of_an_optimiser_reaches_the_trainer():
    from fgalign.training import LoraSection, OptimConfig, peft_config, trainer_arguments

    def arguments(**options):
        optim = OptimConfig(**{"learning_rate": 0.1, **options})
        return trainer_arguments(optim, output_dir=Path("out"), seed=1, device="cpu", bf16=False)

    def adapter(**options):
        config = peft_config(OptimConfig(learning_rate=0.1, lora=LoraSection(**options)), "CAUSAL_LM")
        return {key: value for key, value in config.to_dict().items() if key != "runtime_config"}

    assert set(OTHER_OPTIM) == set(OptimConfig.model_fields) - {"compile", "lora", "max_tokens"}
    assert set(OTHER_LORA) == set(LoraSection.model_fields)
    for name, value in OTHER_OPTIM.items():
        changed = {key for key, found in arguments(**{name: value}).items() if found != arguments().get(key)}
        assert len(changed) == 1 and arguments(**{name: value})[changed.pop()] == value, name
    for name, value in OTHER_LORA.items():
        assert adapter(**{name: value}) != adapter(), name
    assert peft_config(OptimConfig(learning_rate=0.1), "CAUSAL_LM") is None
