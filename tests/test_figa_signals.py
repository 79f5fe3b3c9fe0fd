"""FIGA's signals and data options: labels, scales and rows by hand, equivalences between signals, and errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from fgalign.config import Profile, parse_section
from fgalign.context import Context
from fgalign.core.modeling import RuntimeConfig
from fgalign.core.schema import Demonstration, Edit, Prompt, write_records
from fgalign.core.tokens import encode_response, token_texts
from fgalign.errors import ConfigError, InputError, TrainingError
from fgalign.labels import LabelConfig, label_bag_of_words, label_by_unit, label_edit, label_edits
from fgalign.losses.figa import difference_scales, figa_loss, scored_labels
from fgalign.methods import figa
from fgalign.methods.figa import Config, FIGACollator, chosen_pairs, reference_pairs, training_rows

EDITS = [
    ("where is the cat?", "the cat sat on the log", "the cat sat on the mat"),
    ("who?", "a dog", "a cat and a dog"),
    ("what is red?", "the mat and the log are red", "the mat is red"),
    ("say it", "the dog is the dog", "the dog is here"),
]


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=tolerance)


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("initial", "revised", "expected"),
    [
        ([5, 6, 7, 5], [6, 8, 6, 8, 9], ([-1, 0, -1, -1], [0, 1, 0, 1, 1])),
        # What both sides hold is neutral, however often and in whatever order; Levenshtein labels all three.
        ([5, 6], [6, 5, 5], ([0, 0], [0, 0, 0])),
        ([5], [6], ([-1], [1])),
        ([5], [5, 5], ([0], [0, 0])),
    ],
)
def test_bag_of_words(initial, revised, expected):
    assert label_bag_of_words(initial, revised) == expected
    assert label_edit([5, 6], [6, 5, 5])[:2] != ([0, 0], [0, 0, 0])


def test_unit(tokenizer):
    edits = [Edit(id=str(n), prompt=p, initial=i, revised=r) for n, (p, i, r) in enumerate(EDITS)]
    found = {}
    for unit in ("token", "word"):
        for edit, pair in zip(edits, label_edits(tokenizer, edits, LabelConfig(unit=unit)), strict=True):
            labels = label_by_unit(tokenizer, pair.initial_ids, pair.revised_ids, unit)
            assert (labels.initial, labels.revised) == (pair.initial_labels, pair.revised_labels)
            found[unit, edit.id] = labels
    # "log" and "mat" share no letter's token but the space: by word it belongs to the word.
    initial = encode_response(tokenizer, EDITS[0][1])
    texts = token_texts(tokenizer, initial)
    bad = "".join(text for text, label in zip(texts, found["word", "0"].initial, strict=True) if label)
    assert bad.strip() == "log"
    # "sat on the mat" to "sat on the map" would keep "ma" by token; here a word that is half kept is labelled whole.
    a, b = encode_response(tokenizer, "the mat"), encode_response(tokenizer, "the mats")
    assert sum(label_by_unit(tokenizer, a, b, "word").revised) > sum(label_by_unit(tokenizer, a, b, "token").revised)


def test_words_of_a_tokenizer_whose_decoder_drops_the_first_space():
    """LLaMA's: alone, each of its tokens decodes without the space before it, and all words would be one."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", *"▁Theyservlousf.a", "▁They", "▁serve", "▁lous", "y", "▁food", "▁fine", "▁a"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.Unigram([(piece, -1.0 if len(piece) > 1 else -9.0) for piece in vocabulary], unk_id=0))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    llama = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    ids = encode_response(llama, "They serve lousy food.")
    assert [llama.convert_ids_to_tokens(token) for token in ids[:4]] == ["▁They", "▁serve", "▁lous", "y"]
    assert llama.decode(ids[1:2]) == "serve"
    assert token_texts(llama, ids) == [" They", " serve", " lous", "y", " food", ".", "</s>"]
    assert token_texts(llama, ids, skip_special_tokens=True)[-1] == ""
    labels = label_by_unit(llama, ids, encode_response(llama, "They serve fine food."), "word")
    assert labels.initial == [0, 0, -1, -1, 0, 0, 0] and labels.revised == [0, 0, 1, 0, 0, 0]


