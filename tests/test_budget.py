"""A budget on ‖ΔW‖ against the oracle's dense ΔW, which is projected onto the ball after every event."""

import re

import pytest
import torch
from oracle import FastLinear
from test_episode import BITS, same_state
from test_state import held, stream
from tiny import oracle_of, prompt, tiny

import fastweights as fw
from fastweights.engine.choose import Engine
from fastweights.state import EventLog
from fastweights.state.budget import Budget, OneByOne

F64 = torch.float64
RULES = {
    "hebbian": fw.Hebbian(rate=0.2, mu=0.1, gate="derivative", decay=0.05, bias=True),
    "slow": fw.LocalLeastSquares(gamma=0.4, mu=0.05, target="slow"),
    "gradient": fw.GradientAscent(rate=0.5, clip=0.3, decay=0.02),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
policies = pytest.mark.parametrize("overflow", ["compress", "evict", "grow", "error"])
LINEARS = ("gate_proj", "up_proj", "down_proj")


class Projected(FastLinear):
    """The oracle's linear: after its event, ΔW is scaled back where it is longer than `share` of W."""

    def __init__(self, plain, share, overflow="grow", rank=10**9):
        super().__init__(plain.W, plain.b, plain.plastic, plain.has_silu)
        self.share, self.window, self.scalings = share, rank if overflow == "evict" else 10**9, []
        self.lengths = []
        self.parts = []  # (ΔW, Δb) of every event in the window, as it stands now

    def write(self, h, u):
        self.dW, self.db = self.dW * 0, self.db * 0
        decay = self.plastic.decay
        super().write(h, u)
        self.parts = [((1 - decay) * dW, (1 - decay) * db) for dW, db in self.parts] + [(self.dW, self.db)]
        self.parts = self.parts[-self.window :]
        length = float(sum(dW for dW, _ in self.parts).norm())
        self.lengths = [*self.lengths, length]
        factor = min(1.0, self.share * float(self.W.norm()) / length) if length else 1.0
        self.parts = [(factor * dW, factor * db) for dW, db in self.parts]
        self.scalings = [*self.scalings, factor]
        self.dW, self.db = (sum(part) for part in zip(*self.parts, strict=True))


def plastic(rule, overflow="grow", rank=64, budget=0.05, dtype=F64, **options):
    model = tiny(dtype)
    return model, fw.attach(model, [1, 2], rule, rank=rank, overflow=overflow, budget=budget, **options)


def projected(model, fast, share):
    oracle = oracle_of(model, fast)
    for site, plain in oracle.fast.items():
        linear = fast.linears[site]
        oracle.fast[site] = Projected(plain, share, linear.overflow, linear.rank)
    return oracle


def compare(episode, oracle, tolerance=1e-9, row=0):
    for site, fast in oracle.fast.items():
        log = episode.logs[site]
        atol = tolerance * (1 + float(fast.dW.abs().max()))
        torch.testing.assert_close(log.delta_weight(row).double(), fast.dW, rtol=0, atol=atol)
        torch.testing.assert_close(log.delta_bias(row).double(), fast.db, rtol=0, atol=atol)
        assert log.scaled[row] == sum(factor < 1 for factor in fast.scalings)


@rules
@pytest.mark.parametrize(("overflow", "rank"), [("grow", 3), ("error", 30), ("evict", 5), ("compress", 30)])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
def test_a_feed_and_a_generation_equal_the_dense_loop_with_projection(rule, overflow, rank, share):
    model, fast = plastic(rule, overflow, rank, share)
    oracle, ids = projected(model, fast, share), prompt(1, 14)
    episode = fw.Episode(model)
    torch.testing.assert_close(episode.feed(ids)[0], oracle.feed(ids[0].tolist()), rtol=1e-9, atol=1e-9)
    compare(episode, oracle)
    for step in episode.generate(None, 6, update="all", stop_token_ids=()):
        logits = oracle.step(int(step.token_ids[0]))
    torch.testing.assert_close(episode.logits[0], logits, rtol=1e-9, atol=1e-9)
    compare(episode, oracle)
    factors = [factor for one in oracle.fast.values() for factor in one.scalings]
    assert min(factors) < 1 or share == 0.3
    for (layer, name), linear in fast.linears.items():
        norm = fast.delta_norm(layer, name)
        assert norm <= share * float(linear.weight.norm()) * (1 + 1e-12)
        if oracle.fast[layer, name].scalings[-1] < 1:
            assert norm == pytest.approx(share * float(linear.weight.norm()), rel=1e-12)


@rules
def test_rows_of_a_ragged_batch_are_scaled_alone(rule):
    model, fast = plastic(rule, "evict", 6, 0.04)
    ids, mask = prompt(2, 17), torch.ones(2, 17, dtype=torch.long)
    mask[1, 3:9] = 0
    batch = fw.Episode(model, 2)
    batch.feed(ids, attention_mask=mask)
    for row in range(2):
        oracle = projected(model, fast, 0.04)
        oracle.feed(ids[row, mask[row].bool()].tolist())
        compare(batch, oracle, row=row)


def passes(monkeypatch):
    widths, run = [], Engine.run
    monkeypatch.setattr(
        Engine, "run", lambda self, tokens, *rest: widths.append(tokens.ids_BT.shape[1]) or run(self, tokens, *rest)
    )
    return widths


@policies
def test_below_the_budget_a_prompt_is_one_pass_and_the_bits_are_those_without_one(overflow, monkeypatch):
    seen, ids = [], prompt(2, 24)
    widths = passes(monkeypatch)
    for budget in (None, 1e3):
        model, _ = plastic(RULES["hebbian"], overflow, 64 if overflow == "error" else 5, budget, torch.float32)
        episode = fw.Episode(model, 2)
        logits = [episode.feed(ids), *(step.logits for step in episode.generate(None, 9, update="all"))]
        seen.append((logits, episode))
    assert widths.count(24) == 2
    assert set(widths) == {1, 24}
    assert all(torch.equal(a, b) for a, b in zip(seen[0][0], seen[1][0], strict=True))
    same_state(seen[1][1], seen[0][1], **BITS)
    for site, log in seen[1][1].logs.items():
        assert log.scaled == [0, 0]
        expected = torch.stack([log.delta_weight(row, F64).norm() for row in range(2)])
        torch.testing.assert_close(log.held().norm_now(), expected, rtol=1e-6, atol=0, msg=str(site))


def test_a_pass_over_the_budget_goes_back_and_then_token_by_token(monkeypatch):
    model, _ = plastic(RULES["hebbian"], budget=0.05)
    widths, ids = passes(monkeypatch), prompt(1, 12)
    whole, steps = fw.Episode(model), fw.Episode(model)
    logits = whole.feed(ids)
    assert widths == [12] + [1] * 12
    torch.testing.assert_close(logits, torch.cat([steps.feed(ids[:, t : t + 1]) for t in range(12)], 1), **BITS)
    same_state(whole, steps, **BITS)


@pytest.mark.parametrize("overflow", ["compress", "evict"])
def test_an_explosion_that_only_the_pass_without_scaling_would_see_is_no_refusal(overflow):
    rule = fw.Hebbian(rate=1e12, mu=0.1)
    model = tiny(torch.float32)
    fw.attach(model, [1], rule, rank=3, overflow=overflow, budget=0.1)
    fw.attach(model, [2], fw.Hebbian(rate=0.1), rank=3, overflow=overflow)
    episode = fw.Episode(model)
    assert torch.isfinite(episode.feed(prompt(1, 20))).all()
    assert episode.events == 20


@rules
@policies
def test_stop_names_what_is_over_and_nothing_of_the_feed_is_written(rule, overflow):
    rank, ids = 4 if overflow in ("evict", "grow") else 40, prompt(1, 30)
    model, fast = plastic(rule, overflow, rank)
    free = projected(model, fast, 1e9)
    free.feed(ids[0].tolist())
    shares = {site: [x / float(one.W.norm()) for x in one.lengths] for site, one in free.fast.items()}
    share = 0.6 * max(max(each) for each in shares.values())
    number, layer, at = min(
        (n, layer, LINEARS.index(name)) for (layer, name), s in shares.items() for n, x in enumerate(s) if x > share
    )
    limit = share * float(free.fast[layer, LINEARS[at]].W.norm())
    said = f"event {number + 1} of layers.{layer}.mlp.{LINEARS[at]} (row 0) makes ‖ΔW‖ "
    said += f"{free.fast[layer, LINEARS[at]].lengths[number]:.6g}, over its budget of {share:g} · ‖W‖ = {limit:.6g}; "

    fw.detach(model)
    fw.attach(model, [1, 2], rule, rank=rank, overflow=overflow, budget=share, over_budget="stop")
    episode, twin = fw.Episode(model), fw.Episode(model)
    for one in (episode, twin):
        one.feed(ids[:, :1])
    with pytest.raises(ValueError, match=re.escape(said + "nothing of this feed is written")):
        episode.feed(ids[:, 1:])
    same_state(episode, twin, **BITS)
    assert torch.equal(episode.feed(ids[:, 1:], update="none"), twin.feed(ids[:, 1:], update="none"))


def test_stop_in_a_generation_refuses_one_token_and_keeps_those_before_it():
    model, fast = plastic(fw.Hebbian(rate=0.05, mu=0.1), budget=0.05, over_budget="stop")
    episode = fw.Episode(model)
    episode.feed([5, 6], update="none")
    generated = episode.generate(None, 50, stop_token_ids=())
    with pytest.raises(ValueError, match=r"event \d+ of .* over its budget") as refusal:
        for steps, _ in enumerate(generated, 1):  # noqa: B007
            pass
    assert 1 <= steps == episode.events == episode.length - 2
    assert f"event {steps + 1} of " in str(refusal.value)
    for (layer, name), linear in fast.linears.items():
        assert fast.delta_norm(layer, name) <= 0.05 * float(linear.weight.norm())


@policies
def test_snapshot_fork_save_and_rewind_carry_the_scalings(overflow, tmp_path):
    model, _ = plastic(RULES["hebbian"], overflow, 60 if overflow == "error" else 9, 0.03)
    episode, ids = fw.Episode(model), prompt(1, 11)
    episode.feed(ids)
    snapshot, child = episode.snapshot(), episode.fork()
    episode.save(tmp_path / "life")
    loaded, trio = fw.Episode.load(model, tmp_path / "life"), episode.fork([0, 0, 0])
    further = prompt(1, 8, seed=4)
    logits = episode.feed(further)
    for other in (child, loaded):
        assert torch.equal(other.feed(further), logits)
        same_state(other, episode, **BITS)
    torch.testing.assert_close(trio.feed(further.expand(3, -1))[2:], logits, rtol=1e-9, atol=1e-9)
    after = {site: list(log.scaled) for site, log in episode.logs.items()}
    episode.restore(snapshot)
    assert torch.equal(episode.feed(further), logits)
    assert {site: log.scaled for site, log in episode.logs.items()} == after
    assert all(log.scaled[0] > 8 for log in episode.logs.values())


@pytest.mark.parametrize("overflow", ["compress", "evict", "grow"])
def test_undo_equals_never_having_written_and_every_moment_is_as_it_was(overflow):
    """With an archive, behind folds and turns of the ring as well."""
    model, _ = plastic(RULES["hebbian"], overflow, 4, 0.03, archive=True)
    episode, ids = fw.Episode(model), prompt(1, 25)
    then = []
    for t in range(25):
        episode.feed(ids[:, t : t + 1])
        then.append(
            {site: (log.delta_weight(0), log.certificate(0), list(log.scaled)) for site, log in episode.logs.items()}
        )
    for n in (25, 20, 7, 1):
        for site, log in episode.logs.items():
            U, K, _, _ = (factor[0] for factor in log.moment_factors())
            moment = (log.weights_at([n])[0, :, None] * U).T @ K
            error = then[n - 1][site][1][1]
            assert float((moment - then[n - 1][site][0]).norm()) <= error + 1e-12
    for n in (19, 6, 2):
        episode.undo(episode.events - n)
        for site, log in episode.logs.items():
            dW, certificate, scaled = then[n - 1][site]
            assert torch.equal(log.delta_weight(0), dW)
            assert log.certificate(0) == certificate
            assert log.scaled == scaled


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", ["random", "repeated-key", "cancelling", "geometric", "orthogonal", "one-huge"])
def test_the_certificate_of_a_scaled_log_bounds_what_the_folds_lost(kind, dtype):
    name, device, budget = "layers.0.mlp.up_proj", torch.device("cpu"), Budget(1, "scale", 2.0)
    log = EventLog(name, 1, 11, 7, 3, "compress", 0.03, dtype, device, archive=True, budget=budget)
    events = stream(kind, 1, 60, 11, 7, dtype=dtype)
    exact, folds = torch.zeros(11, 8, dtype=F64), 0
    for t in range(60):
        one = events.part(t, t + 1)
        log.write(one)
        u, k = one.U_BTO[0, 0].double(), torch.cat([one.K_BTI[0, 0], one.bias_BT[0]]).double()
        # scaled by as much as the log itself was over
        exact = (0.97 * exact + torch.outer(u, k)) * min(1, 2.0 / float(log.archive.norm_BR[0, t]))
        lost, (error_2, error_F) = exact - held(log, 0), log.certificate(0)
        assert float(torch.linalg.matrix_norm(lost, 2)) <= error_2 + 1e-12
        assert float(lost.norm()) <= error_F + 1e-12
        assert float(held(log, 0)[:, :-1].norm()) <= 2.0 * (1 + 1e-5)
        folds += log.slots.last_fold(t + 1) == t + 1
    assert folds > 4
    assert log.scaled[0] > (0 if kind in ("geometric", "one-huge") else 20)


def test_a_log_by_itself_says_that_several_events_over_the_budget_must_come_one_by_one():
    name, device, budget = "layers.0.mlp.up_proj", torch.device("cpu"), Budget(1, "scale", 2.0)
    log, events = EventLog(name, 1, 11, 7, 3, "grow", 0.0, F64, device, budget=budget), stream("random", 1, 5, 11, 7)
    with pytest.raises(OneByOne):
        log.write(events)
    assert log.event_counts == [0]
    for t in range(5):
        log.write(events.part(t, t + 1))
    assert log.delta_norm(0) == pytest.approx(2.0, rel=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget=0: expected a share of ‖W‖, a number above 0, or None"),
        ({"budget": -0.1}, "budget=-0.1: expected a share"),
        ({"budget": float("nan")}, "budget=nan: expected a share"),
        ({"budget": float("inf")}, "budget=inf: expected a share"),
        ({"budget": True}, "budget=True: expected a share"),
        ({"budget": "1"}, "budget='1': expected a share"),
        ({"over_budget": "halt"}, "over_budget='halt': expected one of 'scale', 'stop'"),
        (
            {"factor_dtype": torch.float16},
            "factor_dtype=torch.float16: expected torch.float32 or torch.float64 for a fl",
        ),
        ({"factor_dtype": torch.bfloat16}, "factor_dtype=torch.bfloat16: expected torch.float32 or torch.float64"),
        ({"factor_dtype": "float64"}, "factor_dtype=float64: expected torch.float32 or torch.float64"),
    ],
)
def test_bad_values_are_refused_at_attach(options, message):
    model = tiny(torch.float32)
    modules = list(model.modules())
    with pytest.raises(ValueError, match=re.escape(message)):
        fw.attach(model, [1], fw.Hebbian(), **options)
    assert list(model.modules()) == modules


