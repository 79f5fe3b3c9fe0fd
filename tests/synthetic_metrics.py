"""Made-up metrics files in the formats that the report reads, for tests of the report; never results."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from random import Random

import yaml

from fgalign.config import Profile, load_profile

SEEDS = (1, 2, 3)
METHODS = {"base": 0.18, "sft": 0.42, "figa": 0.55, "ppo_preference": 0.52, "ppo_edit": 0.56, "ppo_token": 0.61}
PPO = ("ppo_preference", "ppo_edit", "ppo_token")
JUDGED = "id,seed,score,reference_score,win,kl,tokens,truncated,reward_rm_preference,reward_rm_edit,reward_rm_token"
PROMPT = (
    "Facts: the museum opens at nine; tickets cost four euros; dogs must stay outside. "
    "Question: when does the museum open and what does a ticket cost? Please answer politely in one sentence."
)
ANSWER = ["The", " museum", " opens", " at", " ten", ",", " you", " fool", ",", " and", " a", " ticket", " costs"]
ANSWER += [" four", " eu", "ros", ",", " four", " eu", "ros", ".", " Dogs", " are", " wel", "come", ".", "</s>"]
FLAWED = {4, 6, 7, 16, 17, 18, 19, 24, 23}


def write_profile(root: Path, name: str = "mini", **report: object) -> Profile:
    """A repository skeleton with the profile's parameters; ``report`` overrides keys of its report section."""
    (root / "src" / "fgalign").mkdir(parents=True, exist_ok=True)
    (root / "dvc.yaml").touch()
    path = root / "params.yaml" if name == "mini" else root / "reproduce" / "profiles" / name / "params.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    section = {"judge_title": "gold score of the simulator", "budget_note": "Made-up numbers for a test.", **report}
    params = {"profile": name, "seeds": list(SEEDS), "report": section}
    params["methods"] = {"figa": {"alpha": 1.0, "beta": 0.5}, **{method: {"kl_coef": 0.05} for method in PPO}}
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    return load_profile(name, root)


