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
SIGNALS = {"levenshtein": 0.55, "word": 0.55, "bag_of_words": 0.49, "constant": 0.44, "reward_difference": 0.5}
STUDIES = {
    "figa_signals": SIGNALS,
    "figa_data_ablation": {"full": 0.55, "no_filter": 0.53, "reference": 0.45, "quarter": 0.47},
    "figa_sweeps": {"as_released": 0.55, "alpha_2": 0.56, "threshold_p": 0.54},
    "figa_filter": {"three": 0.55, "no_eta1": 0.54, "pairs_100": 0.5},
    "ppo_rates": {"plain": 0.5, "token": 0.56},
}
LEVELS = (0.0, 0.1, 0.2, 0.4, 0.8)
TASKS = (("world_knowledge", "acc"), ("world_bias", "pct_stereotype"), ("world_bias", "likelihood_diff"))
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
    params["methods"] = {"figa": {"kind": "figa", "beta": 0.5}}
    params["methods"] |= {method: {"kind": "ppo", "needs": method.replace("ppo", "rm")} for method in PPO}
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    return load_profile(name, root)


def add_studies(profile: Profile) -> None:
    """Put every study, the search, the token models and another judge into the parameters, on disk too."""
    entries = {name: {"method": "figa", "variants": {key: {} for key in skill}} for name, skill in STUDIES.items()}
    entries["figa_signals"]["variants"]["levenshtein"] = {"title": "Levenshtein, tokens"}
    entries["label_noise"] = {
        "variants": {
            f"{method}_{level:g}": {"method": method, "level": level}
            for method in ("figa", "ppo_token")
            for level in LEVELS
        }
    }
    entries["overoptimisation"] = {"variants": {"rm_preference": {"method": "ppo_preference"}}}
    entries["overoptimisation"]["variants"]["rm_token"] = {"method": "ppo_token"}
    profile.params["studies"] = entries
    profile.params["search"] = {"seed": profile.seeds[0]}
    profile.params["token_models"] = {"rm_token_bt": {"title": "Bradley–Terry on sums"}, "rm_token_regression": {}}
    profile.params["other_judges"] = {"rouge_l": {"title": "Overlap", "trained_on": "nothing", "needs": "gold/test"}}
    for method in ("figa", "ppo_preference"):
        profile.params["methods"][method]["search"] = {"optim.learning_rate": [0.0001, 0.0003]}
    profile.file.write_text(yaml.safe_dump(profile.params, sort_keys=False), encoding="utf-8")


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


def write_more_metrics(profile: Profile, prompts: int = 60) -> None:
    """The metrics files that not every profile has; ``add_studies`` must have been called."""
    for study, skills in STUDIES.items():
        for variant, skill in skills.items():
            write_judged(profile, variant, skill, prompts, f"studies/{study}")
    for method, top in (("figa", 0.55), ("ppo_token", 0.61)):
        for level in LEVELS:
            write_judged(profile, f"{method}_{level:g}", top - 0.25 * level, prompts, "studies/label_noise")
    trained, folder = list(profile.params["methods"]), profile.results / "metrics"
    for method in trained:
        rows = [[seed, 90000 + 10 * seed, 40000 * ("ppo" in method), 120] for seed in profile.seeds]
        write_csv(folder / "budgets" / f"{method}.csv", "seed,training_tokens,sampled_tokens,gradient_updates", rows)
    for index, method in enumerate(["base", "sft", *trained]):
        random = Random(f"benchmark {method}")
        rows = [
            [task, metric, seed, round(0.5 + 0.01 * index + random.gauss(0, 0.01) * (method != "base"), 4), 0.02]
            for seed in profile.seeds
            for task, metric in TASKS
        ]
        write_csv(folder / "benchmarks" / f"{method}.csv", "task,metric,seed,value,stderr", rows)
    rows = [
        [method, number, f"optim.learning_rate={rate}", 0.3 + 0.05 * number, 0.25, 0.42, int(number == 1)]
        for method in ("figa", "ppo_preference")
        for number, rate in enumerate((0.0001, 0.0003))
    ]
    header = "method,candidate,parameters,win,win_low,win_high,chosen"
    write_csv(profile.sweeps / "metrics" / "search.csv", header, rows)
    models = {"rm_token": 0.91, "rm_token_bt": 0.92, "rm_token_regression": 0.88}
    rows = [
        [model, metric, seed, round(value - less + 0.004 * seed, 4)]
        for model, value in models.items()
        for metric, less in (("accuracy_preference", 0.2), ("accuracy_edit", 0.0), ("token_auroc", 0.05))
        for seed in profile.seeds
    ]
    write_csv(profile.sweeps / "metrics" / "token_models.csv", "model,metric,seed,value", rows)
    write_overoptimisation(profile)
    write_credit(profile)
    write_rejudged(profile, "rouge_l", prompts)
    write_edit_likelihood(profile, prompts)
    rows = [
        [split, text, f"{text}-{index}", -index % 3, 0.5 * (index % 3) if text == "chosen" else ""]
        for split, texts in (("train", ("demonstration", "chosen", "rejected", "revised")), ("test", ("reference",)))
        for text in texts
        for index in range(6)
    ]
    write_csv(profile.results / "metrics" / "text_quality.csv", "split,text,id,score,better", rows)


