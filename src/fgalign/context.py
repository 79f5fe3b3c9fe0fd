"""What a training stage may see: the training and validation splits, models made before it, never the test split."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fgalign.config import Profile
from fgalign.core.modeling import RuntimeConfig, load_tokenizer, use_bf16
from fgalign.core.raw_data import RawSplit, read_split
from fgalign.core.schema import Edit, LabelledPair, read_records
from fgalign.errors import ConfigError
from fgalign.tracking import Run


@dataclass
class Context:
    """One seed of one training stage. ``out`` is the folder, empty at the start, that the model goes into."""

    profile: Profile
    stage: str
    seed: int
    device: torch.device
    runtime: RuntimeConfig
    out: Path
    run: Run = field(default_factory=Run)
    spent: dict[str, int] = field(default_factory=dict)
    """What ``spend`` has added up; empty while a stage has reported nothing."""
    overlay: Path | None = None
    """A folder whose ``models``, ``labels`` and ``edits`` take the place of the pipeline's where it has them."""
    inputs: set[Path] = field(default_factory=set)
    """The files and folders that were asked for so far."""

    def split(self, name: str) -> RawSplit:
        """The raw ``train`` or ``validation`` split.

        Raises:
            ConfigError: another split is asked for; training never opens the test split.
        """
        return read_split(self._used(self.profile.data / "raw" / self._trainable(name)))

    def labelled(self, name: str) -> list[LabelledPair]:
        """The labelled pairs of the ``train`` or ``validation`` split."""
        return read_records(self._file("labels", self._trainable(name)), LabelledPair)

    def edits(self, name: str) -> list[Edit]:
        """The edits of the ``train`` or ``validation`` split."""
        return read_records(self._file("edits", self._trainable(name)), Edit)

    def model(self, name: str) -> Path:
        """Folder of a model of an earlier stage, of this seed where the stage has seeds."""
        over = self.overlay and self.overlay / "models" / name
        return self._used(over if over and over.exists() else self.profile.model_folder(name, self.seed))

    def spend(self, *, training_tokens: int = 0, sampled_tokens: int = 0, gradient_updates: int = 0) -> None:
        """Add to what this seed has used: tokens without padding that went forward and backward (each pass counts),
        response tokens sampled to learn from, optimiser steps."""
        used = {
            "training_tokens": training_tokens,
            "sampled_tokens": sampled_tokens,
            "gradient_updates": gradient_updates,
        }
        self.spent = {name: self.spent.get(name, 0) + count for name, count in used.items()}

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, that of the base model everywhere."""
        return load_tokenizer(self.model("base"))

    @property
    def bf16(self) -> bool:
        """Whether to compute in bf16."""
        return use_bf16(self.runtime, self.device)

    def autocast(self) -> torch.autocast:
        """A context that computes in bf16 where the runtime does; for scoring, which no trainer wraps."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _file(self, kind: str, split: str) -> Path:
        over = self.overlay and self.overlay / kind / f"{split}.jsonl"
        return self._used(over if over and over.exists() else self.profile.data / kind / f"{split}.jsonl")

    def _used(self, path: Path) -> Path:
        self.inputs.add(path)
        return path

    @staticmethod
    def _trainable(name: str) -> str:
        if name not in ("train", "validation"):
            raise ConfigError(f"split: training may open 'train' and 'validation', not {name!r}")
        return name
