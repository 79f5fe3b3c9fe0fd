"""Sources from the hub, on samples in the published formats that were written for these tests; nothing is fetched."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from fgalign.config import Profile, parse_section
from fgalign.core.raw_data import RawData, read_split
from fgalign.core.schema import SPLITS, Demonstration, Edit, Preference, Prompt, Reference
from fgalign.errors import ConfigError, InputError, RecordError
from fgalign.evaluation.truth import read_truth
from fgalign.io import sha256
from fgalign.sources import SOURCES, get_source, hub
from fgalign.sources.hub import (
    HubSection,
    Row,
    check_columns,
    conversation_prompt,
    instruction_prompt,
    load,
    locate,
    preference_data,
    prompt_key,
    ranked,
    read_rows,
    report,
    sample,
    split_prompts,
    stem,
    variable,
)
from fgalign.sources.preference_dataset import pair as trl_pair
from fgalign.sources.preference_dataset import shared_text
from fgalign.stages.data import run_edits, run_raw

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _no_named_folder(monkeypatch):
    for name in [name for name in os.environ if name.startswith("FGALIGN_HUB_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", refuse)


def write(path: Path, rows: list, kind: str = "list") -> Path:
    """Rows as a JSON list, JSON lines (gzipped if the name says so) or Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = f"[{', '.join(lines)}]" if kind == "list" else "".join(f"{line}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def make(name: str, root: Path, **options) -> RawData:
    source = get_source(name)
    return source.build(parse_section(options, source.config, "params.yaml: source"), root)


def disjoint(data: RawData) -> bool:
    """Whether no prompt, of any kind of record, is in two splits."""
    keys = {}
    for split in SPLITS:
        raw, truth = data.splits[split], data.truth[split]
        records = [record for kind in (*vars(raw).values(), truth.references) for record in kind]
        keys[split] = {prompt_key(record.prompt) for record in records}
    return not (keys["train"] & keys["validation"] or keys["train"] & keys["test"] or keys["validation"] & keys["test"])


# --- where files come from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repo", "name"),
    [("tatsu-lab/alpaca_farm", "ALPACA_FARM"), ("RUCAIBox/SPA", "SPA"), ("Anthropic/hh-rlhf", "HH_RLHF")],
)
def test_name_of_the_variable(repo, name):
    assert variable(repo) == f"FGALIGN_HUB_{name}"


def test_a_local_copy_is_taken_in_order_from_variable_config_and_downloads(tmp_path, monkeypatch):
    config = HubSection(repo="a/b", revision=COMMIT)
    downloads = tmp_path / "data" / "downloads" / "a--b" / COMMIT
    for folder in (downloads, tmp_path / "named", tmp_path / "variable"):
        write(folder / "x.json", [{}])
    assert locate(config, ["x.json"], tmp_path) == {"x.json": downloads / "x.json"}
    with pytest.raises(
        InputError, match=r"y\.json: no such file, although the folder of this commit is there; expected"
    ):
        locate(config, ["y.json"], tmp_path)
    named = config.model_copy(update={"local": "named", "revision": None})
    assert locate(named, ["x.json"], tmp_path) == {"x.json": tmp_path / "named" / "x.json"}
    monkeypatch.setenv("FGALIGN_HUB_B", "variable")
    assert locate(named, ["x.json"], tmp_path) == {"x.json": tmp_path / "variable" / "x.json"}


def test_a_local_copy_without_the_file_says_what_to_do(tmp_path):
    write(tmp_path / "named" / "x.json", [{}])
    with pytest.raises(InputError) as error:
        locate(HubSection(repo="a/b", revision=COMMIT, local="named"), ["x.json", "y/z.json"], tmp_path)
    folder = tmp_path / "named"
    assert str(error.value) == (
        f"{folder}/y/z.json: no such file, although source.local names its folder; expected y/z.json in {folder}; "
        f"`hf download a/b y/z.json --repo-type dataset --revision {COMMIT} --local-dir {folder}` puts it there"
    )


@pytest.mark.parametrize("revision", ["main", "956ea42", COMMIT.upper(), COMMIT + "0"])
def test_a_revision_is_a_whole_commit(revision):
    with pytest.raises(ConfigError, match=r"source\.revision"):
        parse_section({"repo": "a/b", "revision": revision}, HubSection, "params.yaml: source")


def test_without_a_local_copy_a_commit_is_needed(tmp_path):
    with pytest.raises(
        ConfigError, match=r"source\.revision: expected the 40 .* of a/b, found null; .* FGALIGN_HUB_B$"
    ):
        locate(HubSection(repo="a/b"), ["x.json"], tmp_path)
    with pytest.raises(ConfigError, match=r"source\.repo: expected the name .* found neither"):
        locate(HubSection(), ["x.json"], tmp_path)


def test_files_are_fetched_at_the_commit(tmp_path, monkeypatch):
    asked = []

    def fetch(repo, name, *, repo_type, revision):
        asked.append((repo, name, repo_type, revision))
        return str(write(tmp_path / "cache" / name, [{"q": "x"}]))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    rows = load(HubSection(repo="a/b", revision=COMMIT), {"x.json": {"q": (str,)}}, tmp_path)
    assert asked == [("a/b", "x.json", "dataset", COMMIT)]
    assert [row.values for row in rows["x.json"]] == [{"q": "x"}]


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_without_network_one_line_says_what_to_download_and_where_to_put_it(tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(LocalEntryNotFoundError("no\nnetwork")))
    with pytest.raises(InputError) as error:
        locate(HubSection(repo="a/b", revision=COMMIT), ["x.json", "y.json"], tmp_path)
    folder = tmp_path / "data" / "downloads" / "a--b" / COMMIT
    assert str(error.value) == (
        f"a/b at {COMMIT}: cannot be fetched (LocalEntryNotFoundError: no network); on a machine with network access "
        f"run `hf download a/b x.json y.json --repo-type dataset --revision {COMMIT} --local-dir {folder}` and copy "
        "that folder to the same place here, or anywhere if source.local or FGALIGN_HUB_B names it"
    )


