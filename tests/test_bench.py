"""The benchmark harness: it refuses what is wrong, counts right, and says what it must."""

import json
import time

import pytest
import torch
from tiny import CONFIG, tiny

import fastweights as fw
from fastweights.benchmarks import bench, cases, decode, measure, passes, results
from fastweights.benchmarks.bed import ALL, Bed
from fastweights.benchmarks.cases import Case
from fastweights.benchmarks.measure import Ceiling, Check, Experiment, Trial
from fastweights.config import LlamaConfig


@pytest.fixture(autouse=True)
def never_disturbed(monkeypatch):
    monkeypatch.setattr(measure, "QUIET", float("inf"))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors: on a busy machine a second thread is only waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bed():
    # the check's tolerance is relative to the largest logit, so any scale of weights does
    return Bed(tiny(dtype=torch.float32), "tiny")


@pytest.fixture(scope="module")
def ceiling():
    return Ceiling(torch.device("cpu"), torch.float32, megabytes=1, size=64)


def run(case, bed, ceiling, repeats=2):
    return bench.run_case(case, bed, ceiling, repeats, seconds=0.0, patience=0.0)


def test_what_is_wrong_is_not_timed(bed, ceiling):
    runs = []
    trial = Trial("wrong", lambda: runs.append(1), bytes=1)

    def build(got):
        return lambda _: Experiment([trial], [Check("sums", lambda: got, lambda: torch.ones(3), 1e-5)], [])

    record = run(Case("c", "", build(torch.tensor([1.0, 1.0, 1.01]))), bed, ceiling)
    assert record["status"] == "refused"
    assert "sums: relative error 0.01" in record["reason"]
    assert not runs
    assert "trials" not in record
    for got in (torch.tensor([1.0, 1.0, float("nan")]), torch.ones(2)):
        assert run(Case("c", "", build(got)), bed, ceiling)["status"] == "refused"
    assert not runs
    assert run(Case("c", "", build(torch.ones(3))), bed, ceiling)["status"] == "measured"
    assert runs


def test_a_broken_model_is_refused(ceiling, monkeypatch):
    model = tiny(dtype=torch.float32)
    bed = Bed(model, "tiny")
    case = Case("prefill", "", lambda bed: passes.prefill(bed, tokens=12, count=2))
    assert run(case, bed, ceiling)["status"] == "measured"
    monkeypatch.setattr(fw.plastic.PlasticLinear, "_solve", lambda self, now, keys, a, *_: (a, a * 0))
    record = run(case, bed, ceiling)
    assert record["status"] == "refused"
    assert "one pass = its last" in record["reason"]
    assert not isinstance(model.model.layers[1].mlp.up_proj, fw.plastic.PlasticLinear)  # it is left frozen


def few_moments(bed):
    return passes.moments(bed, events=12, tokens=5, counts=(3, 6), budget_bytes=1 << 16)


def small_overflow(bed):
    return decode.overflow(bed, rank=8, context=24, folds=2)


def test_moments_are_timed_against_one_probe(bed, ceiling):
    record = run(Case("reads.moments", "", few_moments), bed, ceiling)
    assert record["status"] == "measured", record
    assert record["trials"].keys() == {"one probe", "3 moments", "6 moments", "matmul"}
    assert all("peak_bytes" in record["trials"][name] for name in ("one probe", "6 moments"))
    whole, each = record["ratios"]["6 moments ÷ one probe"], record["ratios"]["6 moments ÷ one probe ÷ 6"]
    assert whole["median"] == pytest.approx(6 * each["median"])
    assert any(line.startswith("6 moments ÷ one probe ÷ 6: ") for line in results.notes(record))


def test_moments_that_see_other_events_are_refused(bed, ceiling, monkeypatch):
    slot_weights = fw.Moment.slot_weights

    def off_by_one(self, log, site, row):
        return slot_weights(fw.Moment(events=self.events - 1), log, site, row)

    monkeypatch.setattr(fw.Moment, "slot_weights", off_by_one)
    record = run(Case("reads.moments", "", few_moments), bed, ceiling)
    assert record["status"] == "refused"
    assert "batched = token by token" in record["reason"]