def test_a_weight_of_zeros_has_no_budget():
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    with pytest.raises(ValueError, match=r"budget=0.1: layers.1.mlp.up_proj is zero, and so is any share of it"):
        fw.attach(model, [1], fw.Hebbian(), budget=0.1)


def test_a_saved_episode_with_another_budget_is_refused(tmp_path):
    model, _ = plastic(RULES["hebbian"], budget=0.03)
    fw.Episode(model).save(tmp_path / "life")
    for budget in (None, 0.04):
        fw.detach(model)
        fw.attach(model, [1, 2], RULES["hebbian"], budget=budget, overflow="grow")
        with pytest.raises(ValueError, match=r"layers.1.mlp.gate_proj: the saved log has budget {'share': 0.03"):
            fw.Episode.load(model, tmp_path / "life")


def test_a_snapshot_under_another_budget_or_rank_is_refused():
    model, _ = plastic(RULES["hebbian"], budget=0.03)
    snapshot = fw.Episode(model).snapshot()
    for options, message in (
        ({"rank": 64}, "budget {'share': 0.03"),
        ({"rank": 8, "budget": 0.03}, "rank 64, expected 8"),
    ):
        fw.detach(model)
        fw.attach(model, [1, 2], RULES["hebbian"], overflow="grow", **options)
        with pytest.raises(ValueError, match=f"layers.1.mlp.gate_proj: the snapshot's log has {message}"):
            fw.Episode(model).restore(snapshot)


