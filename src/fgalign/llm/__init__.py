"""A language model behind an OpenAI-compatible address (chat completions): many prompts, one answer each.

Every answer is kept on disk under the hash of what was asked, so an interrupted run goes on where it stopped and a
finished one asks nothing. Retries, their exponential backoff with jitter and ``Retry-After`` are those of the
``openai`` package. The key comes from the environment and is written nowhere.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from fgalign.config import VARIABLE, Section, find_root
from fgalign.errors import ConfigError, FgalignError, InputError
from fgalign.io import read_json, write_json
from fgalign.parallel import progress

T = TypeVar("T")
Positive = Annotated[float, Field(gt=0.0)]

USAGE_LOG = "usage.jsonl"
SPENT_FILE = "llm_usage.json"
"""Name, or the end of it, of the file beside edits or scores that says what the model took for them."""
CHANCE = 0.01
"""Failed answers stop the work where a true share of ``max_failed`` would give as many with less than this probability.
"""
NO_KEY = "none"
"""What the client, which wants a key, is given where none is sent."""
_REFUSAL = re.compile(
    r"\W*(i['’]m sorry|i am sorry|sorry,|i apologi[sz]e|(i['’]m|i am) (unable|not able)|i (can['’]t|cannot|won['’]t)|"
    r"as an ai\b)",
    re.IGNORECASE,
)
# What servers call a prompt that they reject for itself, not for how it was sent; some say only in words that it is
# too long.
_REJECTED = {"content_filter", "content_policy_violation", "context_length_exceeded", "exceed_context_size_error"}
_TOO_LONG = re.compile(r"context (length|size|window)", re.IGNORECASE)
# A key of which a server shows the ends alone.
_MASKED = re.compile(r"""[^\s"',:]*\*{3,}[^\s"',:]*""")


class LLMError(FgalignError):
    """A server did not answer as an OpenAI-compatible one does, or too many answers are of no use."""


class LLMConfig(Section):
    """Which model answers, and how it is asked.

    ``key_variable`` names the environment variable that holds the key; null sends none. A loopback address gets none
    either, unless ``key_variable`` is given explicitly. ``temperature``, ``seed``: null leaves them to the server.
    ``max_tokens`` limits an answer; newer models want it under the name ``max_completion_tokens``.

    ``parallel`` requests are under way at once. ``requests_per_minute`` and ``tokens_per_minute`` space the requests of
    this process (retries among them); a request counts a token for every four bytes sent, plus ``max_tokens``.
    ``retries`` of a request after 408, 409, 429, 5xx, a lost connection or ``timeout`` seconds without an answer.

    ``cache`` is the folder of the answers, absolute or relative to the repository's root. ``max_failed`` is the largest
    share of answers that may be refused, truncated or unparsable, but for chance (``most_failed``). Prices are in USD
    per million tokens.
    """

    base_url: str = "https://api.openai.com/v1"
    model: Annotated[str, Field(min_length=1)]
    key_variable: str | None = "OPENAI_API_KEY"
    temperature: Annotated[float, Field(ge=0.0)] | None = 0.0
    max_tokens: Annotated[int, Field(ge=1)] = 1024
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    seed: int | None = 0
    parallel: Annotated[int, Field(ge=1)] = 8
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    retries: Annotated[int, Field(ge=0)] = 6
    timeout: Positive = 120.0
    cache: str = "data/llm-cache"
    max_failed: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    price_input: Annotated[float, Field(ge=0.0)] | None = None
    price_output: Annotated[float, Field(ge=0.0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, values: Any) -> Any:
        """Refuse what looks like a key without repeating it, which pydantic's own message would."""
        if not isinstance(values, Mapping):
            return values
        variable = values.get("key_variable")
        named = any("key" in str(name).lower() for name in values if name != "key_variable")
        if named or (isinstance(variable, str) and not VARIABLE.fullmatch(variable)):
            raise ConfigError(
                "llm: a key must not stand in the profile: export it as an environment variable and give the "
                "variable's name as `key_variable` (capitals, digits and _; default OPENAI_API_KEY)"
            )
        try:
            url = urlsplit(str(values.get("base_url", "")))
        except ValueError:
            raise ConfigError("llm: base_url: expected http(s)://host.../v1, found no address") from None
        if url.username or url.password or url.query:
            raise ConfigError(
                "llm: base_url: expected an address without user, password or query, which are secrets; put the key "
                "into an environment variable"
            )
        return values

    @property
    def loopback(self) -> bool:
        """Whether ``base_url`` is on this machine."""
        host = urlsplit(self.base_url).hostname or ""
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False


def api_key(config: LLMConfig) -> str | None:
    """The key, or None where none is sent.

    Raises:
        ConfigError: the variable is not set or holds what cannot be a key, or the key would go unencrypted to another
            machine.
    """
    if config.key_variable is None or (config.loopback and "key_variable" not in config.model_fields_set):
        return None
    if urlsplit(config.base_url).scheme == "http" and not config.loopback:
        raise ConfigError(
            f"llm: base_url {config.base_url}: the key would be sent unencrypted; use https, or `key_variable: null` "
            "for a server that asks for none"
        )
    key = os.environ.get(config.key_variable, "").strip()
    if not key:
        raise ConfigError(
            f"llm: expected the key of {config.base_url} in the environment variable {config.key_variable}, found "
            "none; export it, name another in `key_variable`, or `key_variable: null` for a server without keys"
        )
    if not re.fullmatch(r"[!-~]+", key):  # else libraries quote it in their errors, in ways that cannot be foreseen
        raise ConfigError(
            f"llm: environment variable {config.key_variable}: expected one key, of ASCII characters without white "
            "space, found others among them; copy the key again"
        )
    return key


class Answer(NamedTuple):
    """One answer: ``model`` as the server names it; None tokens where the server does not count them."""

    text: str
    refused: bool
    finish_reason: str | None
    input_tokens: int | None
    output_tokens: int | None
    model: str | None


@dataclass
class Usage:
    """What asking has used. Tokens are the server's count; those of cached answers were paid in an earlier run.

    ``refused``, ``truncated`` (cut off at ``max_tokens``) and ``unparsable`` count prompts, with repetitions; ``asked``
    and ``cached`` count different prompts; ``uncounted`` answers came without a count of tokens.
    """

    prompts: int = 0
    asked: int = 0
    cached: int = 0
    retries: int = 0
    refused: int = 0
    truncated: int = 0
    unparsable: int = 0
    uncounted: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    cached_output_tokens: int = 0

    @property
    def failed(self) -> int:
        """Number of prompts without an answer that can be used."""
        return self.refused + self.truncated + self.unparsable

    def add(self, other: Usage) -> None:
        """Add another usage to this one."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def cost(self, config: LLMConfig) -> float | None:
        """USD for the answers that were asked for, cached ones not counted; None without prices."""
        if config.price_input is None or config.price_output is None:
            return None
        return (self.input_tokens * config.price_input + self.output_tokens * config.price_output) / 1e6


class Limiter:
    """Spaces requests so that any minute holds at most the given number of them and of tokens."""

    def __init__(
        self,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests, self._tokens, self._clock = requests_per_minute, tokens_per_minute, clock
        self._free = 0.0
        self._lock = threading.Lock()

    def reserve(self, tokens: float) -> float:
        """Reserve the next free place for a request of so many tokens; returns the seconds to wait for it."""
        pause = max(
            60.0 / self._requests if self._requests else 0.0, 60.0 * tokens / self._tokens if self._tokens else 0.0
        )
        with self._lock:
            now = self._clock()
            start = max(now, self._free)
            self._free = start + pause
        return start - now


class LLM:
    """A model that answers prompts. ``title`` names its work in progress bars, messages and the log of usage."""

    def __init__(self, config: LLMConfig, title: str) -> None:
        self.config = config
        self.title = title
        self.usage = Usage()
        cache = Path(config.cache)
        self.cache = cache if cache.is_absolute() else find_root() / cache
        self._limiter = Limiter(config.requests_per_minute, config.tokens_per_minute)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failed: LLMError | None = None
        self._tokens: dict[str, tuple[int | None, int | None]] = {}
        self._rejection = ""
        self._now = Usage()
        self._openai = urlsplit(config.base_url).hostname == "api.openai.com"

    def ask(self, prompts: Sequence[str], parse: Callable[[str], T | None]) -> list[T | None]:
        """The parsed answer to each prompt, in order; None where it was refused, truncated or does not parse.

        A prompt is one user message; equal prompts are asked once. ``parse`` returns None for a text that is not in
        the form asked for. Prints what was used and appends it to ``usage.jsonl`` beside the answers.

        Raises:
            LLMError: the server cannot be reached, refuses the requests or is not OpenAI-compatible, or more of the
                prompts than ``most_failed`` have no answer that can be used. Answers that came are kept.
            InputError: a file of the cache is damaged.
        """
        self._now = now = Usage(prompts=len(prompts))
        self._stop.clear()
        self._failed = None
        self._rejection = ""
        requests = {_digest(request): request for request in map(self._request, prompts)}
        answers: dict[str, Answer] = {}
        for key, request in requests.items():
            answer = self._read(key, request)
            if answer is not None:
                answers[key] = answer
                now.cached += 1
                now.cached_input_tokens += answer.input_tokens or 0
                now.cached_output_tokens += answer.output_tokens or 0
        waiting = {key: request for key, request in requests.items() if key not in answers}
        try:
            if waiting:
                self._ask_server(waiting, answers)
            self._tokens |= {key: (answer.input_tokens, answer.output_tokens) for key, answer in answers.items()}
            keys = [_digest(self._request(prompt)) for prompt in prompts]
            results = [self._parse(answers[key], parse) for key in keys]
        finally:
            self.usage.add(now)
            self._report(now)
        most = most_failed(len(prompts), self.config.max_failed) if now.failed else 0
        if now.failed > most:
            failed = [key for key, result in zip(keys, results, strict=True) if result is None]
            kept = [str(self._file(key)) for key in failed if self._file(key).exists()]
            # A rejected prompt has no file.
            shown = [*kept, repr(requests[failed[0]]["messages"][0]["content"][:80])]
            why = f" (the server said: {' '.join(self._rejection.split())[:200]})" if self._rejection else ""
            raise LLMError(
                f"{self.title}: expected at most {most} of {len(prompts)} answers without use "
                f"({self.config.max_failed:.1%}, and chance), found {now.failed} ({now.refused} refused, "
                f"{now.truncated} cut off at {self.config.max_tokens} tokens, {now.unparsable} not in the form asked "
                f"for), for example {shown[0]}{why}; change the model, the prompt, `max_tokens` or `max_failed` (the "
                "answers are kept)"
            )
        return results

    def counts(self) -> dict[str, float]:
        """Everything used so far, by name, for the tracker."""
        cost = self.usage.cost(self.config)
        return {f"llm/{name}": value for name, value in asdict(self.usage).items()} | (
            {} if cost is None else {"llm/cost_usd": cost}
        )

    def spent(self) -> dict[str, Any]:
        """What all answers so far took from an empty cache: the same whether they came from the server or from the
        cache, so that a stage may write it into its outputs. ``requests`` are different prompts; tokens and cost (USD,
        None without prices) are theirs. ``uncounted`` of them came without a count of tokens; failures count prompts,
        with repetitions."""
        counts = list(self._tokens.values())
        paid = Usage(input_tokens=sum(i or 0 for i, _ in counts), output_tokens=sum(o or 0 for _, o in counts))
        return {
            "model": self.config.model,
            "prompts": self.usage.prompts,
            "requests": len(counts),
            "refused": self.usage.refused,
            "truncated": self.usage.truncated,
            "unparsable": self.usage.unparsable,
            "uncounted": sum(None in pair for pair in counts),
            "input_tokens": paid.input_tokens,
            "output_tokens": paid.output_tokens,
            "cost_usd": paid.cost(self.config),
        }

    # --- one request --------------------------------------------------------------------------------------------------

    def _request(self, prompt: str) -> dict[str, Any]:
        """The body of a request, all of which decides the answer: its hash is the key of the cache."""
        config = self.config
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": config.temperature,
            config.max_tokens_name: config.max_tokens,
            "seed": config.seed,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _ask_server(self, requests: dict[str, dict[str, Any]], answers: dict[str, Answer]) -> None:
        """Ask in parallel; on the first error nothing new is sent, and what is under way is waited for and kept."""
        # Before any thread starts: a missing key, and a folder that cannot keep what will be paid for.
        _ = self._client
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.cache).close()
        except OSError as error:
            raise ConfigError(
                f"llm: cache: expected a folder that can be written, found {self.cache} ({error.strerror}); name "
                "another"
            ) from None
        with (
            ThreadPoolExecutor(min(self.config.parallel, len(requests))) as pool,
            progress(len(requests), self.title, "answer") as bar,
        ):
            futures = {pool.submit(self._ask_one, key, request): key for key, request in requests.items()}
            try:
                for future in as_completed(futures):
                    answers[futures[future]] = future.result()
                    bar.update()
            except BaseException as error:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                # A request that was not sent any more can end before the one whose failure stopped it.
                if isinstance(error, LLMError) and self._failed is not None:
                    raise self._failed from None
                raise

    def _ask_one(self, key: str, request: dict[str, Any]) -> Answer:
        import openai

        try:
            answer = _answer(self._client.chat.completions.create(**request))
        except openai.APIStatusError as error:
            code = None if error.param in ("max_tokens", self.config.max_tokens_name) else _rejected(error)
            if code is not None:
                with self._lock:
                    self._rejection = self._rejection or self._redact_error(str(error))
                # Not kept: a rejected prompt costs nothing, and a server with another setting may take it.
                answer = Answer("", True, code, 0, 0, None)
                with self._lock:
                    self._now.asked += 1
                return answer
            if error.status_code in (401, 403):
                # OpenAI's own words hold the first and the last characters of the key.
                sent = self._client.api_key != NO_KEY
                key = f"the key in {self.config.key_variable}" if sent else "`key_variable` (no key was sent)"
                raise self._failure(
                    f"status {error.status_code}: no access; check {key} and rights to the model (the server's words "
                    "are not shown, which may hold parts of a key)"
                ) from None
            later = error.response.headers.get("retry-after")
            asks = f" (it asks to wait {later} before the next request)" if later else ""
            raise self._failure(f"status {error.status_code}{asks}: {error}") from None
        except openai.OpenAIError as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            raise self._failure(f"{error}{cause}") from None
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise self._failure(f"expected a chat completion in JSON, found none ({error!r})") from None
        answer = answer._replace(text=self._redact(answer.text), model=self._redact(answer.model or "") or None)
        with self._lock:
            self._now.asked += 1
            self._now.input_tokens += answer.input_tokens or 0
            self._now.output_tokens += answer.output_tokens or 0
            self._now.uncounted += answer.input_tokens is None or answer.output_tokens is None
        try:
            write_json(self._file(key), {"request": request, "answer": answer._asdict()})
        except OSError as error:
            raise self._failure(f"an answer that cannot be kept in {self._file(key)} ({error.strerror})") from None
        return answer

    @cached_property
    def _client(self) -> Any:
        from openai import DefaultHttpxClient, OpenAI

        config = self.config
        url = urlsplit(config.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"llm: base_url: expected http(s)://host.../v1, found {config.base_url!r}")
        # A proxy of the environment is not for this machine.
        http = DefaultHttpxClient(event_hooks={"request": [self._before]}, trust_env=not config.loopback)
        return OpenAI(
            api_key=api_key(config) or NO_KEY,
            base_url=config.base_url,
            timeout=config.timeout,
            max_retries=config.retries,
            http_client=http,
        )

    def _before(self, request: Any) -> None:
        """Before each attempt of each request: no header but this client's own, and wait for its place."""
        from openai import OpenAIError

        # The client adds what the environment has for its maker's server.
        request.headers["Authorization"] = f"Bearer {self._client.api_key}"
        if not self._openai:
            for name in ("OpenAI-Organization", "OpenAI-Project"):
                request.headers.pop(name, None)
        delay = self._limiter.reserve(len(request.content) / 4 + self.config.max_tokens)
        if self._stop.wait(delay):
            raise OpenAIError("not sent, because another request failed")
        # The client says in each request which attempt it is.
        with self._lock:
            self._now.retries += request.headers.get("x-stainless-retry-count", "0") != "0"

    def _failure(self, reason: str) -> LLMError:
        """The error of a request that failed; from now on no other is sent."""
        text = " ".join(self._redact_error(reason).split())
        error = LLMError(
            f"{self.title}: {self.config.base_url}, model {self.config.model!r}: expected an answer within "
            f"{self.config.retries} retries, found {text[:400]}; the answers that came are kept, run it again to go on"
        )
        with self._lock:
            self._failed = self._failed or error
        self._stop.set()
        return error

    def _redact(self, text: str) -> str:
        """A text from the server without the key, should the server repeat it."""
        key = self._client.api_key
        return text if key == NO_KEY else text.replace(key, "[key]")

    def _redact_error(self, text: str) -> str:
        """An error's text without the key, and without words in which asterisks hide all but its ends."""
        return _MASKED.sub("[key]", self._redact(text))

    # --- the cache ----------------------------------------------------------------------------------------------------

    def _file(self, key: str) -> Path:
        return self.cache / key[:2] / f"{key}.json"

    def _read(self, key: str, request: dict[str, Any]) -> Answer | None:
        path = self._file(key)
        if not path.exists():
            return None
        try:
            value = read_json(path)
            if value["request"] != request:
                raise ValueError("another request")
            return Answer(**value["answer"])
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: expected the answer to the request that its name is the hash of, found {error}; delete the "
                "file to ask again"
            ) from None

    # --- counting -----------------------------------------------------------------------------------------------------

    def _parse(self, answer: Answer, parse: Callable[[str], T | None]) -> T | None:
        result = None if answer.refused else parse(answer.text)
        if result is None:
            if answer.refused or _REFUSAL.match(answer.text):
                self._now.refused += 1
            elif answer.finish_reason == "length":
                self._now.truncated += 1
            else:
                self._now.unparsable += 1
        return result

    def _report(self, now: Usage) -> None:
        cost = now.cost(self.config)
        price = "" if cost is None else f", {cost:.4f} USD"
        uncounted = f", {now.uncounted} answers without a count" if now.uncounted else ""
        print(
            f"{self.title}: {now.asked} answers of {self.config.model} ({now.input_tokens} + {now.output_tokens} tokens"
            f"{price}{uncounted}), {now.cached} from the cache ({now.cached_input_tokens} + {now.cached_output_tokens} "
            f"tokens); {now.retries} retries; {now.refused} refused, {now.truncated} truncated, {now.unparsable} "
            f"unparsable of {now.prompts}",
            flush=True,
        )
        if now.asked:
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "title": self.title,
                "base_url": self.config.base_url,
                "model": self.config.model,
                **asdict(now),
                "cost_usd": cost,
            }
            try:
                with open(self.cache / USAGE_LOG, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:  # What stopped the work, if anything did, is to be seen.
                print(f"{self.title}: not added to {self.cache / USAGE_LOG} ({error.strerror})", flush=True)


def most_failed(answers: int, max_failed: float) -> int:
    """The largest number of answers that may fail: more have a probability below ``CHANCE`` where each fails with
    probability ``max_failed``, independently (a one-sided binomial test). Of few answers it is a larger share."""
    from scipy.stats import binom

    return int(binom.isf(CHANCE, answers, max_failed))


def _digest(request: dict[str, Any]) -> str:
    text = json.dumps(request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _answer(completion: Any) -> Answer:
    """An answer from the client's chat completion; any of Python's look-up errors where it is not one."""
    if not completion.choices and getattr(completion, "error", None):  # some send errors with status 200
        raise ValueError(f"the server's error: {completion.error}")
    choice, usage = completion.choices[0], completion.usage
    text, refusal = choice.message.content, getattr(choice.message, "refusal", None)
    if not isinstance(text, str | None):
        raise TypeError(f"content of type {type(text).__name__}")
    return Answer(
        # A character cut in two, which JSON can hold and UTF-8 cannot, becomes a question mark.
        text=(text or refusal or "").encode("utf-8", "replace").decode("utf-8"),
        refused=bool(refusal) or choice.finish_reason == "content_filter",
        finish_reason=choice.finish_reason,
        input_tokens=getattr(usage, "prompt_tokens", None),
        output_tokens=getattr(usage, "completion_tokens", None),
        model=completion.model,
    )


def _rejected(error: Any) -> str | None:
    """Why the server rejects this prompt for itself, in a word, or None."""
    if error.status_code not in (400, 413, 422):
        return None
    word = next((word for word in (error.code, error.type) if isinstance(word, str) and word in _REJECTED), None)
    return word or ("context_length_exceeded" if _TOO_LONG.search(str(error)) else None)