def test_every_overflow_policy_is_timed_per_event(bed, ceiling):
    record = run(Case("decode.overflow", "", small_overflow), bed, ceiling)
    assert record["status"] == "measured", record
    assert record["trials"].keys() == {"frozen", "compress", "evict", "grow", "stream"}
    assert record["context"]["events"] == "16 to 32"  # 8 slots that are kept and 8 to fill: two folds
    assert record["ratios"].keys() == {"compress ÷ evict", *(f"{p} ÷ frozen" for p in ("compress", "evict", "grow"))}
    assert record["times"]["compress, slowest token"]["median"] > 0
    assert any(line.startswith("evict − frozen, an event of one linear: ") for line in results.notes(record))


def no_certificate(self, row):
    return 1e-9, 1e-9


def ring_too_small(self, event, slot=fw.state.slots.Slots.next):
    return event % (self.window - 1) if self.overflow == "evict" else slot(self, event)


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "reason"),
    [
        (fw.state.EventLog, "certificate", no_certificate, "≤ its certificate"),
        (fw.state.slots.Slots, "next", ring_too_small, "evict: "),
        (fw.state.EventLog, "all_alive", lambda self, tokens: True, "evict: "),
    ],
)
def test_an_overflow_that_is_wrong_is_refused(ceiling, monkeypatch, owner, name, wrong, reason):
    monkeypatch.setattr(owner, name, wrong)
    record = run(Case("decode.overflow", "", small_overflow), Bed(tiny(dtype=torch.float32), "tiny"), ceiling)
    assert record["status"] == "refused"
    assert reason in record["reason"]


def test_peak_memory_is_what_a_run_adds():
    held = torch.ones(250_000)
    trial = Trial("20 MB", lambda: [torch.ones(250_000) for _ in range(20)])
    peak = measure.peak_bytes(trial, held.device)
    assert peak is None or 19e6 < peak < 30e6


def test_counts_by_hand():
    # D 24, F 52, 4 layers, 4 heads of 6, 2 KV heads, vocabulary 61, untied
    config = LlamaConfig.from_dict(CONFIG, "tiny")
    layer = 24 * 24 + 2 * (24 * 12) + 24 * 24 + 3 * 24 * 52
    assert measure.linear_parameters(config) == 4 * layer + 61 * 24
    # every linear, 9 norms, one row of the embedding; keys and values of 10 tokens
    assert measure.decode_bytes(config, 4, 10) == 4 * (4 * layer + 61 * 24 + 9 * 24 + 24 + 2 * 4 * 2 * 6 * 10)
    # 3 tokens after 5: they see 6, 7 and 8; q·k and p·v of 4 heads of 6 in 4 layers
    assert measure.forward_flops(config, 3, 5) == 2 * 3 * 4 * layer + 2 * (2 * 4 * 4 * 6) * 21 + 2 * 61 * 24
    # 7 events: 7 rows of U and K read and one of each written, float32
    assert measure.plastic_decode_bytes(config, 2, ["gate_proj", "down_proj"], 7) == 2 * 2 * 4 * 8 * (24 + 52)
    # 5 tokens: 10 pairs; a Gram over D for gate and up together, one over F for down; outputs 52, 52, 24
    assert measure.plastic_prefill_flops(config, 3, ALL, 5) == 3 * 2 * 10 * (24 + 52 + 52 + 52 + 24)
    assert measure.plastic_prefill_flops(config, 1, ["up_proj"], 5) == 2 * 10 * (24 + 52)


def test_counted_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny(dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(5)[None])
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]  # not attention
    attention = 4 * 4 * (4 * 6) * (1 + 2 + 3 + 4 + 5)
    assert measure.forward_flops(model.config, 5, heads=5) == products + attention


