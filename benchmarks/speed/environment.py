"""The environment of TRL's side: a TRL that still has ``trl.experimental.ppo``, beside this project's own packages."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRL = "trl==1.11.0"


def constraints(lock: str) -> str:
    """The lines of a requirements lock that also hold in TRL's environment: all but TRL itself and comments."""
    lines = [line for line in lock.splitlines() if re.match(r"[A-Za-z0-9]", line) and not line.startswith("trl==")]
    return "\n".join(lines) + "\n"


def ensure_environment(folder: Path) -> Path | None:
    """The interpreter of TRL's environment in ``folder``, which is made on first use: the locked packages with an older
    TRL (1 GB with torch for the CPU, a minute or two); None where they cannot be had."""
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        print(f"Making {folder}: {TRL} and what it needs", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        (folder / "constraints.txt").write_text(
            constraints((ROOT / "requirements.lock").read_text(encoding="utf-8")), encoding="utf-8"
        )
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        try:
            subprocess.run([*pip, f"torch=={metadata.version('torch').partition('+')[0]}"], check=True)
            subprocess.run([*pip, "-c", str(folder / "constraints.txt"), TRL], check=True)
        except subprocess.CalledProcessError:
            print(f"{TRL} cannot be installed, as without network: its rows are left out", file=sys.stderr)
            return None
        (folder / ".installed").touch()
    return python


def versions(python: Path | str) -> dict[str, str]:
    """Versions of Python, torch, transformers and trl under an interpreter."""
    code = (
        "import platform; from importlib.metadata import version; print(platform.python_version(), "
        "*map(version, ('torch', 'transformers', 'trl')))"
    )
    found = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(("python", "torch", "transformers", "trl"), found, strict=True))
