"""`fgalign` for a pipeline that a test runs: each command in a process forked from one with the libraries imported.

Importing torch, transformers and MLflow takes longer than a stage of the smoke profile does. ``preloaded`` starts a
server that imports them, and none of the package, and gives a folder for the PATH with a program `fgalign` in it. That
program passes its arguments, folder, environment and open files on; the server forks, and the new process imports the
package, runs the command and ends as any other, with the exit code that the program then ends with.

`python tests/preloaded.py SOCKET` is the server.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIBRARIES = {
    "accelerate": ("Accelerator",),
    "datasets": ("Dataset",),
    "lm_eval": ("simple_evaluate",),
    "lm_eval.tasks": ("TaskManager",),
    "matplotlib.pyplot": (),
    "mlflow.entities": ("Metric", "Param", "RunTag"),
    "mlflow.store.tracking.sqlalchemy_store": (),
    "mlflow.tracking": ("MlflowClient",),
    "pydantic": ("BaseModel",),
    "rapidfuzz": (),
    "scipy.stats": (),
    "torch": (),
    "transformers": (
        "AutoModelForCausalLM",
        "AutoTokenizer",
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        "LlamaForTokenClassification",
        "PreTrainedTokenizerFast",
        "Trainer",
        "TrainingArguments",
    ),
    "trl": (),
    "typer": (),
    "yaml": (),
}
TRACKING = "fgalign-tracking"
"""The program for `python -m fgalign.tracking`, the process of a command that writes its runs."""
PROGRAM = """
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"."], [0, 1, 2])
    request = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
    server.sendall(json.dumps(request).encode())
    server.shutdown(socket.SHUT_WR)
    code = server.recv(16)
    sys.exit(int(code) if code else "the process that ran this command is gone")
"""


@contextmanager
def preloaded(environment: dict[str, str]) -> Iterator[Path]:
    """A folder for the PATH with `fgalign` in it, for as long as the block runs; the server is started in
    ``environment``, and ends with this process if not before."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        address, code, programs = folder / "socket", folder / "program.py", folder / "bin"
        programs.mkdir()
        code.write_text(PROGRAM.format(address=str(address)), encoding="utf-8")
        for name in ("fgalign", TRACKING):
            start = shlex.join([sys.executable, "-IS", str(code), str(programs / name)])
            (programs / name).write_text(f'#!/bin/sh\nexec {start} "$@"\n', encoding="utf-8")
            (programs / name).chmod(0o755)
        server = subprocess.Popen(
            [sys.executable, "-P", __file__, str(address)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None and server.stdout.readline() == "ready\n"
            yield programs
        finally:
            server.terminate()
            server.communicate()


def serve(address: str) -> None:
    """Fork for every request; returns in the process that is to run its command, set up for it."""
    # As `fgalign.cli.stage` sets them before it imports anything.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for module, names in LIBRARIES.items():
        found = importlib.import_module(module)
        for name in names:
            getattr(found, name)
    own = [name for name in sys.modules if name.split(".")[0] == "fgalign"]
    assert not own and threading.active_count() == 1, (own, threading.enumerate())
    gc.collect()
    gc.freeze()  # Or each process would write to, and so copy, all of it.
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    while listening in select.select([listening, sys.stdin], [], [])[0]:
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            return answer(connection)
        connection.close()
        while waited():
            pass
    sys.exit()


def waited() -> bool:
    """Whether a process that had ended was waited for."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def answer(connection: socket.socket) -> None:
    """Read a request and fork once more: one process returns, the other waits for it and tells its exit code."""
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))
    if process := os.fork():
        for file in files:
            os.close(file)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        connection.sendall(str(code if code >= 0 else 128 - code).encode())
        os._exit(0)
    connection.close()
    for place, file in enumerate(files):
        os.dup2(file, place)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ |= request["environment"]
    sys.argv = request["arguments"]


if __name__ == "__main__":
    serve(sys.argv[1])
    program = Path(sys.argv[0])
    if program.name == TRACKING:
        runpy.run_module("fgalign.tracking", run_name="__main__", alter_sys=True)
    else:
        from fgalign import cli, tracking

        tracking.COMMAND = [str(program.with_name(TRACKING))]
        cli.main()
