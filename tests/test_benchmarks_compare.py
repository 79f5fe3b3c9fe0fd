"""``benchmarks/compare.py``: medians and ratios by hand, both sides really get the same work, a quick run of it all.

No timing is asserted.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def compare():
    """The script, which also puts the folder of ``speed`` on the path."""
    spec = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


@pytest.fixture(scope="module")
def table(compare):
    from speed import table

    return table


def test_a_row_has_medians_and_ratios_of_the_same_round(table):
    found = table.row("a", "b", "time", "s", [2.0, 4.0, 9.0], [1.0, 4.0, 3.0], table.Target(">=", 2.0), "n")
    # Ratios 2, 1, 3. The ratio of the medians, 4 / 3, is another number.
    assert (found.ours, found.other, found.ratio, found.ratio_low, found.ratio_high) == (4.0, 3.0, 2.0, 1.0, 3.0)
    assert (found.rounds, found.target, found.met, found.note) == (3, ">= 2", "yes", "n")
    even = table.row("a", "b", "time", "s", [1.0, 2.0], [4.0, 2.0], table.Target("<=", 0.5))
    assert (even.ours, even.other, even.ratio, even.met) == (1.5, 3.0, 0.625, "no")
    assert table.row("a", "b", "time", "s", [1.0], [4.0]).met == ""
    for ours, other in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="a: expected as many rounds of both sides"):
            table.row("a", "b", "time", "s", ours, other)


@pytest.mark.parametrize(
    ("sign", "ratio", "met"), [(">=", 3.0, True), (">=", 2.999, False), ("<=", 3.0, True), ("<=", 3.001, False)]
)
def test_a_target_is_met_at_its_value(table, sign, ratio, met):
    assert table.Target(sign, 3.0).met(ratio) is met


def test_rows_survive_the_file_and_make_a_table(table, tmp_path):
    rows = [
        table.row("PPO", "TRL", "tokens", "1/s", [1234.0], [617.0], table.Target(">=", 3.0)),
        table.row("loss", "plain", "time", "ms", [0.05], [0.1]),
    ]
    table.write_rows(tmp_path / "table.csv", rows)
    assert table.read_rows(tmp_path / "table.csv") == rows
    assert table.markdown(rows).splitlines()[2:] == [
        "| PPO | tokens, 1/s | 1,234 | 617 (TRL) | 2.00 (2.00–2.00) | ≥ 3 | no |",
        "| loss | time, ms | 0.05 | 0.1 (plain) | 0.50 (0.50–0.50) | — | — |",
    ]


def test_sides_take_turns_and_the_warm_up_does_not_count(compare):
    from speed.gate import alternate

    calls = []

    class Side:
        def __init__(self, name):
            self.name, self.units = name, 0

        def unit(self):
            self.units += 1
            calls.append(self.name)
            return {"unit": self.units}

    answers = alternate({"a": Side("a"), "b": Side("b")}, rounds=3, warmup=1)
    assert "".join(calls) == "ba" + "ab" + "ba" + "ab"
    assert answers == {name: [{"unit": 2}, {"unit": 3}, {"unit": 4}] for name in "ab"}


SIDE = """
from speed.gate import serve

def side(options, gate):
    print("not an answer")
    gate.ready()
    for number in range(options["units"]):
        gate.done(tokens=options["first"] + number)
    raise ValueError("no more")

if __name__ == "__main__":
    serve(side)
