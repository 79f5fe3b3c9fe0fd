"""How methods, rows and metrics look everywhere: one label, colour, marker and line style a method; units, decimals.

Colours are Okabe and Ito's and Tol's, which stay apart under the common colour blindnesses; markers and line styles
keep the methods apart in grey printing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fgalign.config import Profile
from fgalign.report.config import STUDIES, other_judges, variants


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
        return f"{self.label} ({self.unit})" if self.unit and self.unit != YES_NO else self.label


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

BENCHMARK = "benchmark_"
"""Start of the metric of a benchmark: ``benchmark_<task>__<measure>``."""
BENCHMARK_RATES = {"acc": "accuracy", "acc_norm": "accuracy by length", "pct_stereotype": "stereotyped"}
"""Measures of the evaluation harness that are shares (0 to 1), shown in percent, as a column's title says them."""
TOKEN_AUROC = "token_auroc"
"""Metric of a token-level reward model; ``token_auroc:<kind>`` is that of one kind of flaw."""
ABBREVIATIONS = ("qa",)
YES_NO = "yes/no"
"""Unit of a metric that is 1 or 0 and shown as a tick or nothing."""

METRICS: dict[str, MetricStyle] = {
    "win_rate": MetricStyle("Win rate", "%", 1),
    "difference_to_ppo_preference": MetricStyle("Win rate − PPO", "points", 1),
    "difference_to_sft": MetricStyle("Win rate − SFT", "points", 1),
    "difference_to_first": MetricStyle("Win rate − first row", "points", 1),
    "score": MetricStyle("Score", "", 3),
    "reward": MetricStyle("Reward", "", 2),
    "difference_to_initial": MetricStyle("Reward − initial", "", 2),
    "kl": MetricStyle("KL to SFT", "nats", 2),
    "tokens": MetricStyle("Length", "tokens", 1),
    "truncated": MetricStyle("Answers cut off", "%", 1),
    "training_tokens": MetricStyle("Training tokens", "thousands", 1),
    "sampled_tokens": MetricStyle("Sampled to learn from", "thousands", 1),
    "edit_distance": MetricStyle("Edit distance", "tokens", 1),
    "accuracy_preference": MetricStyle("Accuracy, preferences", "%", 1),
    "accuracy_main": MetricStyle("Accuracy, main judge", "%", 1),
    "difference_accuracy": MetricStyle("Accuracy − main judge", "points", 1),
    "agreement": MetricStyle("Same outcome as main judge", "%", 1),
    "accuracy_edit": MetricStyle("Accuracy, edits", "%", 1),
    "token_auroc": MetricStyle("AUROC, bad tokens", "", 3),
    "token_precision": MetricStyle("Precision, bad tokens", "%", 1),
    "token_recall": MetricStyle("Recall, bad tokens", "%", 1),
    "seeds_reached": MetricStyle("Seeds that reach it", "%", 0),
    "updates": MetricStyle("PPO steps", "", 1),
    "response_tokens": MetricStyle("Response tokens", "thousands", 1),
    "gradient_updates": MetricStyle("Gradient updates", "", 1),
    "target_score": MetricStyle("Target score", "", 3),
    "search_win_rate": MetricStyle("Win rate, validation", "%", 1),
    "chosen": MetricStyle("Chosen", YES_NO, 0),
    "best_update": MetricStyle("Update", "", 0),
    "best_kl": MetricStyle("KL to SFT", "nats", 2),
    "best_proxy": MetricStyle("Proxy reward", "SD", 2),
    "best_gold": MetricStyle("Gold score", "", 3),
    "last_update": MetricStyle("Update", "", 0),
    "last_kl": MetricStyle("KL to SFT", "nats", 2),
    "last_proxy": MetricStyle("Proxy reward", "SD", 2),
    "last_gold": MetricStyle("Gold score", "", 3),
    "difference_last_best": MetricStyle("Gold, last − best", "", 3),
    "weight_share": MetricStyle("Weight on flawed tokens", "%", 1),
    "share_tokens": MetricStyle("Flawed tokens, chance", "%", 1),
    "difference_to_chance": MetricStyle("Weight − chance", "points", 1),
    "difference_good": MetricStyle("Tokens put in", "nats", 3),
    "difference_bad": MetricStyle("Tokens taken out", "nats", 3),
    "difference_kept": MetricStyle("Tokens kept", "nats", 3),
    "difference_good_bad": MetricStyle("Put in − taken out", "nats", 3),
    "difference_margin": MetricStyle("Revised − initial", "nats", 2),
    "difference_margin_shorter": MetricStyle("The same, shorter revised", "nats", 2),
    "difference_margin_longer": MetricStyle("The same, longer revised", "nats", 2),
    "towards_revised": MetricStyle("Edits that gained", "%", 1),
    "pairs": MetricStyle("Pairs", "", 0),
    "texts": MetricStyle("Texts", "", 0),
    "flawless": MetricStyle("Without a flaw", "%", 1),
    "better": MetricStyle("Judged better in its pair", "%", 1),
    "initial_tokens_mean": MetricStyle("Initial length", "tokens", 1),
    "revised_tokens_mean": MetricStyle("Revised length", "tokens", 1),
    "edit_distance_mean": MetricStyle("Edit distance", "tokens", 2),
    "share_bad": MetricStyle("Bad tokens", "%", 1),
    "share_good": MetricStyle("Good tokens", "%", 1),
    "precision": MetricStyle("Precision", "%", 1),
    "recall": MetricStyle("Recall", "%", 1),
    "f1": MetricStyle("F1", "%", 1),
    "share_of_labels": MetricStyle("Part of the bad labels", "%", 1),
    "share_bad_labelled": MetricStyle("Labelled bad", "%", 1),
    "share_bad_truth": MetricStyle("Truly flawed", "%", 1),
    "position_auroc": MetricStyle("AUROC of position", "", 3),
    "flawed_tokens": MetricStyle("Flawed tokens", "", 0),
}