@pytest.fixture
def network(monkeypatch):
    """``network(*answers)``: what connecting to the hub gives, one after the other; returns who was asked and for how
    long each wait was."""

    def set_up(*answers):
        left, asked, waits = list(answers), [], []

        def connect(address, timeout):
            asked.append(address)
            answer = left.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return SimpleNamespace(close=lambda: None)

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.test")
        monkeypatch.setattr("urllib.request.getproxies", lambda: {"no": "localhost"})
        monkeypatch.setattr("socket.create_connection", connect)
        monkeypatch.setattr("time.sleep", waits.append)
        return asked, waits

    return set_up


def test_a_hub_that_cannot_be_connected_to_is_said_after_two_seconds(tmp_path, network):
    asked, waits = network(*[OSError(f"no such host {number}") for number in range(3)])
    with pytest.raises(
        InputError, match=r"^a/b at .*: cannot be fetched \(OSError: no such host 2\); on a machine with"
    ):
        locate(HubSection(repo="a/b", revision=COMMIT), ["x.json", "y.json"], tmp_path)
    assert (asked, waits) == ([("hub.test", 443)] * 3, [1, 1])
    network(*[OSError("refused")] * 3)
    with pytest.raises(InputError, match=r"cannot be fetched \(OSError: refused\); .* --include '\*\.json'"):
        hub.list_files(HubSection(repo="a/b", revision=COMMIT), ["*.json"], tmp_path)


@pytest.mark.parametrize(
    ("answers", "count"), [([None], 1), ([OSError("flaky"), None], 2), ([TimeoutError("slow")], 1)]
)
def test_a_flaky_or_slow_network_is_left_to_the_library(tmp_path, monkeypatch, network, answers, count):
    asked, _ = network(*answers)
    path = write(tmp_path / "cache" / "x.json", [{}])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(path))
    assert locate(HubSection(repo="a/b", revision=COMMIT), ["x.json"], tmp_path) == {"x.json": path}
    assert len(asked) == count


@pytest.mark.parametrize("way", ["cache", "proxy", "offline"])
def test_nothing_is_connected_to_where_the_library_needs_it_not(tmp_path, monkeypatch, network, way):
    asked, _ = network()
    path = write(tmp_path / "cache" / "x.json", [{}])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(path))
    if way == "cache":
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(path))
    elif way == "proxy":
        monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "proxy.test"})
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert locate(HubSection(repo="a/b", revision=COMMIT), ["x.json"], tmp_path) == {"x.json": path}
    assert asked == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RevisionNotFoundError", r"expected a commit of the data set, found none; correct source\.revision"),
        ("RemoteEntryNotFoundError", "the data set has no such file at that commit"),
        ("RepositoryNotFoundError", r"expected a data set of that name, found none; correct source\.repo"),
        ("GatedRepoError", "its terms have to be accepted"),
    ],
)
def test_what_the_hub_does_not_have_is_told_apart_from_no_network(tmp_path, monkeypatch, kind, message):
    from huggingface_hub import errors

    answer = SimpleNamespace(headers={}, request=None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(getattr(errors, kind)("no", response=answer)))
    with pytest.raises(InputError, match=rf"^a/b at {COMMIT}: x\.json: {message}"):
        locate(HubSection(repo="a/b", revision=COMMIT), ["x.json"], tmp_path)


def test_a_checksum_is_checked_and_must_belong_to_a_file_that_is_read(tmp_path):
    path = write(tmp_path / "x.json", [{}])
    right = HubSection(repo="a/b", local=".", sha256={"x.json": sha256(path)})
    assert locate(right, ["x.json"], tmp_path) == {"x.json": path}
    with pytest.raises(InputError, match=f"checksum mismatch: expected sha256 {'0' * 64}"):
        locate(right.model_copy(update={"sha256": {"x.json": "0" * 64}}), ["x.json"], tmp_path)
    for key, value in (("sha256", "0" * 64), ("rows", 1)):
        config = HubSection.model_validate({"repo": "a/b", "local": ".", key: {"X.json": value}})
        with pytest.raises(ConfigError, match=rf"source\.{key}: expected files that are read \(x\.json\), found 'X"):
            locate(config, ["x.json"], tmp_path)


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.json.gz", "x.jsonl.gz", "x.parquet"])
@pytest.mark.parametrize("kind", ["list", "lines"])
def test_every_format_gives_the_same_rows(tmp_path, name, kind):
    values = [{"q": "a\u2028b", "m": [{"role": "user"}]}, {"q": "ü", "m": []}]
    rows = read_rows(write(tmp_path / name, values, kind))
    assert [row.values for row in rows] == values
    assert [row.number for row in rows] == [0, 1]
    lines = kind == "lines" and name != "x.parquet"
    assert rows[1].where == f"{tmp_path / name}{':2' if lines else ': row 1'}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "x.json: a pointer of Git LFS"),
        ("x.jsonl", b'{"q": 1}\n\n{"q": \n', r"x\.jsonl:3: not JSON: "),
        ("x.json", b'[{"q": 1},\n {]', r"x\.json:2: not JSON: "),
        ("x.jsonl", b'{"q": 1}\n3\n', r"x\.jsonl:2: expected an object with a value a column, found 3"),
        ("x.json", b'["a"]', r"x\.json: row 0: expected an object with a value a column, found 'a'"),
        ("x.json", b"\xff", r"x\.json: cannot be read: "),
        ("x.json.gz", b"{}", r"x\.json\.gz: cannot be read: "),
        ("x.json.gz", gzip.compress(b"[]" * 99, mtime=0)[:12] + b"\xff" * 20, r"x\.json\.gz: cannot be read: "),
        ("x.jsonl", b'{"q": 1}\n{"q": "a \\ud83d b"}\n', r"x\.jsonl:2: expected texts of whole characters, .*ud83d"),
        ("x.json", b'[{"q": "\\uD83D\\uDE00"}, {"q": "\\uDE00"}]', r"x\.json: row 1: expected texts of whole char"),
        ("x.jsonl", b'{"q": ' + b"9" * 5000 + b"}", r"x\.jsonl:1: cannot be read: "),
        ("x.jsonl", b"[" * 100000, r"x\.jsonl: cannot be read: "),
        ("x.parquet", b"{}", r"x\.parquet: not Parquet: "),
        ("x.csv", b"q\n1\n", r"x\.csv: expected a file that ends with \.json, "),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match=message):
        read_rows(tmp_path / name)