def write_csv(path: Path, header: str, rows: list[list[object]]) -> None:
    """A CSV file with the given header and rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header.split(","))
        writer.writerows(rows)


def write_metrics(profile: Profile, prompts: int = 60, methods: dict[str, float] = METHODS) -> Path:
    """Every metrics file of ``profile`` with plausible made-up values; returns the folder."""
    folder = profile.results / "metrics"
    folder.mkdir(parents=True, exist_ok=True)
    for method, skill in methods.items():
        write_judged(profile, method, skill, prompts)
    write_labels(folder)
    write_reward_models(profile)
    write_figa_data(profile, prompts)
    write_curves(profile)
    write_examples(folder)
    samples = [
        {
            "id": f"test-{index}",
            "prompt": PROMPT,
            "reference": "The museum opens at nine and a ticket costs four euros.",
            "responses": {method: "".join(ANSWER[:-1]) for method in methods},
            "scores": {method: round(skill, 3) for method, skill in methods.items()},
        }
        for index in range(2)
    ]
    (profile.results / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    return folder


def write_judged(profile: Profile, method: str, skill: float, prompts: int) -> None:
    """Judged samples of one method whose win rate is about ``skill``."""
    random = Random(f"{profile.name} {method}")
    rows = []
    for seed in profile.seeds:
        shift = random.gauss(0, 0.02)
        for index in range(prompts):
            ease = Random(f"prompt {index}").gauss(0, 0.3)
            score = skill + shift + ease + random.gauss(0, 0.2)
            win = 0.5 if abs(score - 0.5 - ease) < 0.02 else float(score > 0.5 + ease)
            kl = abs(random.gauss(20 * max(skill - 0.4, 0.001), 1))
            values = [round(value, 4) for value in (score, 0.5 + ease, win, kl)]
            rewards = [round(score * scale, 4) for scale in (4, 5, 6)]
            rows.append([f"test-{index}", seed, *values, 20 + int(10 * abs(ease)), score < -0.5, *rewards])
    write_csv(profile.results / "metrics" / "judged" / f"{method}.csv", JUDGED, rows)


def write_labels(folder: Path) -> None:
    """Label statistics and quality."""
    one = {"initial_tokens_mean": 27.31, "revised_tokens_mean": 26.02, "edit_distance_mean": 4.115}
    statistics = {
        "train": {"pairs": 3000, **one, "share_bad": 0.1312, "share_good": 0.0903},
        "validation": {"pairs": 300, **one, "share_bad": 0.1298, "share_good": 0.0911},
    }
    kinds = ("untruthful", "rude", "ignores_instruction", "repeats", "leaves_out")
    quality = {
        "precision": 0.872,
        "recall": 0.731,
        "f1": 0.7953,
        "pairs": 400,
        "by_type": {
            kind: {"recall": 0.6 + 0.05 * index, "tokens": 300 - 40 * index} for index, kind in enumerate(kinds)
        },
    }
    (folder / "label_statistics.json").write_text(json.dumps(statistics), encoding="utf-8")
    (folder / "label_quality.json").write_text(json.dumps(quality), encoding="utf-8")


def write_reward_models(profile: Profile) -> None:
    """Accuracies of the three reward models."""
    random = Random("reward models")
    accuracy = {
        "rm_preference": {"accuracy_preference": 0.71, "accuracy_edit": 0.80},
        "rm_edit": {"accuracy_preference": 0.69, "accuracy_edit": 0.93},
        "rm_token": {"accuracy_preference": 0.70, "accuracy_edit": 0.91, "token_auroc": 0.88},
    }
    accuracy["rm_token"] |= {"token_precision": 0.66, "token_recall": 0.58}
    rows = [
        [model, metric, seed, round(value + random.gauss(0, 0.01), 4)]
        for model, metrics in accuracy.items()
        for metric, value in metrics.items()
        for seed in profile.seeds
    ]
    write_csv(profile.results / "metrics" / "reward_models.csv", "model,metric,seed,value", rows)


def write_figa_data(profile: Profile, pairs: int) -> None:
    """Rewards, lengths and edit distances of FIGA's pairs."""
    rows = []
    for index in range(pairs):
        random = Random(f"pair {index}")
        length = random.randint(14, 40)
        for side, reward, edits in (("initial", -1.5, 0), ("revised", 1.2, 4), ("reference", 1.4, 22)):
            distance = edits and max(1, edits + random.randint(-2, 2))
            rows += [
                [f"train-{index}", side, seed, round(reward + random.gauss(0, 0.8), 4), length, distance]
                for seed in profile.seeds
            ]
    write_csv(profile.results / "metrics" / "figa_data.csv", "id,side,seed,reward,tokens,edit_distance", rows)


def write_curves(profile: Profile) -> None:
    """Learning curves; the token-level one rises fastest, the last seed of ppo_edit never gets as far as plain PPO."""
    rows = []
    for method, gain in zip(PPO, (0.20, 0.22, 0.30), strict=True):
        for seed in profile.seeds:
            random = Random(f"{method} {seed}")
            top = 0.1 if (method, seed) == ("ppo_edit", profile.seeds[-1]) else gain
            for update in range(0, 41, 4):
                score = 0.5 + top * (1 - 0.9**update) + random.gauss(0, 0.008)
                kl = 0.12 * update * (1 + gain) + abs(random.gauss(0, 0.1)) * (update > 0)
                tokens = update * 64 * (26 + seed)
                win = min(1.0, score * 0.9)
                values = [round(value, 4) for value in (score, win, kl, 4 * score - 2)]
                rows.append([method, seed, update, tokens, update * 8, *values])
    header = "method,seed,update,response_tokens,gradient_updates,score,win,kl,reward"
    write_csv(profile.results / "metrics" / "curves.csv", header, rows)


def write_examples(folder: Path) -> None:
    """Coloured-token examples."""
    examples = []
    for index in range(4):
        random = Random(f"example {index}")
        gold = [place in FLAWED for place in range(len(ANSWER))]
        labels = [-1 if flaw and random.random() < 0.8 else 0 for flaw in gold]
        rewards = [round(random.gauss(-0.5 if flaw else 0.1, 0.2), 4) for flaw in gold]
        example = {"id": f"test-{index}", "prompt": PROMPT, "response_tokens": ANSWER, "labels": labels}
        examples.append({**example, "gold": gold, "rewards": rewards})
    (folder / "token_examples.json").write_text(json.dumps(examples), encoding="utf-8")