def write_edit_likelihood(profile: Profile, edits: int) -> None:
    """Held-out edits whose good tokens become likelier with the method's skill, and whose bad ones do not."""
    rows = []
    for model in ("sft", *profile.params["methods"]):
        gain = METHODS.get(model, METHODS["sft"]) - METHODS["sft"]
        for seed in profile.seeds:
            for index in range(edits):
                random = Random(f"{model} {seed} {index}")
                good, bad, kept = (round(-3 + change + random.gauss(0, 0.02), 4) for change in (gain, 0, 0))
                rows.append([model, seed, f"e{index}", f"e{index}", kept + bad, kept + good, good, 2, bad, 1, kept, 9])
    header = "model,seed,id,prompt,initial,revised,good,good_tokens,bad,bad_tokens,kept,kept_tokens"
    write_csv(profile.results / "metrics" / "edit_likelihood.csv", header, rows)


def write_overoptimisation(profile: Profile) -> None:
    """Proxy reward that keeps growing, gold score that turns: for the sequence reward early, for the token one late."""
    rows = []
    for reward, turn in (("rm_preference", 1.6), ("rm_token", 2.6)):
        for seed in profile.seeds:
            random = Random(f"{reward} {seed}")
            for update in range(0, 81, 8):
                root = 0.045 * update + 0.02 * seed * (update > 0)
                gold = 0.5 * root - root**2 / (4 * turn) - 2 + random.gauss(0, 0.03)
                values = [root**2, 0.9 * root + random.gauss(0, 0.05), gold, 0.2 + 0.1 * gold]
                rows.append([reward, seed, update, *(round(value, 4) for value in values)])
    write_csv(profile.sweeps / "metrics" / "overoptimisation.csv", "reward,seed,update,kl,proxy,gold,win", rows)


def write_credit(profile: Profile) -> None:
    """Weights on flawed tokens: near chance under sequence rewards, well above under token rewards."""
    rows = []
    for reward, share in (("rm_preference", 0.24), ("rm_edit", 0.26), ("rm_token", 0.41)):
        for seed in profile.seeds:
            for index in range(8):
                flawed, tokens = 4 + index % 3, 20 + index
                rows.append(
                    [reward, seed, f"v{index}", flawed, tokens, round(tokens * (share + 0.01 * seed), 4), tokens]
                )
    header = "reward,seed,id,flawed_tokens,tokens,weight_flawed,weight_total"
    write_csv(profile.results / "metrics" / "credit.csv", header, rows)


def write_rejudged(profile: Profile, judge: str, prompts: int) -> None:
    """Verdicts of another judge, more doubtful than the main one's, and what it says of people's preferences."""
    rows = []
    for method, skill in METHODS.items():
        random = Random(f"{judge} {method}")
        for seed in profile.seeds:
            for index in range(prompts):
                score = round(random.gauss(0.25 + skill / 2, 0.3), 4)
                rows.append([method, f"test-{index}", seed, score, 0.5, float(score > 0.5)])
    folder, random = profile.results / "metrics" / "judges", Random(judge)
    write_csv(folder / f"{judge}.csv", "method,id,seed,score,reference_score,win", rows)
    pairs = [[f"pair-{index}", float(random.random() < 0.6), float(random.random() < 0.8)] for index in range(prompts)]
    write_csv(folder / f"{judge}_preferences.csv", "id,correct,main_correct", pairs)


def write_judged(profile: Profile, method: str, skill: float, prompts: int, folder: str = "judged") -> None:
    """Judged samples of one method or variant whose win rate is about ``skill``."""
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
    write_csv(profile.results / "metrics" / folder / f"{method}.csv", JUDGED, rows)


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
        "intervals": {"precision": [0.85, 0.89], "recall": [0.7, 0.76]},
        "by_type": {
            kind: {"recall": 0.6 + 0.05 * index, "share_of_labels": 0.2, "tokens": 300 - 40 * index}
            for index, kind in enumerate(kinds)
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
    of_tokens = [
        ["rm_token", metric, value - 0.05, value + 0.05]
        for metric, value in accuracy["rm_token"].items()
        if metric.startswith("token_")
    ]
    write_csv(profile.results / "metrics" / "token_intervals.csv", "model,metric,low,high", of_tokens)
    write_reward_pairs(
        profile,
        {
            (model, metric): [[random.random() < value for _ in range(40)] for _ in profile.seeds]
            for model, metrics in accuracy.items()
            for metric, value in metrics.items()
            if metric.startswith("accuracy_")
        },
    )


def write_reward_pairs(profile: Profile, correct: dict[tuple[str, str], list]) -> None:
    """Whether models rank pairs rightly, ``correct[model, metric][seed place][pair]``."""
    rows = [
        [model, metric, seed, f"pair-{pair}", f"pair-{pair}", float(value)]
        for (model, metric), by_seed in correct.items()
        for seed, values in zip(profile.seeds, by_seed, strict=True)
        for pair, value in enumerate(values)
    ]
    write_csv(profile.results / "metrics" / "reward_pairs.csv", "model,metric,seed,id,prompt,correct", rows)


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
