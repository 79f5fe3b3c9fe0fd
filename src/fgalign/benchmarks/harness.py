"""The only file that knows lm-evaluation-harness: a model of ours in its terms, and its results in ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval.api.task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from fgalign.benchmarks import BenchmarkConfig
from fgalign.errors import ConfigError, InputError
from fgalign.parallel import progress

TASK_FILES = Path(__file__).parent / "tasks"
# Stands in a context between texts that are encoded apart, and occurs in no text.
APART = "\x1e"


class Score(NamedTuple):
    """One metric of one task: its mean over the items, and the standard error of that mean (None: not known)."""

    task: str
    metric: str
    value: float
    stderr: float | None


class ChatLM(HFLM):
    """A causal LM that the harness asks in the terms of the rest of the pipeline.

    A prompt is a user turn of the chat template, a response begins where the template puts it, and the two are encoded
    apart and without special tokens, as in ``fgalign.core.tokens``. (The harness encodes them as one text and counts
    white space at the end of the template as part of the response.) Log-likelihoods are float32 sums over the tokens of
    the response, in nats, without an end-of-sequence token. ``prefix`` begins the model's turn, before any response.
    The bars of the harness give way to one of ours, named ``title``.

    Raises:
        InputError: the tokenizer has no chat template; later, prompt and response do not fit the model's positions.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int, bf16: bool = False, prefix: str = "", title: str = ""
    ) -> None:
        if tokenizer.chat_template is None:
            raise InputError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template; set `tokenizer.chat_template` before "
                "saving the tokenizer"
            )
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            mixed_precision_dtype="bfloat16" if bf16 else None,
            softmax_dtype="float32",
        )
        self._prefix = prefix
        self._title = title
        self._bar: Any = None
        self._limit = self.max_length
        # The choices of an item come one after another, and share their context.
        self._encode_context = lru_cache(maxsize=1)(self._encode)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The context of a response: the rendered turns, ``prefix``, and what the task says the response begins with
        (the harness's last turn then), with ``APART`` between them."""
        begun = [self._prefix] if self._prefix else []
        if not add_generation_prompt:
            *chat_history, last = chat_history
            begun.append(last["content"])
        return APART.join([super().apply_chat_template(chat_history), *begun])

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each request's continuation, and whether greedy decoding would give it."""
        with progress(len(requests), self._title, "response") as self._bar:
            found = super().loglikelihood(requests, disable_tqdm=True)
            # Responses that differ in their last token share a pass through the model.
            self._bar.update(len(requests) - self._bar.n)
        return found

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = self._encode_context(context), self._encode(continuation)
        if len(before) + len(after) > self._limit:
            raise InputError(
                f"benchmarks: expected prompt and response within the model's {self._limit} tokens, found "
                f"{len(before) + len(after)} (response {continuation[:40]!r}); leave that task out"
            )
        return before, after

    def _encode(self, text: str) -> list[int]:
        return [
            token for part in text.split(APART) for token in self.tokenizer(part, add_special_tokens=False)["input_ids"]
        ]

    def _model_call(self, inps: Any, *arguments: Any, **keywords: Any) -> Any:
        self._bar.update(len(inps))
        return super()._model_call(inps, *arguments, **keywords)


def task_manager(tasks: Sequence[str], local: Sequence[str], items: Path) -> TaskManager:
    """The harness's index of tasks: ours, whose items lie in ``items``, and, only when ``tasks`` names others, its own.

    Raises:
        ConfigError: neither has a task or group of that name.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Its own task files are many, and reading them takes longer than our tasks.
    manager = TaskManager(
        include_path=TASK_FILES,
        include_defaults=set(tasks) > set(local),
        metadata={"folder": str(items)},
    )
    for task in tasks:
        if task not in manager.all_tasks:
            raise ConfigError(
                f"benchmarks.tasks: {task!r} is neither a task of ours nor one of the harness; "
                "`lm-eval ls tasks` lists those of the harness"
            )
    return manager


def load_tasks(manager: TaskManager, tasks: Sequence[str]) -> dict[str, Any]:
    """The tasks and groups of these names with their data, which the harness fetches where it has not got them.

    Raises:
        InputError: data cannot be fetched.
    """
    try:
        return manager.load(list(tasks))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"benchmarks.tasks: the data of {', '.join(tasks)} cannot be loaded ({type(error).__name__}: {reason}); on "
            "a machine with network access run this stage once and copy its folder `$HF_HOME` (default "
            "`~/.cache/huggingface`) to this one, or leave those tasks out"
        ) from None


def run_tasks(lm: Any, manager: TaskManager, config: BenchmarkConfig) -> list[Score]:
    """Evaluate ``lm`` (any ``lm_eval.api.model.LM`` with a chat template) on ``config.tasks``, in their order.

    Of a group the scores of the group are given, not those of its members.
    """
    loaded = load_tasks(manager, config.tasks)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=config.seed)
    # Not `simple_evaluate`: it also seeds the global random generators and describes the machine, which takes longer
    # than the evaluation of a small model.
    with _no_bars():
        found = evaluate(
            lm, loaded, limit=config.limit, apply_chat_template=True, fewshot_as_multiturn=True, log_samples=False
        )
    return [score for task in config.tasks for score in _scores(task, found["results"][task])]


def _scores(task: str, results: dict[str, Any]) -> Iterator[Score]:
    """The metrics of one task; the harness names them ``metric,filter`` and ``metric_stderr,filter``."""
    for key, value in results.items():
        metric, comma, name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = results.get(f"{metric}_stderr,{name}")
            yield Score(
                task,
                metric if name == "none" else f"{metric}/{name}",
                float(value),
                float(stderr) if isinstance(stderr, int | float) else None,
            )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Building requests shows a bar that the harness has no option against."""
    shown = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = shown