# --- pure functions ---------------------------------------------------------------------------------------------------


def test_scored_labels():
    rewards = tensor([[0.5, -0.25, 0.0, 0.75]])
    end = tensor([[False, False, False, True]])
    labels, scales = scored_labels(rewards, end, 1)
    assert labels.tolist() == [[1, 0, 0, 0]]  # the collator makes the end token good
    close(scales, [[0.5, 1.0, 1.0, 1.0]])
    labels, scales = scored_labels(rewards, ~end, -1)
    assert labels.tolist() == [[0, 0, 0, 0]]
    labels, scales = scored_labels(-rewards, end, -1)
    assert labels.tolist() == [[-1, 0, 0, 0]]
    close(scales, [[0.5, 1.0, 1.0, 1.0]])


def test_difference_scales():
    # Gains 3, 0 (not -1), 0, 1, mean 1; and twice as large ones give the same factors.
    initial, revised = tensor([0.0, 1.0, 2.0, 0.0]), tensor([3.0, 0.0, 2.0, 1.0])
    close(difference_scales(initial, revised), [3.0, 0.0, 0.0, 1.0])
    close(difference_scales(2 * initial, 2 * revised), [3.0, 0.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="reward differences of 2 pairs: expected some above 0, found none"):
        difference_scales(tensor([1.0, 2.0]), tensor([1.0, 1.5]))


ROWS = [
    {
        "id": "a", "prompt_ids": [5, 6], "initial_ids": [7, 8, 1], "initial_labels": [-1, -1, 0],
        "revised_ids": [9, 10, 1], "revised_labels": [1, 0, 0],
        "initial_scales": [0.5, 0.25, 1.0], "revised_scales": [0.75, 1.0, 1.0],
    },
    {
        "id": "b", "prompt_ids": [5], "initial_ids": [7, 1], "initial_labels": [0, 0],
        "revised_ids": [9, 1], "revised_labels": [1, 1], "initial_scales": [2.0, 2.0], "revised_scales": [3.0, 3.0],
    },
]  # fmt: skip


def test_collator_multiplies_the_scales():
    batch = FIGACollator(pad_token_id=0, eos_token_id=1, max_length=5, alpha=2.0, beta=0.5, gamma=0.25)(ROWS)
    assert batch["weights"].tolist() == [
        [0.0, 1.5, 0.25, 2.0],  # 2 * 0.75, gamma, the end token
        [6.0, 6.0, 0.0, 0.0],  # 2 * 3
        [0.0, -0.25, -0.125, 0.0],  # -0.5 * 0.5, -0.5 * 0.25, the end token
        [0.0, 0.0, 0.0, 0.0],
    ]
    assert batch["weights"].dtype == torch.float32
    # -(weight * logp) / number of weighted tokens, with logp -1 everywhere: (1.5 + 0.25 + 2 + 12 - 0.375) / 7.
    loss = figa_loss(-torch.ones(4, 4), batch["weights"], threshold=None)
    close(loss.loss, 15.375 / 7)


# --- rows of each signal ----------------------------------------------------------------------------------------------


def config(**options):
    return Config(**{"kind": "figa", "needs": "rm_preference", "optim": {"learning_rate": 0.1}, **options})


@pytest.fixture
def context(make_model, tokenizer, tmp_path):
    """A training stage after the labels, whose base and SFT model is a random one."""
    profile = Profile("t", tmp_path, {"seeds": [1]}, tmp_path / "params.yaml")
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = make_model(vocab_size=len(tokenizer), **special)
    for folder in (profile.model_folder("base"), profile.model_folder("sft", 1)):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for name, kind, outputs in (("rm_preference", "sequence", 1), ("rm_token", "token", 3)):
        reward_model = make_model(3, kind, vocab_size=len(tokenizer), num_labels=outputs, **special)
        reward_model.save_pretrained(profile.model_folder(name, 1))
    edits = [Edit(id=f"p-{n}", prompt=p, initial=i, revised=r) for n, (p, i, r) in enumerate(EDITS)]
    write_records(profile.data / "labels" / "train.jsonl", label_edits(tokenizer, edits, LabelConfig()))
    folder = profile.data / "raw" / "train"
    for name in ("corpus", "demonstrations", "preferences", "corrections"):
        write_records(folder / f"{name}.jsonl", [])
    write_records(folder / "prompts.jsonl", [Prompt(id="p", prompt="who?")])
    return Context(profile, "figa_x", 1, torch.device("cpu"), RuntimeConfig(), tmp_path / "out")


def collated(rows, tokenizer, **options):
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    values = {"max_length": 512, "alpha": 1.0, "beta": 0.5, "gamma": 0.0, **options}
    return FIGACollator(**ids, **values)(rows)


def test_default_rows_are_the_pairs(context):
    pairs = context.labelled("train")
    assert training_rows(pairs, None, context, config()) == [pair.model_dump() for pair in pairs]
    assert training_rows(pairs, None, context, config(unit="token")) == [pair.model_dump() for pair in pairs]


def test_rows_by_word_and_bag(context, tokenizer):
    pairs = context.labelled("train")
    by_word = training_rows(pairs, None, context, config(unit="word"))
    bag = training_rows(pairs, None, context, config(signal="bag_of_words"))
    for pair, word_row, bag_row in zip(pairs, by_word, bag, strict=True):
        labels = label_by_unit(tokenizer, pair.initial_ids, pair.revised_ids, "word")
        assert (word_row["initial_labels"], word_row["revised_labels"]) == (labels.initial, labels.revised)
        expected = label_bag_of_words(pair.initial_ids, pair.revised_ids)
        assert (bag_row["initial_labels"], bag_row["revised_labels"]) == expected
        assert word_row.keys() == bag_row.keys() == pair.model_dump().keys()


def test_rows_with_a_constant(context, tokenizer):
    pairs = context.labelled("train")
    rows = training_rows(pairs, None, context, config(signal="constant"))
    weights = collated(rows, tokenizer, alpha=2.0, beta=0.25)["weights"]
    for row, pair in enumerate(pairs):
        start = len(pair.prompt_ids) - 1
        revised, initial = len(pair.revised_ids), len(pair.initial_ids)
        assert weights[row].tolist()[start : start + revised] == [2.0] * revised
        # All but the end token.
        assert weights[row + 4].tolist()[start : start + initial] == [-0.25] * (initial - 1) + [0.0]
        assert weights[row, :start].abs().sum() == 0 and weights[row, start + revised :].abs().sum() == 0


def test_rows_by_reward_difference(context, tokenizer):
    pairs = context.labelled("train")
    rewards = tensor([0.0, 1.0, 0.0, 2.0]), tensor([3.0, 0.5, 0.0, 3.0])  # gains 3, 0, 0, 1: factors 3, 0, 0, 1
    rows = training_rows(pairs, rewards, context, config(signal="reward_difference"))
    constant = training_rows(pairs, None, context, config(signal="constant"))
    weights, plain = (collated(some, tokenizer)["weights"] for some in (rows, constant))
    close(weights, tensor([3.0, 0.0, 0.0, 1.0] * 2)[:, None] * plain)
    # Equal differences are the constant signal.
    equal = training_rows(pairs, (torch.zeros(4), torch.full((4,), 0.3)), context, config(signal="reward_difference"))
    close(collated(equal, tokenizer)["weights"], plain)
    with pytest.raises(TrainingError, match=r"methods\.figa_x\.signal: reward differences of 4 pairs: expected some"):
        training_rows(pairs, (torch.ones(4), torch.zeros(4)), context, config(signal="reward_difference"))


def test_rows_by_reward_model(context, tokenizer):
    """Weights are alpha max(r, 0) and -beta max(-r, 0) with the rewards of the model on disk, computed pair by pair."""
    from fgalign.core.modeling import load_token_reward_model

    pairs = context.labelled("train")
    rows = training_rows(pairs, None, context, config(signal="reward_model", scorer="rm_token", score_batch_size=3))
    weights = collated(rows, tokenizer, alpha=2.0, beta=0.5)["weights"]
    model = load_token_reward_model(context.model("rm_token")).eval()
    signs = set()
    for side, sign, factor, first in (("revised", 1, 2.0, 0), ("initial", -1, 0.5, len(pairs))):
        for row, pair in enumerate(pairs):
            ids = getattr(pair, f"{side}_ids")
            chances = model(input_ids=tensor([pair.prompt_ids + ids])).logits[0].softmax(-1)[len(pair.prompt_ids) :]
            rewards = (chances[:, 2] - chances[:, 0]).tolist()
            signs |= {reward > 0 for reward in rewards}
            expected = [sign * factor * max(sign * reward, 0.0) for reward in rewards]
            expected[-1] = 2.0 if side == "revised" else 0.0
            start = len(pair.prompt_ids) - 1
            close(weights[first + row, start : start + len(ids)], expected, 1e-5)
            assert weights[first + row, start + len(ids) :].abs().sum() == 0
    assert signs == {True, False}


def test_rewards_equal_to_the_labels_are_the_levenshtein_signal(context, tokenizer, monkeypatch):
    pairs = context.labelled("train")
    marked = {
        (tuple(pair.prompt_ids), tuple(ids)): labels
        for pair in pairs
        for ids, labels in ((pair.initial_ids, pair.initial_labels), (pair.revised_ids, pair.revised_labels))
    }

    def reward(rollout):
        out = torch.zeros(rollout.response_ids.shape)
        for row, ids in enumerate(rollout.response_lists()):
            prompt = tuple(rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist())
            out[row, : len(ids)] = tensor(marked[prompt, tuple(ids)], dtype=torch.float32)
        return out

    monkeypatch.setattr("fgalign.rewards.load_reward", lambda *arguments: reward)
    scored = training_rows(pairs, None, context, config(signal="reward_model", scorer="rm_token"))
    plain = training_rows(pairs, None, context, config())
    for gamma in (0.0, 0.1):
        weights = [collated(rows, tokenizer, gamma=gamma)["weights"] for rows in (scored, plain)]
        close(weights[0], weights[1], 0)


def test_scorer_of_the_wrong_level(context):
    with pytest.raises(ConfigError, match=r"methods\.figa_x\.scorer: expected a token-level .*, found 'rm_preference'"):
        training_rows(context.labelled("train"), None, context, config(signal="reward_model", scorer="rm_preference"))


# --- data options -----------------------------------------------------------------------------------------------------


def write_references(context, answers):
    records = [Demonstration(id=f"p-{n}", prompt="who?", completion=text) for n, text in answers.items()]
    write_records(context.profile.data / "raw" / "train" / "references.jsonl", records)


def test_reference_answers(context, tokenizer):
    pairs = context.labelled("train")
    answers = {0: "the mat", 1: "a dog", 2: "red", 3: "the dog is brown"}
    write_references(context, answers)
    found = reference_pairs(pairs, context, config(response="reference"))
    # The reference of the second is its initial response: nothing to label.
    assert [pair.id for pair in found] == ["p-0", "p-2", "p-3"]
    for pair, number in zip(found, (0, 2, 3), strict=True):
        ids = encode_response(tokenizer, answers[number])
        labels = label_edit(pairs[number].initial_ids, ids)
        assert (pair.revised_ids, pair.initial_ids) == (ids, pairs[number].initial_ids)
        assert (pair.initial_labels, pair.revised_labels) == (labels.initial, labels.revised)
        assert pair.prompt_ids == pairs[number].prompt_ids
    assert training_rows(found, None, context, config(response="reference")) == [pair.model_dump() for pair in found]
    by_word = reference_pairs(pairs, context, config(response="reference", unit="word"))
    for pair in by_word:
        labels = label_by_unit(tokenizer, pair.initial_ids, pair.revised_ids, "word")
        assert (pair.initial_labels, pair.revised_labels) == (labels.initial, labels.revised)


def test_profile_without_references(context):
    pairs = context.labelled("train")
    message = r"methods\.figa_x\.response: 'reference' needs raw/train/references\.jsonl, which this profile does not"
    with pytest.raises(InputError, match=message):
        reference_pairs(pairs, context, config(response="reference"))
    write_references(context, {0: "red", 1: "brown", 3: "red"})
    with pytest.raises(InputError, match="expected a reference answer with the id of every edit, found none for 'p-2'"):
        reference_pairs(pairs, context, config(response="reference"))


def test_chosen_pairs():
    rewards = tensor([0.0, 1.0, 0.0, 0.0, 0.0]), tensor([1.0, 0.0, 2.0, 0.0, 1.0])
    gain = {"unit": "raw", "eta3": 0.0}
    assert chosen_pairs(5, None, config(), "x") == [0, 1, 2, 3, 4]
    assert chosen_pairs(5, None, config(pairs=2), "x") == [0, 1]
    assert chosen_pairs(5, rewards, config(filter=gain), "x") == [0, 2, 4]
    assert chosen_pairs(5, rewards, config(filter=gain, pairs=2), "x") == [0, 2]
    assert chosen_pairs(5, rewards, config(filter=gain, pairs=3), "x") == [0, 2, 4]
    with pytest.raises(TrainingError, match=r"methods\.x\.pairs: expected at least 4 pairs after .*, found 3 of 5"):
        chosen_pairs(5, rewards, config(filter=gain, pairs=4), "x")
    with pytest.raises(TrainingError, match=r"methods\.x\.filter keeps none of 5 pairs; lower its thresholds"):
        chosen_pairs(5, rewards, config(filter={"unit": "raw", "eta3": 9.0}), "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"unit": "word", "signal": "constant"},
            "unit: expected only with signal levenshtein, found 'word' with c",
        ),
        ({"signal": "reward_model"}, "scorer: expected a token-level reward model .*found None with reward_model"),
        ({"scorer": "rm_token"}, "scorer: expected .*found 'rm_token' with levenshtein"),
        ({"signal": "llm"}, r"x\.signal: Input should be 'levenshtein', 'bag_of_words'.*found 'llm'"),
        ({"pairs": 0}, r"x\.pairs: .*greater than or equal to 1.*found 0"),
        ({"response": "initial"}, r"x\.response: .*'revised' or 'reference'"),
    ],
)
def test_bad_options(options, message):
    section = {"kind": "figa", "needs": "rm_preference", "optim": {"learning_rate": 0.1}, **options}
    with pytest.raises(ConfigError, match=message):
        parse_section(section, Config, "x")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unit": "word"},
        {"signal": "bag_of_words"},
        {"signal": "constant"},
        {"signal": "reward_model", "scorer": "rm_token"},
        {"signal": "reward_difference"},
        {"signal": "reward_difference", "filter": "better half"},
        {"response": "reference", "pairs": 2},
    ],
)
def test_run(context, tokenizer, monkeypatch, options):
    """The whole method: the rows and scores that reach the trainer are those of the functions tested above."""
    seen, logged = {}, {}

    def train(trainer, run, title, *rest):
        seen["rows"] = list(trainer.train_dataset)
        seen["loss"] = trainer.loss(trainer.model, trainer.data_collator(seen["rows"])).loss.item()
        trainer.train()
        return {}

    monkeypatch.setattr(figa, "train", train)
    monkeypatch.setattr(context.run, "log", logged.update)
    write_references(context, {0: "the mat", 1: "a dog", 2: "red", 3: "the dog is brown"})
    optim = {"learning_rate": 0.1, "max_steps": 1}
    initial, revised = figa.pair_rewards(context.labelled("train"), context, config())
    if "filter" in options:
        middle = (revised - initial).sort().values[1:3].mean().item()
        options = {**options, "filter": {"unit": "raw", "eta3": middle}}
    chosen = config(optim=optim, threshold=None, **options)
    figa.run(context, chosen)
    pairs = context.labelled("train")
    if chosen.response == "reference":
        pairs = reference_pairs(pairs, context, chosen)[:2]
    if chosen.filter:
        kept = (revised - initial > chosen.filter.eta3).nonzero().squeeze(-1).tolist()
        pairs, initial, revised = [pairs[index] for index in kept], initial[kept], revised[kept]
    rows = training_rows(pairs, (initial, revised), context, chosen)
    assert seen["rows"] == rows
    assert logged["pairs"] == 4 and logged["pairs_kept"] == len(rows)
    assert len(rows) == (4 if chosen.filter is None and chosen.pairs is None else 2)
    assert math.isfinite(seen["loss"]) and (context.out / "model.safetensors").exists()