def test_a_list_is_searched_once_for_halves_of_characters(tmp_path, monkeypatch):
    """Not once a row: a list of 10,000 rows would be read for minutes."""
    searched = []
    monkeypatch.setattr(hub, "_HALF", SimpleNamespace(search=searched.append))
    assert len(read_rows(write(tmp_path / "x.json", [{"q": "x"}] * 50))) == 50
    assert len(searched) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"p": 1}, "^here: expected the columns q, p, found no `q` among p; "),
        ({"q": 1, "p": 1}, "^here: column `q`: expected str or null, found 1$"),
        ({"q": None, "p": True}, "^here: column `p`: expected int, found True$"),
    ],
)
def test_columns_are_checked(values, message):
    with pytest.raises(RecordError, match=message):
        check_columns(Row("here", 0, values), {"q": (str, type(None)), "p": (int,)})


def test_other_columns_are_left_alone():
    check_columns(Row("here", 0, {"q": "x", "more": object()}), {"q": (str,)})


def test_rows_are_counted(tmp_path):
    write(tmp_path / "x.json", [{"q": "a"}, {"q": "b"}])
    write(tmp_path / "empty.json", [])
    with pytest.raises(InputError, match=r"x\.json: expected 3 rows, found 2; "):
        load(HubSection(local=".", rows={"x.json": 3}), {"x.json": {}}, tmp_path)
    with pytest.raises(InputError, match=r"empty\.json: expected at least one row, found none"):
        load(HubSection(local="."), {"empty.json": {}}, tmp_path)


def test_stem():
    names = ["helpful-base/train.jsonl.gz", "data/train-00000-of-00001.parquet", "v1.0.json", "v1.1.json"]
    assert [stem(name) for name in names] == ["helpful-base/train", "data/train-00000-of-00001", "v1.0", "v1.1"]


# --- prompts and splits -----------------------------------------------------------------------------------------------

HEAD = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."


def test_the_text_of_alpaca():
    assert instruction_prompt("Add.", "", "alpaca") == f"{HEAD}. {REQUEST}\n\n### Instruction:\nAdd.\n\n### Response:"
    assert instruction_prompt("Add.", None, "alpaca") == instruction_prompt(" Add.\n", " ", "alpaca")
    assert instruction_prompt("Add.", "1 2", "alpaca") == (
        f"{HEAD}, paired with an input that provides further context. {REQUEST}\n\n### Instruction:\nAdd.\n\n"
        "### Input:\n1 2\n\n### Response:"
    )


def test_the_plain_prompt():
    assert instruction_prompt("Add.", None, "plain") == "Add."
    assert instruction_prompt("Add {x}.", "1 2", "plain") == "Add {x}.\n\n1 2"


def test_a_conversation_as_one_text():
    assert conversation_prompt([("user", "Hi")]) == "Hi"
    assert conversation_prompt([("system", "Be kind.")]) == "System: Be kind.\n\nAssistant:"
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    assert conversation_prompt(turns) == "System: Be kind.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
    with pytest.raises(ValueError, match="expected the roles system, user, assistant, found 'tool'"):
        conversation_prompt([("user", "Hi"), ("tool", "1")])


def test_prompts_with_the_same_words_share_a_key():
    assert prompt_key("What, is\n THIS?") == prompt_key("what is this") == "whatisthis"
    assert prompt_key("Don't e-mail_a") == prompt_key("dont email a") != prompt_key("dont email b")
    assert prompt_key("caf\u00e9") == prompt_key("cafe\u0301") != prompt_key("cafe")
    assert prompt_key("?!") == "?!" != prompt_key("!?")


# SHA-256 of "0\na" begins 0d3b, of "0\nb" 3e27, of "0\nc" efc7, of "0\nd" 0caa; with seed 1: 87a4, 2c3b, 6d73, 124b.
def test_the_order_of_prompts_comes_from_their_text_and_the_seed():
    assert ranked(["a", "b", "c", "d"], 0) == ["d", "a", "b", "c"]
    assert ranked(["d", "c", "B", "a", "b!"], 0) == ["d", "a", "b", "c"]
    assert ranked(["a", "b", "c", "d"], 1) == ["d", "b", "c", "a"]