@pytest.mark.parametrize(
    "build",
    [
        lambda bed: decode.frozen_decode(bed, context=10, steps=3),
        lambda bed: decode.plastic_decode(bed, rank=7, count=2, context=10, steps=3),
        lambda bed: passes.prefill(bed, tokens=9, count=2),
        lambda bed: passes.overflow(bed, tokens=40, rank=4),
    ],
)
def test_a_record_says_everything_and_the_page_shows_it(bed, ceiling, tmp_path, build):
    record = run(Case("decode.frozen", "about it", build), bed, ceiling)
    assert record["status"] == "measured", record
    run_facts = {"ceiling": ceiling.measure(1, measure.Patience(0.0)), **bench.where(bed)}
    record = json.loads(json.dumps({"case": "decode.frozen", **run_facts, **record}))
    assert {
        "device",
        "device_type",
        "dtype",
        "model",
        "threads",
        "commit",
        "versions",
        "ceiling",
        "time",
    } <= record.keys()
    assert {"context", "checks", "bars", "trials", "ratios", "repeats", "noise"} <= record.keys()
    assert record["versions"]["torch"] == torch.__version__
    assert record["trials"]["frozen"]["bytes"] > 0
    assert record["trials"]["frozen"]["seconds"].keys() == {"median", "min", "max"}
    assert f"share_of_{record['ceiling_trial']}" in record["trials"]["frozen"]
    assert record["ceiling"]["stream_GBps"] > 0
    assert record["ceiling"]["matmul_GFLOPs"] > 0

    page = tmp_path / "RESULTS.md"
    results.write_results(
        page, [record, {**record, "case": "surgery", "status": "unavailable", "reason": "no tokenizer"}]
    )
    later = {**record, "time": "9999", "commit": "another"}
    results.write_results(page, [later])  # the last run of a case replaces it, others stay
    text = page.read_text(encoding="utf-8")
    assert "### decode.frozen" in text
    assert "commit another" in text
    assert f"Not run again at another, the last commit run here:** surgery ({record['commit']})" in text
    assert "surgery (unavailable: no tokenizer)" in text
    assert "load (not run)" in text
    assert "no GPU has run this" in text
    assert len((tmp_path / "RESULTS.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_trials_alternate_and_preparation_is_off_the_clock():
    order = []

    def trial(name):
        return Trial(name, lambda: order.append(name), prepare=lambda: time.sleep(0.02))

    rounds, _ = measure.alternate([trial("a"), trial("b")], torch.device("cpu"), 2, 0.0, measure.Patience(0.0))
    assert "".join(order) == "ab" + "ab" + "ba"  # warm-up, then there and back
    assert len(rounds) == 2
    assert max(seconds for round_ in rounds for seconds in round_.values()) < 0.02


def test_a_disturbed_run_neither_meets_a_bar_nor_replaces_a_quiet_one(ceiling, bed, tmp_path, monkeypatch):
    build = lambda _: Experiment([Trial("a", lambda: None), Trial("b", lambda: None)], [], [("a", "b")], bars=bars)  # noqa: E731
    bars = {"a ÷ b": "≤ 1000000"}
    quiet = {"case": "x", **bench.where(bed), "ceiling": ceiling.measure(1, measure.Patience(0.0))}
    disturbed = {**quiet, **run(Case("x", "", build), bed, ceiling)}
    quiet = dict(disturbed)
    monkeypatch.setattr(measure, "QUIET", -1.0)
    disturbed |= run(Case("x", "", build), bed, ceiling)
    assert (quiet["status"], disturbed["status"]) == ("measured", "disturbed")
    assert any("met" in line for line in results.notes(quiet))
    assert not any("met" in line for line in results.notes(disturbed))
    page = tmp_path / "RESULTS.md"
    results.write_results(page, [quiet])
    results.write_results(page, [disturbed])
    assert "### x" in page.read_text(encoding="utf-8")
    assert "x (disturbed" in results.page([disturbed])


def test_cases_are_chosen_by_name_or_beginning():
    assert [case.name for case in bench.select(["decode.frozen"])] == ["decode.frozen"]
    assert len(bench.select(["prefill"])) == 4
    assert len(bench.select([])) == len(cases.CASES)
    with pytest.raises(ValueError, match=r"no case .nonsense.: there are decode"):
        bench.select(["nonsense"])


def test_a_bar_is_held_against_its_figure():
    ratio = {"median": 1.1, "min": 1.0, "max": 1.2}
    record = {"ratios": {"a ÷ b": ratio}, "trials": {"a": {"share_of_stream": {**ratio, "median": 0.7}}}}
    record["bars"] = {"a ÷ b": "≤ 1.05", "a share of stream": "≥ 80 %", "c ÷ d": "≤ 1"}
    assert results.verdict(record, "a ÷ b") == ("1.1", False)
    assert results.verdict(record, "a share of stream") == ("0.7", False)
    assert results.verdict(record, "c ÷ d") == ("not measured", None)


def test_the_list_needs_no_model(capsys):
    assert bench.main(["--list"]) == 0
    assert "decode.plastic.all-layers" in capsys.readouterr().out
