"""The base model that is kept in git, the arithmetic it was made with, and published models in its place."""

import copy
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fgalign.base_model import PretrainedConfig, build_pretrained
from fgalign.core.modeling import load_tokenizer, save_model
from fgalign.core.tokens import encode_response
from fgalign.errors import ConfigError, InputError

ROOT = Path(__file__).parent.parent
LOCKS = {"mini": "dvc.lock", "more-seeds": "reproduce/profiles/more-seeds/dvc.lock"}


@pytest.mark.parametrize("profile", LOCKS)
def test_the_base_model_in_git_is_the_one_of_the_lock(profile) -> None:
    """With it a clean clone skips its training, and starts from the same model on every processor."""
    folder = ROOT / "data" / profile / "models" / "base"
    tracked = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = sorted(Path(line).name for line in tracked.split())
    assert {"config.json", "model.safetensors", "tokenizer.json"} < set(names)
    # DVC's hash of a folder is that of its files' names and hashes as JSON.
    files = [{"md5": hashlib.md5((folder / name).read_bytes()).hexdigest(), "relpath": name} for name in names]
    expected = hashlib.md5(json.dumps(files, sort_keys=True).encode()).hexdigest() + ".dir"
    out = yaml.safe_load((ROOT / LOCKS[profile]).read_text(encoding="utf-8"))["stages"]["base"]["outs"][0]
    assert out["path"] == f"data/{profile}/models/base" and out["md5"] == expected and out["nfiles"] == len(names)


def test_both_profiles_start_from_one_base_model() -> None:
    weights = {(ROOT / f"data/{profile}/models/base/model.safetensors").read_bytes() for profile in LOCKS}
    assert len(weights) == 1


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_portable_arithmetic_takes_the_same_kernels_whatever_the_processor_offers() -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("portable arithmetic is for processors with AVX2")
    code = (
        "import os\nfrom fgalign.base_model import portable_arithmetic\nportable_arithmetic()\n"
        "import torch\nprint(torch.backends.cpu.get_cpu_capability(), os.environ['MKL_CBWR'])"
    )
    # Another setting of the surroundings does not matter.
    done = in_a_process(code, ATEN_CPU_CAPABILITY="default", MKL_CBWR="AUTO")
    assert done.stdout.split() == ["AVX2", "COMPATIBLE"] and "base_model.portable" not in done.stderr


def test_portable_arithmetic_too_late_or_elsewhere_is_said() -> None:
    code = (
        "import torch\ntorch.ones(3).sum()\ntorch.backends.cpu.get_cpu_capability()\n"
        "from fgalign.base_model import portable_arithmetic\nportable_arithmetic()"
    )
    done = in_a_process(code, ATEN_CPU_CAPABILITY="default")
    assert "base_model.portable: torch computes with" in done.stderr and "not AVX2" in done.stderr


def test_the_base_stage_computes_so_where_the_profile_asks_for_it(monkeypatch, tmp_path) -> None:
    """Before torch computes for the first time, that is before the device is set up."""
    from fgalign import base_model
    from fgalign.config import load_profile
    from fgalign.stages import train

    for name in LOCKS:
        assert load_profile(name, ROOT).params["base_model"]["portable"] is True
    calls: list[str] = []

    def stop(runtime) -> None:
        calls.append(f"threads {runtime.threads}")
        raise RuntimeError("stop here")

    monkeypatch.setattr(base_model, "portable_arithmetic", lambda: calls.append("portable"))
    monkeypatch.setattr(train, "set_up", stop)
    with pytest.raises(RuntimeError, match="stop here"):
        train.run_base(load_profile("mini", ROOT))
    assert calls == ["portable", "threads 2"]


# --- published models -------------------------------------------------------------------------------------------------