def test_splits_are_taken_from_the_order():
    prompts = ["a", "b", "A?", "c", "d"]
    assert split_prompts(prompts, {"train": None, "validation": 1, "test": 1}, 0) == {
        "d": "test",
        "a": "validation",
        "b": "train",
        "c": "train",
    }
    assert split_prompts(prompts, {"train": 1, "validation": 2}, 0) == {
        "d": "validation",
        "a": "validation",
        "b": "train",
    }


@pytest.mark.parametrize(
    "sizes", [{"train": None, "validation": 1, "test": 1}, {"train": 2, "validation": 1, "test": 0}]
)
def test_too_few_prompts(sizes):
    with pytest.raises(ConfigError, match="source: expected sizes of splits that 2 different prompts can fill, found"):
        split_prompts(["a", "b", "B"], sizes, 0)


def test_a_sample_is_taken_from_the_order_and_keeps_its_own():
    assert sample([1, 2, 3, 4, 5], ["a", "b", "c", "d", "D"], 2, 0, "source.n") == [1, 4, 5]
    assert sample([1, 2], ["a", "b"], None, 0, "source.n") == [1, 2]
    with pytest.raises(ConfigError, match=r"source\.n: expected at most the 1 different prompts of the data, found 2"):
        sample([1, 2], ["a", "A"], 2, 0, "source.n")


def test_the_report_names_what_is_left_out(capsys):
    report("spa", 1200, Counter({"with a blank text": 2, "malformed": 1001}))
    report("spa", 1, Counter())
    assert capsys.readouterr().out == (
        "spa: 1,200 rows read; left out: 1,001 malformed, 2 with a blank text\nspa: 1 rows read; left out: none\n"
    )


def test_data_of_preference_pairs():
    first = Preference(id="1", prompt="p", chosen="good", rejected="bad")
    again = Preference(id="2", prompt="p", chosen="good", rejected="worse")
    other = Preference(id="3", prompt="p", chosen="better", rejected="bad")
    data = preference_data({"train": [first, again, other], "validation": [other], "test": [again, other]})
    assert data.splits["train"].prompts == [Prompt(id="1", prompt="p")]
    assert data.splits["train"].preferences == [first, again, other]
    assert data.splits["train"].demonstrations == [
        Demonstration(id="1", prompt="p", completion="good"),
        Demonstration(id="3", prompt="p", completion="better"),
    ]
    assert data.truth["train"].references == []
    assert [len(data.splits[split].demonstrations) for split in SPLITS] == [2, 1, 0]
    assert data.truth["test"].references == [Reference(id="2", prompt="p", reference="good")]


# --- AlpacaFarm -------------------------------------------------------------------------------------------------------


def instruction(text: str, output: str | None = "out", context: str | None = "") -> dict:
    return {"instruction": text, "input": context, "output": output}


def choice(text: str, first: str, second: str, preference: int) -> dict:
    pair = {"instruction": text, "input": "", "output_1": first, "output_2": second, "preference": preference}
    return {**pair, "raw_preference": preference}


def alpaca_farm(root: Path, **changes) -> dict:
    """A copy of the data set in its layout; the options that read it whole, with one pair in each held-out split."""
    evaluation = [{**instruction(f"Test {n}", f"davinci {n}"), "generator": "text_davinci_003"} for n in (0, 1)]
    files = {
        "alpaca_farm_evaluation.json": [*evaluation, {**instruction("Test blank", " "), "datasplit": "eval"}],
        "alpaca_instructions/sft.json": [
            instruction("Learn 0", " taught 0\n", "more"),
            instruction("TEST 0!", "leak"),
            instruction("Learn 1", ""),
        ],
        "alpaca_instructions/unlabeled.json": [
            instruction("Roll 0", None, None),
            instruction("Check 0", "leak"),
            instruction(" ", "nothing"),
            *(instruction(f"Pair {n}", "leak, but for one") for n in range(3)),
        ],
        "alpaca_instructions/val.json": [instruction("Check 0", "answer 0"), instruction("Test 1", "leak")],
        "alpaca_instructions/preference.json": [instruction(f"Pair {n}", f"afresh {n}") for n in range(3)],
        "alpaca_human_preference.json": [
            choice("Pair 0", "one", "two", 1),
            choice("Pair 1", "one ", "two", 2),
            choice("Pair 2", "one", "two", 2),
            choice("Pair 2", "two", "three", 1),
            choice("Pair 3", "same", " same", 1),
            choice("Pair 4", "some", "", 1),
            choice("Check 0", "one", "two", 1),
        ],
    }
    for name, rows in {**files, **changes}.items():
        write(root / "copy" / name, rows)
    return {
        "local": "copy",
        "rows": {},
        "prompt_style": "plain",
        "n_validation_preferences": 1,
        "n_test_preferences": 1,
    }