def test_factors_in_float64_of_a_float32_model_hold_what_float32_rounds():
    ids, errors = prompt(1, 30), []
    for dtype in (None, F64):
        model = tiny(torch.float32)
        fast = fw.attach(model, [1], RULES["hebbian"], overflow="compress", rank=4, factor_dtype=dtype)
        episode = fw.Episode(model)
        logits = episode.feed(ids)
        assert logits.dtype == torch.float32
        assert episode.logs[1, "up_proj"].U_BRO.dtype == (dtype or torch.float32)
        assert fast.delta_weight(1, "up_proj").dtype == (dtype or torch.float32)
        errors.append(fast.error(1, "up_proj"))
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_float64_factors_are_refused_by_triton_and_taken_by_a_half_precision_model(tmp_path):
    with pytest.raises(ValueError, match=r"computes in float32: use 'torch' for factor_dtype=torch.float64"):
        fw.attach(tiny(torch.float32), [1], fw.Hebbian(), backend="triton", factor_dtype=F64)
    with pytest.raises(ValueError, match=r"factor_dtype=torch.float32: expected torch.float64 for a float64 model"):
        fw.attach(tiny(F64), [1], fw.Hebbian(), factor_dtype=torch.float32)
    model = tiny(torch.bfloat16)
    fw.attach(model, [1], fw.Hebbian(), factor_dtype=F64)
    episode = fw.Episode(model)
    assert episode.feed(prompt(1, 5)).dtype == torch.bfloat16
    episode.save(tmp_path / "life")
    assert fw.Episode.load(model, tmp_path / "life").logs[1, "up_proj"].U_BRO.dtype == F64


def test_steps_in_float32_scale_as_those_with_float64_factors_do():
    """Whatever runs one token: no linear's scalings may end up in another's weights."""
    seen = []
    for factor_dtype in (None, F64):
        model, _ = plastic(fw.Hebbian(rate=0.2, mu=0.1), "compress", 5, 0.03, torch.float32, factor_dtype=factor_dtype)
        episode, ids = fw.Episode(model), prompt(1, 30)
        logits = torch.cat([episode.feed(ids[:, t : t + 1]) for t in range(30)], 1)
        seen.append((logits, {site: log.scaled for site, log in episode.logs.items()}))
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-4, atol=1e-4)
    assert seen[0][1] == seen[1][1]
    assert all(scaled[0] > 10 for scaled in seen[0][1].values())