@pytest.fixture
def publish(tmp_path, tokenizer, make_gpt2):
    """``publish(name, **config)``: a folder with a tiny GPT-2 of random weights and a tokenizer that pads with its end
    token."""

    def make(name: str = "published", **config) -> Path:
        bare = copy.deepcopy(tokenizer)
        bare.pad_token = bare.eos_token
        model = make_gpt2(**{"vocab_size": len(bare), "eos_token_id": bare.eos_token_id, **config})
        save_model(model, bare, tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def take_over(tmp_path):
    """``take_over(name, **section)``: the folder that ``build_pretrained`` writes."""

    def build(name: Path | str, **section) -> Path:
        out = tmp_path / f"base-{len(list(tmp_path.glob('base-*')))}"
        out.mkdir()
        build_pretrained(PretrainedConfig(kind="pretrained", name=str(name), **section), out)
        return out

    return build


def embeddings(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")["transformer.wte.weight"]


def without_pad(folder: Path) -> Path:
    """The folder, its tokenizer's unused padding token renamed, so that a new one is needed."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("<|pad|>", "<|was|>"), encoding="utf-8")
    return folder


def test_a_new_padding_token_gets_the_same_row_every_time(publish, take_over) -> None:
    folder = without_pad(publish())
    old = embeddings(folder)
    first = take_over(folder)
    torch.manual_seed(12345)
    second = take_over(folder)
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir()) and "model.safetensors" in files
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    new = embeddings(first)
    assert new.shape[0] == old.shape[0] + 1 and torch.equal(new[:-1], old)
    assert load_tokenizer(first).pad_token_id == old.shape[0]
    # Close to the mean of the other rows, so that the token is none that the model would choose.
    assert torch.allclose(new[-1], old.mean(0), atol=1e-4)
    assert json.loads((first / "config.json").read_text())["pad_token_id"] == old.shape[0]


def test_a_vocabulary_with_spare_rows_keeps_them_all(publish, take_over, tokenizer) -> None:
    folder = without_pad(publish(vocab_size=len(tokenizer) + 8))
    base = take_over(folder)
    assert torch.equal(embeddings(base), embeddings(folder))
    assert load_tokenizer(base).pad_token_id == len(tokenizer)  # the first spare row
    assert json.loads((base / "config.json").read_text())["vocab_size"] == len(tokenizer) + 8


def test_without_a_chat_template_the_base_stage_stops(publish, take_over, tmp_path) -> None:
    folder = publish()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"published has no chat template; .*: give it as base_model\.chat_template$"):
        take_over(folder)
    with pytest.raises(ConfigError, match="has no chat template"):
        take_over(folder, chat_template="")
    assert load_tokenizer(take_over(folder, chat_template="{{ messages }}")).chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}", "<|end|>"),
        ("{% for m in messages %}<|user|>{{ m.content | trim }} <|end|>\n{{ eos_token }}{% endfor %}", "<|end|>"),
        ("{% for m in messages %}<|user|>{{ m.content }}{{ eos_token }}{% endfor %}", "<eos>"),
        # Nothing or a text behind a turn, and no answers in a conversation: nothing says how they end.
        ("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}", "<eos>"),
        ("{% for m in messages %}<|user|>{{ m.content }}\nnext {% endfor %}", "<eos>"),
        ("<|user|>{{ messages[0].content }}<|end|>", "<eos>"),
        ("{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}<|user|>", "<eos>"),
    ],
)
def test_responses_end_with_the_token_that_ends_turns(
    make_gpt2, tokenizer, take_over, tmp_path, capsys, template, end
) -> None:
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"eos_token": "<eos>"})
    other.chat_template = template
    # What ends turns pads too, as with some models.
    other.pad_token = "<|end|>"
    ids = {"<|end|>": tokenizer.eos_token_id, "<eos>": len(tokenizer)}
    save_model(make_gpt2(vocab_size=len(other), eos_token_id=ids["<eos>"]), other, tmp_path / "other")
    capsys.readouterr()
    base = take_over(tmp_path / "other")
    found = load_tokenizer(base)
    assert (found.eos_token, found.eos_token_id) == (end, ids[end])
    assert found.pad_token_id != found.eos_token_id
    for name in ("config.json", "generation_config.json"):
        assert json.loads((base / name).read_text())["eos_token_id"] == ids[end]
    said = "base: responses end with <|end|>, as turns of the chat template do, not <eos>\n"
    assert capsys.readouterr().out == (said if end == "<|end|>" else "")
    assert encode_response(found, "the cat")[-1] == ids[end]


@pytest.mark.parametrize("name", ["{}/models/mistyped", "./mistyped", "models/mistyped/", "~/mistyped", ""])
def test_a_mistyped_folder_is_not_asked_of_the_hub(take_over, tmp_path, monkeypatch, name) -> None:
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("asked"))
    name = name.format(tmp_path)
    with pytest.raises(InputError) as error:
        take_over(name)
    assert str(error.value) == (
        f"base_model.name: {name!r}: no such folder; expected a folder with a model, or a name of the hub such as "
        "owner/model"
    )


def test_a_folder_without_a_model_is_not_asked_of_the_hub(take_over, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("asked"))
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    expected = r"^base_model\.name: owner/model: expected a folder with a model \(config\.json, .*\), found "
    with pytest.raises(InputError, match=f"{expected}nothing; name the folder"):
        take_over("owner/model")
    (tmp_path / "owner" / "model" / "model.gguf").write_text("")
    with pytest.raises(InputError, match=rf"{expected}model\.gguf; name the folder"):
        take_over("owner/model")
    with pytest.raises(InputError, match="found no folder; name the folder"):
        take_over("owner/model/model.gguf")


def test_a_folder_takes_no_revision(publish, take_over) -> None:
    with pytest.raises(
        ConfigError, match=r"^base_model\.revision: expected only with a name of the hub, found the folder"
    ):
        take_over(publish(), revision="main")


def test_a_damaged_folder_is_one_line(publish, take_over) -> None:
    folder = publish()
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:100])
    expected = (
        r"published cannot be loaded \(.*\); expected a folder with config\.json, the weights and the tokenizer of a"
    )
    with pytest.raises(InputError, match=expected):
        take_over(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=expected):
        take_over(folder)


def test_nothing_is_made_up_for_what_a_folder_lacks(publish, take_over, make_model, tokenizer, tmp_path) -> None:
    folder = publish()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"published: expected a tokenizer, found one without tokens; put the"):
        take_over(folder, chat_template="{{ messages }}")
    headless = make_model(vocab_size=len(tokenizer)).model
    save_model(headless, tokenizer, tmp_path / "headless")
    with pytest.raises(
        InputError, match=r"headless: expected all weights of a causal LM, found none for lm_head\.weight;"
    ):
        take_over(tmp_path / "headless")


def test_a_model_of_the_hub_without_network_is_one_line(take_over, monkeypatch) -> None:
    from huggingface_hub.utils import logging

    asked = []

    def unreachable(name: str, **options) -> None:
        asked.append((name, options, logging.get_verbosity()))
        raise OSError("We couldn't connect to the hub,\nand found nothing " + "in the cache " * 20)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unreachable)
    before = logging.get_verbosity()
    with pytest.raises(InputError) as error:
        take_over("owner/model", revision="abc")
    message = str(error.value)
    assert message.startswith(
        "base_model.name: owner/model cannot be loaded (We couldn't connect to the hub, and found"
    )
    assert "...); there is no folder of that name here; on a machine with network access run `hf download" in message
    assert "`hf download owner/model --revision abc --local-dir FOLDER`" in message and "\n" not in message
    # The library's lines on its attempts are errors' only while it is asked, and no code of the model is run.
    assert asked == [("owner/model", {"revision": "abc", "trust_remote_code": False}, logging.ERROR)]
    assert logging.get_verbosity() == before != logging.ERROR


def test_a_model_that_keeps_a_state_is_refused(take_over, tokenizer, tmp_path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    save_model(MambaForCausalLM(config), tokenizer, tmp_path / "mamba")
    with pytest.raises(
        ConfigError, match=r"expected a model with a key-value cache, found MambaForCausalLM in .*mamba, which"
    ):
        take_over(tmp_path / "mamba")