def test_alpaca_farm(tmp_path, capsys):
    data = make("alpaca_farm", tmp_path, **alpaca_farm(tmp_path))
    train, validation, test = (data.splits[split] for split in SPLITS)
    home = {"Pair 0": "", "Pair 1": "", "Pair 2": ""}
    for split in SPLITS:
        home.update((pair.prompt, split) for pair in data.splits[split].preferences)
    assert sorted(home.values()) == ["test", "train", "validation"]
    trained = next(prompt for prompt, split in home.items() if split == "train")
    assert [record.prompt for record in train.prompts] == ["Roll 0", trained]
    assert train.demonstrations == [Demonstration(id="sft-00000", prompt="Learn 0\n\nmore", completion="taught 0")]
    assert validation.prompts == [Prompt(id="val-00000", prompt="Check 0")]
    assert validation.demonstrations == [Demonstration(id="val-00000", prompt="Check 0", completion="answer 0")]
    assert data.truth["validation"].references == [Reference(id="val-00000", prompt="Check 0", reference="answer 0")]
    assert test.prompts == [Prompt(id="eval-00000", prompt="Test 0"), Prompt(id="eval-00001", prompt="Test 1")]
    assert test.demonstrations == []
    assert [record.reference for record in data.truth["test"].references] == ["davinci 0", "davinci 1"]
    pairs = {pair.id: (pair.prompt, pair.chosen, pair.rejected) for s in SPLITS for pair in data.splits[s].preferences}
    assert pairs == {
        "pair-00000": ("Pair 0", "one", "two"),
        "pair-00001": ("Pair 1", "two", "one"),
        "pair-00002": ("Pair 2", "two", "one"),
        "pair-00003": ("Pair 2", "two", "three"),
    }
    assert [(r.id, r.completion) for r in train.references] == [
        (pair.id, f"afresh {trained[-1]}") for pair in train.preferences
    ]
    assert [r.completion[:-1] for r in (*validation.references, *test.references)] == ["afresh "] * (
        len(validation.preferences) + len(test.preferences)
    )
    assert disjoint(data)
    # Left out: val 1, sft 1, unlabeled 1 and two of Pair 0..2, pair 6; blank: eval 2, sft 2, unlabeled 2, pair 5.
    assert capsys.readouterr().out == (
        "alpaca_farm: 24 rows read; left out: 6 whose prompt is in another split, 4 with a blank text, "
        "1 with two identical texts\n"
    )


def test_alpaca_farm_sizes_and_prompt_text(tmp_path):
    options = {**alpaca_farm(tmp_path), "n_test_prompts": 1, "n_train_prompts": 1, "prompt_style": "alpaca"}
    data = make("alpaca_farm", tmp_path, **options)
    assert [len(data.splits[split].prompts) for split in SPLITS] == [1, 1, 1]
    assert len(data.truth["test"].references) == 1
    assert data.splits["validation"].prompts[0].prompt == instruction_prompt("Check 0", "", "alpaca")
    with pytest.raises(ConfigError, match=r"source\.n_demonstrations: expected at most the 1 different .* found 2"):
        make("alpaca_farm", tmp_path, **{**options, "n_demonstrations": 2})
    with pytest.raises(
        ConfigError, match=r"3 different prompts can fill, found train at least 1, validation 1, test 2"
    ):
        make("alpaca_farm", tmp_path, **{**options, "n_test_preferences": 2})


def test_alpaca_farm_reads_the_preferences_that_are_asked_for(tmp_path):
    gpt4 = [choice(f"Pair {n}", "gpt", "four", 1) for n in range(3)]
    options = alpaca_farm(tmp_path, **{"alpaca_gpt4_preference.json": gpt4})
    data = make("alpaca_farm", tmp_path, **options, preferences="alpaca_gpt4_preference")
    assert {pair.chosen for split in SPLITS for pair in data.splits[split].preferences} == {"gpt"}


def test_alpaca_farm_refuses_another_code(tmp_path):
    options = alpaca_farm(tmp_path, **{"alpaca_human_preference.json": [choice("Pair 0", "one", "two", 0)]})
    with pytest.raises(RecordError, match=r"preference\.json: row 0: column `preference`: expected 1 or 2, found 0"):
        make("alpaca_farm", tmp_path, **options)


def test_alpaca_farm_has_805_evaluation_instructions(tmp_path):
    options = alpaca_farm(tmp_path)
    del options["rows"]
    with pytest.raises(InputError, match=r"alpaca_farm_evaluation\.json: expected 805 rows, found 3"):
        make("alpaca_farm", tmp_path, **options)


# --- SPA --------------------------------------------------------------------------------------------------------------


def spa_row(text: str, output: str, original: str, revised: str) -> dict:
    return {"instruction": text, "input": "", "output": output, "original_output": original, "revised_output": revised}


SPA = [
    spa_row("a", "truth a", "start a", "better a"),
    spa_row("b", "truth b", "start b", "better b"),
    spa_row("c", "truth c", "start c", "better c"),
    spa_row("d", "truth d", " start d", "better d\n"),
    spa_row("B?", "truth B", "truth B", "better B"),
    spa_row("e", "truth e", "same", "same "),
    spa_row("f", "truth f", "start f", ""),
    spa_row("g", " ", "start g", "better g"),
]


def spa(root: Path) -> dict:
    write(root / "copy" / "SPA.json", SPA)
    return {"local": "copy", "prompt_style": "plain", "n_validation": 1, "n_test": 1}


def test_spa(tmp_path, capsys):
    # The order of the prompts is d, a, b, c (see above): test d, validation a, train b and c; B? goes where b is.
    data = make("spa", tmp_path, **spa(tmp_path))
    train, validation, test = (data.splits[split] for split in SPLITS)
    assert [record.id for record in train.prompts] == ["spa-00001", "spa-00002", "spa-00004"]
    assert test.corrections == [Edit(id="spa-00003", prompt="d", initial="start d", revised="better d")]
    assert [edit.id for edit in train.corrections] == ["spa-00001", "spa-00002", "spa-00004"]
    assert train.references == [
        Demonstration(id="spa-00001", prompt="b", completion="truth b"),
        Demonstration(id="spa-00002", prompt="c", completion="truth c"),
        Demonstration(id="spa-00004", prompt="B?", completion="truth B"),
    ]
    assert train.demonstrations == train.references
    assert [record.completion for record in validation.demonstrations] == ["truth a"]
    assert test.demonstrations == []
    assert test.references == [Demonstration(id="spa-00003", prompt="d", completion="truth d")]
    assert validation.preferences == [Preference(id="spa-00000", prompt="a", chosen="truth a", rejected="start a")]
    assert [pair.id for pair in train.preferences] == ["spa-00001", "spa-00002"]
    assert data.truth["train"].references == []
    assert data.truth["test"].references == [Reference(id="spa-00003", prompt="d", reference="start d", gold="truth d")]
    assert disjoint(data)
    assert capsys.readouterr().out == ("spa: 8 rows read; left out: 2 with a blank text, 1 with two identical texts\n")


