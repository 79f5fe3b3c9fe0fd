"""What a training stage may see: the training and validation splits, models made before it, never the test split."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fgalign.config import Profile
from fgalign.errors import ConfigError
from fgalign.modeling import RuntimeConfig, load_tokenizer, use_bf16
from fgalign.raw_data import RawSplit, read_split
from fgalign.schema import LabelledPair, read_records
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

    def split(self, name: str) -> RawSplit:
        """The raw ``train`` or ``validation`` split.

        Raises:
            ConfigError: another split is asked for; training never opens the test split.
        """
        return read_split(self.profile.data / "raw" / self._trainable(name))

    def labelled(self, name: str) -> list[LabelledPair]:
        """The labelled pairs of the ``train`` or ``validation`` split."""
        return read_records(self.profile.data / "labels" / f"{self._trainable(name)}.jsonl", LabelledPair)

    def model(self, name: str) -> Path:
        """Folder of a model of an earlier stage, of this seed where the stage has seeds."""
        return self.profile.model_folder(name, self.seed)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, that of the base model everywhere."""
        return load_tokenizer(self.model("base"))

    @property
    def bf16(self) -> bool:
        """Whether to compute in bf16."""
        return use_bf16(self.runtime, self.device)

    @staticmethod
    def _trainable(name: str) -> str:
        if name not in ("train", "validation"):
            raise ConfigError(f"split: training may open 'train' and 'validation', not {name!r}")
        return name