"""


def test_a_side_in_a_process_of_its_own(compare, tmp_path, monkeypatch):
    from speed.gate import Process

    (tmp_path / "counting_side.py").write_text(SIDE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = [{"threads": 1, "device": "cpu", "first": first, "units": 2} for first in (0, 10)]
    side = Process(sys.executable, "counting_side", options, tmp_path / "log")
    assert side.start["peak_memory"] > 2**20
    first = side.unit()
    assert first["tokens"] == 0 and {"seconds", "cpu_seconds", "peak_memory"} < set(first)
    assert side.unit()["tokens"] == 1
    with pytest.raises(RuntimeError, match=r"ended with code 1:\n(.*\n)*ValueError: no more"):
        side.unit()
    assert "not an answer" in (tmp_path / "log").read_text()
    side = Process(sys.executable, "counting_side", options, tmp_path / "log")
    side.unit()
    assert side.next()["peak_memory"] > 2**20
    assert side.unit()["tokens"] == 10
    side.close()


def test_processor_seconds_replace_wall_time(compare):
    from speed.comparisons import per_second, processor_seconds

    found = processor_seconds({"seconds": 4.0, "cpu_seconds": 2.0, "rollout": 1.0, "tokens": 10})
    assert found == {"seconds": 2.0, "cpu_seconds": 2.0, "rollout": 0.5, "tokens": 10}
    assert per_second([found]) == [5.0]


def test_sft_sees_the_sequences_of_figa_in_the_same_batches(compare):
    from speed.pairs import PairWorkload, labelled_pairs, supervised_rows

    from fgalign.core.tensor_ops import pad
    from fgalign.methods.figa import FIGACollator

    workload = PairWorkload(pairs=5, batch=2, prompt_length=3, shortest=4, longest=9, edited=0.5, vocab_size=20)
    pairs = labelled_pairs(workload, 1)
    rows = supervised_rows(pairs, workload.batch)
    collator = FIGACollator(0, 1, max_length=99, alpha=1.0, beta=0.5, gamma=0.0)
    for start in range(0, 5, 2):
        batch = collator(pairs[start : start + 2])
        same = rows[2 * start : 2 * start + 4]
        assert torch.equal(batch["input_ids"], pad([row["input_ids"] for row in same], 0, side="right"))
        assert all(row["completion_mask"][:4] == [0, 0, 0, 1] for row in same)
    assert len(rows) == 10 and any(1 in pair["revised_labels"][:-1] for pair in pairs)


def test_edits_are_at_the_given_share(compare):
    from speed.pairs import edit

    response = list(range(2, 1002))
    assert edit(response, 0.0, 2000, random.Random(0)) == response
    kept = set(edit(response, 0.3, 10**9, random.Random(0))) & set(response)
    assert 0.75 < len(kept) / 1000 < 0.85  # a third of the edits keep the token and put another before it


def test_the_random_policy_ends_as_told_and_never_pads(compare):
    from speed.workload import EOS, PAD, PPOWorkload, random_policy

    workload = PPOWorkload(vocab_size=50, hidden_size=32, layers=2, heads=2, intermediate_size=64, end_probability=0.1)
    torch.manual_seed(0)
    ids = torch.randint(2, 50, (64, 10))
    with torch.no_grad():
        odds = random_policy(workload)(ids).logits.softmax(-1)
        none = random_policy(replace(workload, end_probability=0.0))(ids).logits.softmax(-1)
    assert 0.07 < float(odds[..., EOS].mean()) < 0.13
    assert float(odds[..., PAD].max()) < 1e-12 and float(none[..., EOS].max()) < 1e-12


def test_trl_environment_has_the_locked_packages_but_trl(compare):
    from speed.environment import constraints

    assert constraints("# head\nabsl-py==2\ntrl==1.16.0\ntorch==2.13.0\n") == "absl-py==2\ntorch==2.13.0\n"


def test_matrix_products_of_an_update_by_hand(compare):
    from speed.ppo_products import operations, products
    from speed.workload import PPOWorkload

    small = {"batch": 2, "minibatch": 1, "epochs": 1, "prompt_length": 3, "response_length": 2}
    model = {"vocab_size": 5, "hidden_size": 2, "layers": 1, "intermediate_size": 3}
    found = products(PPOWorkload(**small, **model), separate=False)
    assert found == {
        # Sampling: two prompts of 3 tokens, then one step of two rows; two tokens a response.
        (6, 2, 2): 4, (6, 2, 3): 2, (6, 3, 2): 1, (2, 2, 3): 2, (2, 3, 2): 1, (2, 2, 2): 4,
        # Scoring: two rows of 5 tokens through two models, logits of the responses from one.
        (10, 2, 2): 8, (10, 2, 3): 4, (10, 3, 2): 2, (4, 2, 5): 1,
        # Two steps of one row: forward, to the layer below (sizes turned round), to the weight.
        (5, 2, 2): 8 + 8, (5, 2, 3): 4 + 2, (5, 3, 2): 2 + 4, (2, 5, 3): 4, (3, 5, 2): 2, (2, 5, 2): 8 + 2,
        (2, 2, 5): 2 + 2 + 2,
    }  # fmt: skip
    # 34 weights in the layer: 38 tokens forward, 10 backward, which is twice a forward. 10 in the output: 12 and 4.
    assert operations(found) == 2 * 34 * (38 + 20) + 2 * 10 * (12 + 8)
    # A value model of its own: the layer at the 10 tokens whose old values it says, and three times at the 10 of the
    # update.
    other = operations(products(PPOWorkload(**small, **model), separate=True))
    assert other - operations(found) == 2 * 34 * (10 + 30)


@pytest.mark.parametrize("instructions", [["avx2"], ["avx2", "amx_bf16"]])
def test_bf16_is_measured_where_the_processor_has_matrix_units(compare, monkeypatch, tmp_path, instructions):
    from speed import comparisons

    class Canned(comparisons.Session):
        def run(self, folder, sides, warmup=None):
            unit = {"tokens": 6.0, "peak_memory": 2**20}
            bf16 = {"separate bf16": 0.5, "head bf16": 0.25}
            options = {name: own.get("config") for name, (_, own) in sides.items() if name in bf16}
            assert set(map(str, options.values())) <= {str({"compile": True, "bf16": True})}
            return {name: [{**unit, "seconds": bf16.get(name, 2.0)}] * 2 for name in sides}

    monkeypatch.setattr(comparisons, "describe", lambda threads: {"instructions": instructions})
    monkeypatch.setattr(comparisons, "write_workload", lambda folder, workload: None)
    rows = comparisons.ppo(Canned(tmp_path, trl_python=tmp_path))
    ratios = {row.comparison: (row.ratio, row.met) for row in rows if row.quantity == "response tokens"}
    found = {name: ratio for name, ratio in ratios.items() if "bf16" in name}
    expected = {
        "PPO, separate value model, compiled, bf16": (4.0, "yes"),
        "PPO, shared trunk, compiled, bf16": (8.0, "yes"),
    }
    assert found == (expected if "amx_bf16" in instructions else {})
    assert ratios["PPO, shared trunk, compiled"] == (1.0, "no")


def test_bounds_of_a_gpu_by_hand(compare, make_model):
    from speed.gpu import decode_bound, multiplying_weights, peaks, training_flops, utilisation
    from speed.workload import PPOWorkload

    assert training_flops(parameters=10, tokens=5) == 300
    assert decode_bound(weight_bytes=100, cache_bytes=10, rows=5, bandwidth=300) == 10
    assert peaks("NVIDIA H100 80GB HBM3") == (989e12, 3.35e12) and peaks("a toaster") is None
    assert [peaks(f"NVIDIA {name}")[1] for name in ("H200", "GH200 480GB", "A100-SXM4-80GB", "A100-SXM4-40GB")] == [
        4.8e12, 4.0e12, 1.935e12, 1.555e12,
    ]  # fmt: skip
    model = make_model()
    named = list(model.named_parameters())
    layers = sum(p.numel() for n, p in named if n.endswith("proj.weight"))
    assert multiplying_weights(model.config) == (layers, model.lm_head.weight.numel())
    config = SimpleNamespace(
        num_key_value_heads=1,
        num_attention_heads=2,
        hidden_size=4,
        num_hidden_layers=1,
        intermediate_size=2,
        vocab_size=3,
    )
    # Weights: 2 * 16 + 2 * 4 * 2 + 3 * 8 = 72 in the layer, 12 of the output. Two rows, of 4 tokens the layer sees all
    # and the output the last 3: 6 * (72 * 8 + 12 * 6) = 3,888, three epochs: 11,664.
    # Cache a row at 3 tokens: 2 (keys, values) * 2 bytes * 1 head * 2 * 3 tokens = 24. Bound: 2 * 216 / (168 + 48) = 2.
    workload = PPOWorkload(batch=2, epochs=3, prompt_length=2, response_length=2)
    seen = {"rollout/wall": 2.0, "rollout/products": 0.5, "rollout/attention": 0.25, "rollout/other": 0.25}
    seen |= {"update/wall": 1.0, "update/products": 0.25, "update/attention": 0.5, "update/other": 0.05}
    answers = [{"update": 1e-12, "tokens": 4, "rollout": 8.0}]
    update, decoding = utilisation(answers, seen, "ours", workload, config, 23328e12, 216.0)
    assert (update.ours, update.other, update.ratio) == (11664.0, 23328.0, 0.5)
    assert (decoding.ours, decoding.other, decoding.ratio) == (0.5, 2.0, 0.25)
    assert update.note == "busy 80% of a profiled run (products 25%, attention 50%, other 5%): limited by attention"
    assert decoding.note == (
        "busy 50% of a profiled run (products 25%, attention 12%, other 12%): limited by what the processor does "
        "between kernels"
    )


def test_what_an_update_spends_its_time_on(compare, tmp_path):
    from speed.gate import Thread
    from speed.ppo_own import side
    from speed.trace import seconds_by_kind
    from speed.workload import PPOWorkload, write_workload

    kernels = [("sm90_xmma_gemm_bf16", 3e6), ("flash_fwd_kernel", 1e6), ("nvjet_hsh_128x256", 2e6), ("softmax", 4e6)]
    assert seconds_by_kind(kernels) == {"attention": 1.0, "products": 5.0, "other": 4.0}
    small = PPOWorkload(batch=4, minibatch=2, epochs=1, prompt_length=4, response_length=4, vocab_size=40,
                        hidden_size=16, layers=1, heads=2, intermediate_size=16, prompts=8)  # fmt: skip
    write_workload(tmp_path, small)
    options = {"folder": str(tmp_path), "threads": 1, "device": "cpu", "value_model": "head", "level": "sequence"}
    runner = Thread(side, [{**options, "traced": True}])
    answer = runner.unit()
    runner.close()
    for part in ("rollout", "update"):
        kinds = [answer[f"{part}/{kind}"] for kind in ("products", "attention", "other")]
        assert min(kinds) > 0 and sum(kinds) <= answer[f"{part}/wall"] <= answer["seconds"]


def test_a_quick_run_writes_table_figure_and_machine(compare, table, tmp_path, capsys):
    from fgalign.io import read_json, write_json

    assert compare.main(["--quick", "--rounds", "2", "--out", str(tmp_path)]) == 0
    rows = table.read_rows(tmp_path / "table.csv")
    assert [(row.comparison, row.quantity) for row in rows] == [
        ("PPO, token-level rewards", "time"),
        ("PPO, token-level rewards", "peak memory"),
        ("FIGA training", "tokens"),
        ("FIGA training", "peak memory"),
        ("FIGA training, compiled", "tokens"),
        ("FIGA training, compiled", "peak memory"),
        ("FIGA masks, 2 pairs × 12", "time"),
        ("FIGA masks, 2 pairs × 12", "peak memory"),
        ("FIGA loss, 2 pairs × 12 × 40", "time"),
        ("FIGA loss, 2 pairs × 12 × 40", "peak memory"),
        ("Labelling, 8 tokens", "pairs"),
        ("Labelling, 8 tokens", "peak memory"),
    ]
    for row in rows:
        assert row.rounds == 2 and 0 < row.ratio_low <= row.ratio <= row.ratio_high
        if row.target and abs(row.ratio - float(row.target.split()[-1])) < 0.0006:
            continue  # the file has four digits of the ratio, ``met`` is from all of them
        assert row.met == ("" if not row.target else "yes" if eval(f"{row.ratio} {row.target}") else "no")
    assert capsys.readouterr().out.startswith(table.markdown(rows).split("\n")[0])
    points = (tmp_path / "growth.csv").read_text().splitlines()[1:]
    assert [line.split(",")[:3] for line in points[:2]] == [["response length", "2", s] for s in ("separate", "head")]
    assert len(points) == 12 and all((tmp_path / f"growth.{kind}").stat().st_size > 5000 for kind in ("png", "pdf"))
    machine = read_json(tmp_path / "hardware.json")
    assert machine["threads"] == 1 and machine["versions"]["fgalign"]["torch"] == version("torch")
    # One comparison again, into the same table: the other rows, growth and what is said of the machine stay.
    names = ("growth.csv", "hardware.json")
    before = [(tmp_path / name).read_bytes() for name in names]
    table.write_rows(tmp_path / "table.csv", [replace(row, note="old") for row in rows])
    again = ["--quick", "--rounds", "1", "--out", str(tmp_path), "--only", "figa_kernels"]
    assert compare.main(again) == 0
    mixed = table.read_rows(tmp_path / "table.csv")
    assert [(row.comparison, row.quantity) for row in mixed] == [(row.comparison, row.quantity) for row in rows]
    assert [row.note == "old" for row in mixed] == [True] * 6 + [False] * 4 + [True] * 2
    assert {row.rounds for row in mixed[6:10]} == {1}
    assert [(tmp_path / name).read_bytes() for name in names] == before
    # Rows of two machines make no table.
    write_json(tmp_path / "hardware.json", {**machine, "processor": "another"})
    with pytest.raises(SystemExit, match="processor: expected another, as for its other rows, found "):
        compare.main(again)
    assert table.read_rows(tmp_path / "table.csv") == mixed


def test_rows_of_a_comparison_take_the_place_of_its_old_ones(table):
    def rows(text):
        """``a1 a2``: two rows of comparison a."""
        return [table.row(name[0], "", name[1:], "", [1.0], [1.0]) for name in text.split()]

    def merged(old, new):
        return " ".join(f"{row.comparison}{row.quantity}" for row in table.merge(rows(old), rows(new)))

    assert merged("a1 a2 b1 c1", "b2 b3") == "a1 a2 b2 b3 c1"
    assert merged("a1 b1 a2 c1", "a3") == "a3 b1 c1"
    assert merged("a1 b1", "c1 a2 a3") == "a2 a3 b1 c1"
    assert merged("", "a1") == "a1" and merged("a1", "") == "a1"


def test_rows_of_sides_by_hand(compare, monkeypatch, tmp_path):
    from speed import comparisons
    from speed.pairs import PairWorkload

    mib = 2**20

    class Canned(comparisons.Session):
        def run(self, folder, sides, warmup=None):
            found = {"True": (0.5, 100), "False": (0.25, 400), comparisons.TRL_PPO: (8.0, 800), "head": (2.0, 600)}
            units = {}
            for name, (_, own) in sides.items():
                seconds, memory = found.get(name, (4.0, 200))
                units[name] = [{"seconds": seconds, "peak_memory": memory * mib, "times": own.get("times", 0)}] * 2
            return units

    monkeypatch.setattr(comparisons, "write_workload", lambda folder, workload: None)
    size = PairWorkload(pairs=6, batch=2, prompt_length=3, shortest=8, longest=8, vocab_size=40)
    session = Canned(tmp_path, trl_python=tmp_path, long_pairs=size, label_pairs=size)
    rows = [*comparisons.figa_kernels(session), *comparisons.labelling(session), *comparisons.ppo_ending(session)]
    found = [(row.comparison, row.quantity, row.unit, row.ours, row.other, row.ratio) for row in rows]
    ending = "PPO, responses that end,"
    assert found == [
        # 20 batches in 500 and in 250 ms.
        ("FIGA masks, 2 pairs × 12", "time", "ms", 25.0, 12.5, 2.0),
        ("FIGA masks, 2 pairs × 12", "peak memory", "MiB", 100.0, 400.0, 0.25),
        ("FIGA loss, 2 pairs × 12 × 40", "time", "ms", 500.0, 250.0, 2.0),
        ("FIGA loss, 2 pairs × 12 × 40", "peak memory", "MiB", 100.0, 400.0, 0.25),
        ("Labelling, 8 tokens", "pairs", "1/s", 12.0, 24.0, 0.5),
        ("Labelling, 8 tokens", "peak memory", "MiB", 100.0, 400.0, 0.25),
        (f"{ending} separate value model", "time", "s/update", 4.0, 8.0, 0.5),
        (f"{ending} separate value model", "peak memory", "MiB", 200.0, 800.0, 0.25),
        (f"{ending} separate value model, compiled", "time", "s/update", 4.0, 8.0, 0.5),
        (f"{ending} separate value model, compiled", "peak memory", "MiB", 200.0, 800.0, 0.25),
        (f"{ending} shared trunk", "time", "s/update", 2.0, 8.0, 0.25),
        (f"{ending} shared trunk", "peak memory", "MiB", 600.0, 800.0, 0.75),
        (f"{ending} shared trunk, compiled", "time", "s/update", 4.0, 8.0, 0.5),
        (f"{ending} shared trunk, compiled", "peak memory", "MiB", 200.0, 800.0, 0.25),
    ]


def test_memory_of_the_loss_is_that_of_its_logits(compare, tmp_path):
    from speed.comparisons import Session, kernel
    from speed.pairs import PairWorkload

    # 8 rows of at least 100 tokens, 20,000 logits each, in float32: 61 MiB. Cross-entropy has them and their gradient.
    workload = PairWorkload(pairs=4, batch=4, prompt_length=20, shortest=80, longest=80, vocab_size=20_000)
    figa, plain = (answers[0] for answers in kernel(Session(tmp_path, rounds=1), "loss", workload, 2))
    assert figa["times"] == plain["times"] == 2
    assert plain["peak_memory"] - figa["peak_memory"] > 61 * 2**20


def test_a_quick_run_is_kept_from_the_committed_results(compare, capsys):
    with pytest.raises(SystemExit):
        compare.arguments(["--quick", "--out", str(ROOT / "results" / "benchmarks")])
    assert "--quick: its numbers mean nothing" in capsys.readouterr().err
    assert compare.arguments(["--only", "figa", "--out", str(ROOT / "results" / "benchmarks")]).only == ["figa"]


@pytest.mark.parametrize("given", [["--rounds", "0"], ["--threads", "0"], ["--quick", "--only", "speed"]])
def test_what_cannot_be_measured_is_refused(compare, given):
    with pytest.raises(SystemExit) as stopped:
        compare.main(given)
    assert stopped.value.code != 0


def test_the_page_shows_the_committed_table(compare, table):
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    shown = text.split(compare.BEGIN)[1].split(compare.END)[0].strip("\n")
    rows = table.read_rows(ROOT / "results" / "benchmarks" / "table.csv")
    assert shown == table.markdown(rows).strip("\n"), "draw it again: python benchmarks/compare.py --render"