def test_spa_choices(tmp_path):
    choices = {"demonstrations": "revised_output", "reference": "revised_output", "preferences": "none", "n_train": 1}
    data = make("spa", tmp_path, **spa(tmp_path), **choices)
    assert [record.completion for record in data.splits["train"].demonstrations] == ["better b", "better B"]
    assert data.truth["test"].references[0].reference == "better d"
    assert all(data.splits[split].preferences == [] for split in SPLITS)


def test_spa_needs_a_commit_and_rows(tmp_path):
    with pytest.raises(
        ConfigError, match=r"source\.revision: expected the 40 .* of RUCAIBox/SPA, found null; .* begins with 956ea42\)"
    ):
        make("spa", tmp_path)
    write(tmp_path / "copy" / "SPA.json", SPA[5:])
    with pytest.raises(InputError, match=r"SPA\.json: expected at least one revised output, found none"):
        make("spa", tmp_path, local="copy")


def test_the_stages_run_on_spa(tmp_path):
    """The files that raw and edits write can be read again; replay hands on the revisions."""
    params = {"source": {"name": "spa", **spa(tmp_path)}, "annotator": {"name": "replay"}}
    profile = Profile("p", tmp_path, params, tmp_path / "params.yaml")
    run_raw(profile)
    run_edits(profile)
    assert [edit.revised for edit in read_split(profile.data / "raw" / "train").corrections] == [
        "better b",
        "better c",
        "better B",
    ]
    assert len((profile.data / "edits" / "train.jsonl").read_text().splitlines()) == 3
    assert read_truth(profile.data / "gold" / "test").references[0].gold == "truth d"


# --- HH-RLHF ----------------------------------------------------------------------------------------------------------


def dialogue(prompt: str, chosen: str, rejected: str) -> dict:
    start = f"\n\nHuman: {prompt}\n\nAssistant:"
    return {"chosen": f"{start} {chosen}", "rejected": f"{start} {rejected}"}


HH_TRAIN = [
    dialogue("a", "good a", "bad a"),
    dialogue("b\n\nAssistant: Why?\n\nHuman: b2", "good b", "bad b"),
    dialogue("A", "good A", "bad A"),
    dialogue("t", "leak", "leaks"),
    dialogue("e", "same", "same "),
    dialogue("f", "", "bad f"),
    {"chosen": "\n\nHuman: g\n\nAssistant: yes", "rejected": "\n\nHuman: h\n\nAssistant: no"},
    {"chosen": "\n\nHuman: i\n\nAssistant: yes\n\nHuman: more", "rejected": "\n\nHuman: i\n\nAssistant: no"},
    {"chosen": "Human: k\n\nAssistant: yes", "rejected": "Human: k\n\nAssistant: no"},
    {"chosen": "\n\nHuman: l", "rejected": "\n\nHuman: l\n\nAssistant: no"},
]


def hh_rlhf(root: Path) -> dict:
    write(root / "copy" / "helpful-base" / "train.jsonl.gz", HH_TRAIN, "lines")
    write(root / "copy" / "helpful-base" / "test.jsonl.gz", [dialogue("t", "good t", "bad t")], "lines")
    return {"local": "copy", "subsets": ["helpful-base"], "sha256": {}, "n_validation": 1}


def test_hh_rlhf(tmp_path, capsys):
    data = make("hh_rlhf", tmp_path, **hh_rlhf(tmp_path))
    pairs = {split: {pair.id: pair for pair in data.splits[split].preferences} for split in SPLITS}
    assert pairs["test"] == {
        "helpful-base/test-00000": Preference(
            id="helpful-base/test-00000", prompt="Human: t\n\nAssistant:", chosen="good t", rejected="bad t"
        )
    }
    # Prompts a and A share a split, b is the other; all of them are in one or the other.
    rest = {**pairs["train"], **pairs["validation"]}
    assert sorted(rest) == [f"helpful-base/train-0000{n}" for n in range(3)]
    assert sorted(len(pairs[split]) for split in ("train", "validation")) == [1, 2]
    long = rest["helpful-base/train-00001"]
    assert long.prompt == "Human: b\n\nAssistant: Why?\n\nHuman: b2\n\nAssistant:"
    assert (long.chosen, long.rejected) == ("good b", "bad b")
    assert [record.reference for record in data.truth["test"].references] == ["good t"]
    assert disjoint(data)
    assert capsys.readouterr().out == (
        "hh_rlhf: 11 rows read; left out: "
        "1 malformed (chosen and rejected differ before the last turn), "
        "4 malformed (no human turn at the beginning, or no assistant's turn at the end), "
        "1 whose prompt is in another split, 1 with two identical texts\n"
    )


def test_hh_rlhf_sizes(tmp_path):
    options = hh_rlhf(tmp_path)
    tests = [dialogue(f"t{n}", "good", "bad") for n in range(3)]
    write(tmp_path / "copy" / "helpful-base" / "test.jsonl.gz", tests, "lines")
    data = make("hh_rlhf", tmp_path, **{**options, "n_test": 2, "n_train": 1})
    assert [len({prompt_key(p.prompt) for p in data.splits[split].prompts}) for split in SPLITS] == [1, 1, 2]
    with pytest.raises(ConfigError, match=r"source\.n_test: expected at most the 3 different prompts"):
        make("hh_rlhf", tmp_path, **{**options, "n_test": 4})


