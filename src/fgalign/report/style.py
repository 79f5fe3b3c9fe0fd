"""How methods and metrics look everywhere: one label, colour, marker and line style a method; units and decimals.

Colours are Okabe and Ito's, which stay apart under the common colour blindnesses; markers and line styles keep the
methods apart in grey printing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class MethodStyle:
    """Look of a method: label for readers, colour (hex), matplotlib marker and line style."""

    label: str
    colour: str
    marker: str
    line: str


@dataclass(frozen=True)
class MetricStyle:
    """A metric as readers see it: column title, unit (may be empty) and decimals shown."""

    label: str
    unit: str
    decimals: int

    @property
    def title(self) -> str:
        """Label with its unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


BLACK, ORANGE, SKY, GREEN, YELLOW = "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"

METHODS: dict[str, MethodStyle] = {
    "base": MethodStyle("Initial model", GREY, "X", ":"),
    "sft": MethodStyle("SFT", BLACK, "s", "-"),
    "figa": MethodStyle("FIGA", GREEN, "D", "-"),
    "ppo_preference": MethodStyle("PPO (preferences)", BLUE, "o", "-"),
    "ppo_edit": MethodStyle("Fine-grained PPO (edits)", ORANGE, "^", "--"),
    "ppo_token": MethodStyle("Token-level PPO", VERMILLION, "P", "-."),
    "rm_preference": MethodStyle("Sequence, preferences", BLUE, "o", "-"),
    "rm_edit": MethodStyle("Sequence, edits", ORANGE, "^", "--"),
    "rm_token": MethodStyle("Token-level", VERMILLION, "P", "-."),
    "initial": MethodStyle("Initial response", GREY, "X", ":"),
    "revised": MethodStyle("Revised response", GREEN, "D", "-"),
    "reference": MethodStyle("Reference response", BLACK, "s", "-"),
}

METRICS: dict[str, MetricStyle] = {
    "win_rate": MetricStyle("Win rate", "%", 1),
    "difference_to_ppo_preference": MetricStyle("Win rate − PPO", "points", 1),
    "difference_to_sft": MetricStyle("Win rate − SFT", "points", 1),
    "score": MetricStyle("Score", "", 3),
    "reward": MetricStyle("Reward", "", 2),
    "kl": MetricStyle("KL to SFT", "nats", 2),
    "tokens": MetricStyle("Length", "tokens", 1),
    "edit_distance": MetricStyle("Edit distance", "tokens", 1),
    "accuracy_preference": MetricStyle("Accuracy, preferences", "%", 1),
    "accuracy_edit": MetricStyle("Accuracy, edits", "%", 1),
    "token_auroc": MetricStyle("AUROC, bad tokens", "", 3),
    "token_precision": MetricStyle("Precision, bad tokens", "%", 1),
    "token_recall": MetricStyle("Recall, bad tokens", "%", 1),
    "seeds_reached": MetricStyle("Seeds that reach it", "%", 0),
    "updates": MetricStyle("PPO steps", "", 1),
    "response_tokens": MetricStyle("Response tokens", "thousands", 1),
    "gradient_updates": MetricStyle("Gradient updates", "", 1),
    "target_score": MetricStyle("Target score", "", 3),
    "pairs": MetricStyle("Pairs", "", 0),
    "initial_tokens_mean": MetricStyle("Initial length", "tokens", 1),
    "revised_tokens_mean": MetricStyle("Revised length", "tokens", 1),
    "edit_distance_mean": MetricStyle("Edit distance", "tokens", 2),
    "share_bad": MetricStyle("Bad tokens", "%", 1),
    "share_good": MetricStyle("Good tokens", "%", 1),
    "precision": MetricStyle("Precision", "%", 1),
    "recall": MetricStyle("Recall", "%", 1),
    "f1": MetricStyle("F1", "%", 1),
    "flawed_tokens": MetricStyle("Flawed tokens", "", 0),
}

_SPARE_COLOURS = (SKY, PURPLE, "#8C510A", "#35978F", "#762A83", "#B8A300")
_SPARE_MARKERS = ("v", "<", ">", "p", "h", "*", "d")
_SPARE_LINES = ("-", "--", "-.", ":")


def method_style(name: str) -> MethodStyle:
    """Style of a method; one not listed above gets a label and a look that follow from its name alone."""
    if name in METHODS:
        return METHODS[name]
    digest = hashlib.sha256(name.encode()).digest()
    label = name.upper() if len(name) <= 5 and "_" not in name else name.replace("_", " ").capitalize()
    return MethodStyle(
        label,
        _SPARE_COLOURS[digest[0] % len(_SPARE_COLOURS)],
        _SPARE_MARKERS[digest[1] % len(_SPARE_MARKERS)],
        _SPARE_LINES[digest[2] % len(_SPARE_LINES)],
    )


def metric_style(name: str) -> MetricStyle:
    """Style of a metric; one not listed above gets its name and three decimals."""
    return METRICS.get(name) or MetricStyle(name.replace("_", " ").capitalize(), "", 3)