# None of these is in METHODS. The lengths have no common factor, so 42 pairs come before one comes again, with another
# line.
SPARE_COLOURS = (SKY, "#882255", "#999933", "#332288", PURPLE, "#8C510A")
SPARE_MARKERS = ("v", "<", "h", ">", "p", "*", "d")
SPARE_LINES = ("-", "--", "-.", ":")


def method_styles(profile: Profile) -> dict[str, MethodStyle]:
    """Style of every method: those listed above, then the profile's others in its order.

    A method that is not listed takes the next free combination of colour, marker and line, so that no two look alike;
    ``title`` in its entry is its label.
    """
    styles, free = dict(METHODS), 0
    for name, entry in profile.params.get("methods", {}).items():
        if name not in styles:
            styles[name] = _spare(name, free)
            free += 1
        title = entry.get("title") if isinstance(entry, dict) else None
        if title:
            styles[name] = replace(styles[name], label=str(title))
    return styles


def method_style(profile: Profile, name: str) -> MethodStyle:
    """Style of one method; a name that is neither listed nor in the profile gets a label from itself, in grey."""
    return method_styles(profile).get(name) or MethodStyle(_words(name), GREY, ".", ":")


def row_label(profile: Profile, table: str, row: str) -> str:
    """Label of a table's row for readers: a method, a variant of a study, a token model, a candidate of the search
    (``figa/0: epochs=2``), a kind of flaw (``flaws:x``), a split of the data (``split:x``) or another judge
    (``judge:x``)."""
    if table in STUDIES:
        return variant_label(profile, table, row)
    if table == "xu_token_models":
        entry = profile.params.get("token_models", {}).get(row)
        title = entry.get("title") if isinstance(entry, dict) else None
        return str(title) if title else method_style(profile, row).label
    kind, _, name = row.partition(":")
    if table == "search":
        return f"{method_style(profile, kind.partition('/')[0]).label}: {name.strip() or 'as set'}"
    if kind == "judge":
        return other_judges(profile)[name].title
    if name:
        return "All flaws" if row == "flaws:all" else _words(name.replace("-", "_"))
    return method_style(profile, row).label


def variant_label(profile: Profile, study: str, name: str) -> str:
    """Label of a variant: its title, else its method and noise level, else its name."""
    variant = variants(profile, study).get(name)
    if variant is None:
        return _words(name)
    if variant.title:
        return variant.title
    if variant.level is not None and variant.method is not None:
        return f"{method_style(profile, variant.method).label}, level {variant.level:g}"
    return _words(name)


def labeller(profile: Profile, table: str) -> Callable[[str], str]:
    """``row_label`` of one table."""
    return lambda row: row_label(profile, table, row)


def metric_style(name: str) -> MetricStyle:
    """Style of a metric; a benchmark's names task and measure, an AUROC by kind of flaw the kind; one under another
    judge (``win_rate:llm``) has that of the metric; any other that is not listed gets its name."""
    if name.startswith(BENCHMARK):
        task, _, measure = name.removeprefix(BENCHMARK).partition("__")
        label = f"{_words(task)}: {BENCHMARK_RATES.get(measure, measure.replace('_', ' '))}"
        return MetricStyle(label, "%", 1) if measure in BENCHMARK_RATES else MetricStyle(label, "", 3)
    if name.startswith(f"{TOKEN_AUROC}:"):
        return MetricStyle(_words(name.partition(":")[2].replace("-", "_")), "", 3)
    return METRICS.get(name) or METRICS.get(name.partition(":")[0]) or MetricStyle(_words(name), "", 3)


def _spare(name: str, place: int) -> MethodStyle:
    pairs = len(SPARE_COLOURS) * len(SPARE_MARKERS)
    # Short names are abbreviations: DPO, RRHF.
    return MethodStyle(
        name.upper() if len(name) <= 5 and "_" not in name else _words(name),
        SPARE_COLOURS[place % len(SPARE_COLOURS)],
        SPARE_MARKERS[place % len(SPARE_MARKERS)],
        SPARE_LINES[place // pairs % len(SPARE_LINES)],
    )


def _words(name: str) -> str:
    first, *rest = name.lower().split("_")
    return " ".join([first.upper() if first in ABBREVIATIONS else first.capitalize(), *rest])