def test_hh_rlhf_checks_the_published_files(tmp_path):
    options = hh_rlhf(tmp_path)
    del options["sha256"]
    with pytest.raises(InputError, match=r"helpful-base/test\.jsonl\.gz: checksum mismatch: expected sha256 8be3fc1a"):
        make("hh_rlhf", tmp_path, **options)


def test_hh_rlhf_without_a_pair(tmp_path):
    options = hh_rlhf(tmp_path)
    write(tmp_path / "copy" / "helpful-base" / "test.jsonl.gz", HH_TRAIN[4:], "lines")
    with pytest.raises(InputError, match="hh_rlhf: the test files of helpful-base: expected pairs, found none"):
        make("hh_rlhf", tmp_path, **options)


# --- any preference data set in TRL's format --------------------------------------------------------------------------

USER, SYSTEM = {"role": "user", "content": "Sky?"}, {"role": "system", "content": "Be brief."}
BLUE, GREEN = {"role": "assistant", "content": "Blue."}, {"role": "assistant", "content": "Green."}
TRANSCRIPT = "System: Be brief.\n\nHuman: Sky?\n\nAssistant:"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, ("The sky is", " blue.", " green.")),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, ("The sky is", " blue.", " green.")),
        ({"chosen": "The sky is blue", "rejected": "The sky is black"}, ("The sky is", " blue", " black")),
        ({"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}, ("Sky?", "Blue.", "Green.")),
        ({"chosen": [USER, BLUE], "rejected": [USER, GREEN]}, ("Sky?", "Blue.", "Green.")),
        ({"prompt": "Sky?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, ("Sky?", "Blue.", "Green.")),
        ({"prompt": "Sky?", "chosen": [BLUE], "rejected": [GREEN]}, ("Sky?", "Blue.", "Green.")),
        ({"prompt": [USER], "chosen": "Blue.", "rejected": "Green."}, ("Sky?", "Blue.", "Green.")),
        ({"chosen": [SYSTEM, USER, BLUE], "rejected": [SYSTEM, USER, GREEN]}, (TRANSCRIPT, "Blue.", "Green.")),
        ({"prompt": [SYSTEM], "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, (TRANSCRIPT, "Blue.", "Green.")),
    ],
)
def test_the_formats_of_trl(values, expected):
    found = trl_pair(Row("here", 7, values), "train")
    assert isinstance(found, Preference) and found.id == "train-00007"
    assert (found.prompt, found.chosen, found.rejected) == expected


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "with two identical texts"),
        ({"prompt": "p", "chosen": "a", "rejected": " "}, "with a blank text"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "without a prompt"),
        ({"chosen": "yes", "rejected": "no"}, "without a prompt"),
        ({"chosen": [BLUE], "rejected": [GREEN]}, "without a prompt"),
        ({"chosen": [USER, BLUE], "rejected": [USER]}, "malformed"),
        ({"chosen": [USER, BLUE, USER, BLUE], "rejected": [USER, GREEN]}, "malformed"),
        ({"chosen": [SYSTEM, BLUE], "rejected": [SYSTEM, USER]}, "malformed"),
    ],
)
def test_rows_that_are_no_pair(values, reason):
    found = trl_pair(Row("here", 0, values), "train")
    assert isinstance(found, str) and found.startswith(reason)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"prompt": "p", "chosen": "a", "rejected": [GREEN]},
            "both as texts or both as lists of messages, found str and l",
        ),
        (
            {"prompt": 3, "chosen": "a", "rejected": "b"},
            "column `prompt`: expected a text or a list of messages, found 3",
        ),
        ({"chosen": [USER, BLUE], "rejected": [USER, "no"]}, "column `rejected`: message 1: expected the texts `role`"),
        ({"chosen": [USER, BLUE], "rejected": [USER, {"role": "assistant"}]}, "column `rejected`: message 1: expected"),
        (
            {"prompt": [{"role": "tool", "content": "1"}], "chosen": [BLUE], "rejected": [GREEN]},
            "expected the roles system, user, assistant, found 'tool'",
        ),
    ],
)
def test_rows_of_another_format(values, message):
    with pytest.raises(RecordError, match=f"^here: .*{message}"):
        trl_pair(Row("here", 0, values), "train")


def test_the_shared_beginning_ends_before_a_white_space():
    assert shared_text("a b", "a b c") == "a"
    assert shared_text("one", "two") == ""
    assert shared_text("a \n x", "a \n y") == "a"


def strings(*prompts: str) -> list[dict]:
    return [{"prompt": prompt, "chosen": f"good {prompt}", "rejected": f"bad {prompt}"} for prompt in prompts]


def test_a_local_file_alone(tmp_path, monkeypatch):
    write(tmp_path / "mine.parquet", strings("a", "b", "c", "d", "D"))
    data = make("preference_dataset", tmp_path, local="mine.parquet", n_validation=1, n_test=1)
    ids = [[pair.id for pair in data.splits[split].preferences] for split in SPLITS]
    assert ids == [["mine-00001", "mine-00002"], ["mine-00000"], ["mine-00003", "mine-00004"]]  # order d, a, b, c
    assert disjoint(data)
    with pytest.raises(ConfigError, match=r"source\.files: expected no pattern, as .*mine\.parquet is one file"):
        make("preference_dataset", tmp_path, local="mine.parquet", files=["*"])
    monkeypatch.setenv("FGALIGN_HUB_B", "mine.parquet")
    assert make("preference_dataset", tmp_path, repo="a/b", n_validation=1, n_test=1) == data


