"""The benchmark harness: it refuses what is wrong, counts right, and says what it must."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from tiny import CONFIG, tiny

import fastweights as fw
from fastweights.__main__ import main
from fastweights.benchmarks import (
    bench,
    cases,
    check,
    decode,
    measure,
    passes,
    profiles,
    results,
    shapes,
    suite,
    whole,
)
from fastweights.benchmarks import record as records
from fastweights.benchmarks.bed import Bed, byte_tokenizer
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
    return records.run_case(case, bed, ceiling, repeats, seconds=0.0, patience=0.0)


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
    return passes.moments(bed, events=12, tokens=5, counts=(3, 6), max_bytes=1 << 20)


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
    every = tuple(config.family.linears)
    assert measure.plastic_prefill_flops(config, 3, every, 5) == 3 * 2 * 10 * (24 + 52 + 52 + 52 + 24)
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
    run_facts = {"ceiling": ceiling.measure(1, measure.Patience(0.0)), **records.where(bed)}
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
    quiet = {"case": "x", **records.where(bed), "ceiling": ceiling.measure(1, measure.Patience(0.0))}
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
    assert [case.name for case in records.select(["decode.frozen"])] == ["decode.frozen"]
    assert len(records.select(["prefill"])) == 4
    assert len(records.select([])) == len(cases.CASES)
    with pytest.raises(ValueError, match=r"no case .nonsense.: there are decode"):
        records.select(["nonsense"])


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


# ---- what a GPU is measured with

EACH = {f"{kind}, {rows} rows" for kind in ("frozen", "plastic") for rows in (1, 3)}


@pytest.mark.parametrize(
    ("build", "trials"),
    [
        (lambda bed: shapes.behind(bed, contexts=(20, 40), steps=2), {"behind 256", "behind 20", "behind 40"}),
        (lambda bed: shapes.rows(bed, (1, 3), rank=10, context=20), EACH),
        (lambda bed: shapes.short(bed, (1, 4)), {"1 tokens", "4 tokens", "transformers, 1", "transformers, 4"}),
        (lambda bed: shapes.gradient(bed, tokens=4, context=9), {"frozen", "gradient ascent"}),
    ],
    ids=["behind", "rows", "short", "gradient"],
)
def test_shapes_that_share_the_weights_are_checked_and_timed(build, trials, ceiling):
    bed = Bed(tiny(dtype=torch.float32, max_position_embeddings=300), "tiny")
    record = run(Case("c", "", build), bed, ceiling, repeats=1)
    assert record["status"] == "measured", record
    assert record["trials"].keys() == {*trials, "stream"}
    assert len(record["checks"]) >= len(trials) // 2
    assert not fw.plastic.plastic_linears(bed.model)


def test_rows_that_are_not_as_if_alone_are_refused(ceiling, monkeypatch):
    monkeypatch.setattr(shapes, "_alone", lambda bed, tokens, *_: torch.ones(1, bed.config.vocab_size))
    record = run(Case("c", "", lambda bed: shapes.rows(bed, (2,), 10, 20)), Bed(tiny(torch.float32), "tiny"), ceiling)
    assert record["status"] == "refused"
    assert "2 rows: the first and last = alone" in record["reason"]


def test_the_experiment_runs_on_random_weights_and_leaves_the_peer_as_it_was(ceiling):
    model = tiny(dtype=torch.float32, vocab_size=512)
    bed = Bed(model, "tiny", byte_tokenizer(512))
    assert bed.tokenizer.decode(bed.tokenizer.encode("Größe (A)")) == "Größe (A)"
    record = run(Case("surgery", "", lambda bed: whole.surgery(bed, 6, 4)), bed, ceiling, repeats=1)
    assert record["status"] == "measured", record
    assert (record["context"]["context"], record["context"]["probe tokens"], record["context"]["probes"]) == (5, 4, 6)
    ours, theirs = model.state_dict(), bed.peer.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_overlapping_kernels_count_once():
    assert profiles.covered([(0, 2), (1, 4), (3, 3.5), (6, 7)]) == 5
    assert profiles.covered([]) == 0


def test_a_profile_says_how_long_the_device_works_and_waits(ceiling):
    bed = Bed(tiny(dtype=torch.float32), "tiny")
    case = Case("profile", "about", measure=lambda bed: profiles.frozen_decode(bed, context=5, steps=2))
    record = {"case": "profile", **records.where(bed), "ceiling": ceiling.measure(1, measure.Patience(0.0))}
    record |= run(case, bed, ceiling)
    wall, busy, waits = (record["trials"][n]["seconds"]["median"] for n in ("wall", "on the device", "waiting"))
    assert wall == pytest.approx(busy + waits)
    assert record["context"]["kernels"] > 10
    assert any("aten::" in line for line in results.notes(record))
    assert "on the device ÷ wall" in results.page([record])


def test_a_bar_may_be_a_time():
    record = {"ratios": {}, "trials": {"8 tokens": {"seconds": {"median": 0.0071}}}, "bars": {"8 tokens": "≤ 6 ms"}}
    assert results.verdict(record, "8 tokens") == ("7.1 ms", False)


def plain(name, build, seconds=0.0):
    return check.Item("tiny", Case(name, name, build), seconds, 1)


def one():
    return torch.ones(1)


def good(bed):
    return Experiment([Trial("run", lambda: None)], [Check("sums", one, one, 0)], [])


def made(folder, ceiling, minutes=5.0, again=lambda: None, resume=False):
    made = check.Check(torch.device("cpu"), torch.float32, folder, minutes, again, resume, seconds=0.0)
    made.ceiling, made.found = ceiling, ceiling.measure(1, measure.Patience(0.0))
    return made


def statuses(run):
    return {e["step"]: e["status"] for e in run.journal.entries if "status" in e}


def test_a_check_goes_on_after_what_crashes_is_wrong_or_takes_too_long(ceiling, tmp_path, capsys, monkeypatch):
    def crash(bed):
        fw.attach(bed.model, [1], fw.Hebbian())
        raise RuntimeError("CUDA error: an\nillegal access")

    def wrong(bed):
        return Experiment([], [Check("sums", one, lambda: torch.zeros(1), 0.1)], [])

    def slow(bed):
        time.sleep(60)

    items = [plain("crash", crash), plain("wrong", wrong), plain("slow", slow), plain("late", good, 1e6)]
    monkeypatch.setattr(check, "limited", lambda seconds, hung, limited=check.limited: limited(3.0, hung))
    run = made(tmp_path, ceiling)
    run.items([*items, plain("good", good)])
    found = statuses(run)
    assert found == {
        "tiny/crash": "crashed",
        "tiny/wrong": "refused",
        "tiny/slow": "crashed",
        "tiny/late": "skipped",
        "tiny/good": "measured",
    }
    lines, whole = check.report(run)
    assert "skipped for time: tiny/late" in lines
    assert "crashed: tiny/crash: RuntimeError: CUDA error: an illegal access" in lines
    assert whole["skipped"] == ["tiny/late"]
    assert whole["cases"].keys() == {"tiny/good"}
    assert json.loads(json.dumps(whole)) == whole
    assert "in crash" in capsys.readouterr().err  # the traceback
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "### good" in text
    assert "crash (crashed: RuntimeError" in text

    again = made(tmp_path, ceiling, minutes=1e6, resume=True)
    again.items([*items, plain("good", good)])  # only what was skipped runs
    assert statuses(again) == {**found, "tiny/late": "measured"}
    assert len([e for e in again.journal.entries if e.get("status") == "began"]) == 5


def test_a_device_that_is_lost_ends_the_process_and_another_goes_on(ceiling, tmp_path, monkeypatch):
    class Ended(Exception):
        pass

    def end():
        raise Ended

    def dies(bed):
        raise RuntimeError("illegal access")

    monkeypatch.setattr(check, "broken", lambda device: True)
    items = [plain("dies", dies), plain("good", good)]
    with pytest.raises(Ended):
        made(tmp_path, ceiling, again=end).items(items)
    journal = tmp_path / "check.jsonl"
    journal.write_text(journal.read_text() + '{"step": "tiny/killed", "status": "began"}\n')  # a segmentation fault
    run = made(tmp_path, ceiling, again=end, resume=True)
    run.items([*items, plain("killed", good)])
    assert statuses(run) == {"tiny/dies": "crashed", "tiny/killed": "crashed", "tiny/good": "measured"}


def test_a_process_that_died_is_followed_by_another(monkeypatch, capfd):
    codes, commands = [-11, check.AGAIN, 1], []

    def run(command):
        commands.append(command)
        return subprocess.CompletedProcess(command, codes.pop(0))

    monkeypatch.setattr(check.subprocess, "run", run)
    assert check.supervised(["--check"]) == 1
    assert [command[-1] for command in commands] == ["--worker", "--resume", "--resume"]


def test_the_plan_names_cases_that_exist_and_what_is_long_comes_last():
    items = check.plan(["8b", "1b"])
    names = [item.name for item in items]
    assert names[0] == "8b/decode.frozen"
    assert names[-2:] == ["8b/decode.compiled", "8b/decode.overflow"]
    assert len(set(names)) == len(names) == 2 * len(check.ORDER) + len(check.LAST)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cuda", "--check"], "--device cuda: torch .* sees no CUDA device on this machine"),
        (["--check", "--model", "x"], "--check takes no --model"),
        (["--check", "--minutes", "0"], "--minutes 0.0: expected a number above 0"),
        (["--resume"], "--resume and --no-tests belong to --check"),
    ],
)
def test_a_check_that_cannot_run_says_so_in_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr(
        torch.cuda, "is_" + "available", lambda: False
    )  # the finder of GPU tests must not find this file
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message.split(".*")[0] in error


def test_the_tests_of_a_gpu_are_found_run_and_stopped(tmp_path):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_cpu.py").write_text("def test_a(): raise SystemExit")
    looks = "import pytest  # cuda.is_" + "available\n@pytest.mark.parametrize('x', ['a b'])\ndef test_a(x): pass\n"
    (tests / "test_gpu.py").write_text(looks + "def test_b(): assert 1 == 2\n")
    found = suite.run_tests(tests, tmp_path / "log", 60, lambda text: None)
    assert found["counts"] == {"PASSED": 1, "FAILED": 1}
    assert found["failures"] == ["FAILED tests/test_gpu.py::test_b - assert 1 == 2"]
    assert found["finished"]
    stopped = suite.run_tests(tests, tmp_path / "log", 0.0, lambda text: None)
    assert not stopped["finished"]
    assert "when stopped at 0 s: not all have run" in stopped["summary"]
    assert suite.run_tests(tmp_path / "nowhere", tmp_path / "log", 1, print)["counts"] == {}


def test_outcomes_are_read_from_tests_that_run_one_by_one_or_side_by_side():
    log = """
tests/test_a.py::test_ok[a b] PASSED             [ 20%]
[gw1] [ 40%] FAILED tests/test_a.py::test_bad[x]
tests/test_a.py::test_s SKIPPED (no reason)      [ 80%]
tests/test_a.py::test_hangs
FAILED tests/test_a.py::test_bad[x] - AssertionError: no
"""
    assert suite.outcomes(log) == {
        "tests/test_a.py::test_ok[a b]": "PASSED",
        "tests/test_a.py::test_bad[x]": "FAILED",
        "tests/test_a.py::test_s": "SKIPPED",
    }


def test_the_read_only_kernel_reads_every_number():
    code = (
        "import torch; from fastweights.benchmarks.stream import read; x = torch.arange(70_001.0) / 70_001;"
        "print(float(read(x).sum()))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(35_000, rel=1e-4), done.stderr
