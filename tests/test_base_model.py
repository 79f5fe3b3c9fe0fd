"""The base model that is kept in git, and the arithmetic it was made with."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
    import torch

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