def test_a_local_folder_with_test_files(tmp_path, capsys):
    write(tmp_path / "copy" / "data" / "train-0.jsonl", strings("a", "b"), "lines")
    write(tmp_path / "copy" / "data" / "train-1.parquet", strings("c", "T!"))
    write(tmp_path / "copy" / "data" / "test-0.json", strings("t", "u"))
    write(tmp_path / "copy" / ".cache" / "train-2.json", strings("hidden"))
    options = {"local": "copy", "files": ["*train-*"], "test_files": ["data/test-*.json"], "n_validation": 1}
    data = make("preference_dataset", tmp_path, **options, n_test=None)
    assert [pair.prompt for pair in data.splits["train"].preferences] == ["b", "c"]  # order a, b, c
    assert [pair.prompt for pair in data.splits["validation"].preferences] == ["a"]
    assert [pair.id for pair in data.splits["test"].preferences] == ["data/test-0-00000", "data/test-0-00001"]
    assert capsys.readouterr().out.endswith("6 rows read; left out: 1 whose prompt is in another split\n")
    assert len(make("preference_dataset", tmp_path, **options, n_test=1).splits["test"].prompts) == 1


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    def names(self, repo, *, revision, repo_type):
        assert (repo, revision, repo_type) == ("a/b", COMMIT, "dataset")
        return ["README.md", "data/train-0.parquet", "data/test-0.parquet"]

    def fetch(repo, name, *, repo_type, revision):
        return str(write(tmp_path / "cache" / name, strings("a", "b", "c")))

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", names)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    options = {"repo": "a/b", "revision": COMMIT, "files": ["data/train-*.parquet"], "n_validation": 1, "n_test": 1}
    data = make("preference_dataset", tmp_path, **options)
    assert [len(data.splits[split].preferences) for split in SPLITS] == [1, 1, 1]
    with pytest.raises(
        ConfigError, match=r"source\.files: 'x\*' matches no file .* some of data/test-0\.parquet, data/tr"
    ):
        make("preference_dataset", tmp_path, **{**options, "files": ["x*"]})
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", failing(OSError("no network")))
    assert make("preference_dataset", tmp_path, **{**options, "files": ["data/train-0.parquet"]}) == data
    with pytest.raises(InputError, match=r"hf download a/b --include 'data/train-\*\.parquet' --repo-type dataset"):
        make("preference_dataset", tmp_path, **options)
    # The command takes names or patterns: beside a pattern, a name is one too.
    with pytest.raises(InputError, match=r"--include 'data/train-\*\.parquet' --include data/test-0\.parquet --repo"):
        make("preference_dataset", tmp_path, **options, test_files=["data/test-0.parquet"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": []}, r"source\.files: expected at least one pattern"),
        ({"local": None}, r"source\.repo: expected the name of a data set"),
        ({"local": "nowhere", "files": ["*"]}, "nowhere: no such file or folder, although source.local names its fol"),
        ({"local": "nowhere.jsonl", "files": []}, r"nowhere\.jsonl: no such file or folder, although source\.local"),
        ({"test_files": ["*"]}, r"source\.test_files: train\.json is among source\.files, too"),
        ({"n_test": None}, r"source\.n_test: expected a number, as there are no source\.test_files"),
        ({"files": ["*"]}, "two of them differ in their ending alone"),
        ({"n_train": 9}, r"3 different prompts can fill, found train 9, validation 1, test 1"),
    ],
)
def test_a_bad_choice_of_files(tmp_path, changes, message):
    write(tmp_path / "copy" / "train.json", strings("a", "b", "c"))
    write(tmp_path / "copy" / "train.jsonl", strings("a", "b", "c"), "lines")
    options = {"local": "copy", "files": ["train.json"], "n_validation": 1, "n_test": 1, **changes}
    with pytest.raises(InputError, match=message):
        make("preference_dataset", tmp_path, **options)


def test_files_without_a_pair(tmp_path):
    write(tmp_path / "train.json", [{"prompt": "p", "chosen": "a", "rejected": "a"}])
    with pytest.raises(InputError, match=r"preference_dataset: train\.json: expected preference pairs, found none"):
        make("preference_dataset", tmp_path, local="train.json")


# --- all sources ------------------------------------------------------------------------------------------------------


def test_every_source_can_be_had_by_name():
    for name in SOURCES:
        assert callable(get_source(name).build)
    with pytest.raises(
        ConfigError, match="unknown source 'spam'; expected one of simulator, qa_feedback, alpaca_farm, s"
    ):
        get_source("spam")


def test_a_module_and_a_line_make_a_source(tmp_path, monkeypatch):
    (tmp_path / "source_of_a_test.py").write_text(
        "from __future__ import annotations\n"
        "from pathlib import Path\n"
        "from fgalign.config import Section\n"
        "from fgalign.core.raw_data import RawData\n"
        "class MyConfig(Section):\n    size: int = 3\n"
        "def build(config: MyConfig, root: Path) -> RawData:\n    return RawData({config.size: root}, {})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SOURCES, "mine", "source_of_a_test")
    assert make("mine", tmp_path, size=5).splits == {5: tmp_path}
    with pytest.raises(ConfigError, match=r"^params\.yaml: source\.sizes: no such key; did you mean size\?$"):
        make("mine", tmp_path, sizes=5)


@pytest.mark.parametrize("name", ["alpaca_farm", "hh_rlhf"])
def test_the_pinned_revisions_are_whole_commits(name):
    assert parse_section({}, get_source(name).config, "params.yaml").revision is not None
    assert hub.downloads_folder(parse_section({}, get_source(name).config, ""), Path()).name.isalnum()
