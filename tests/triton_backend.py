"""Tests that launch kernels through the model: run by test_triton.py, interpreted or on a GPU."""

import pytest
import torch
from tiny import prompt, tiny

import fastweights as fw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

RULES = {
    "hebbian": fw.Hebbian(rate=0.3, mu=0.1, gate="derivative", decay=0.1, clip=0.05, bias=True),
    "self": fw.LocalLeastSquares(gamma=0.3, mu=0.1, gate="positive"),
    "slow": fw.LocalLeastSquares(gamma=0.4, mu=0.05, target="slow", decay=0.05),
    "delta": fw.Delta(beta=0.3, target=torch.linspace(-1, 1, 12 * 24).reshape(12, 24), mu=0.1),
}


def both(rule, overflow="grow", dtype=torch.float32, rows=2, shared=False, **options):
    linears = ["down_proj"] if isinstance(rule, fw.Delta) else ["gate_proj", "up_proj", "down_proj"]
    for backend in ("torch", "triton"):
        model = tiny(dtype).to(DEVICE)
        fast = fw.attach(model, [1, 2], rule, linears, rank=4, overflow=overflow, backend=backend, **options)
        assert all(linear.backend == backend for linear in fast.linears.values())
        yield fw.Episode(model, rows, shared=shared)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("overflow", ["grow", "evict", "compress"])
def test_triton_equals_torch_in_prompts_steps_and_probes(name, overflow):
    ids, mask = prompt(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 5:7] = 0
    write = torch.rand(2, 12, generator=torch.Generator().manual_seed(4)) < 0.7
    out = []
    for episode in both(RULES[name], overflow):
        parts = [(ids[:, a:b], write[:, a:b], mask[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 9), (9, 10), (10, 12))]
        logits = [episode.feed(i, update=w, attention_mask=m) for i, w, m in parts]
        out.append((torch.cat(logits, dim=1), episode.probe(prompt(1, 5, seed=8)).logits, episode))
    (ours, our_probe, triton), (theirs, their_probe, reference) = out[1], out[0]
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(our_probe, their_probe, rtol=2e-4, atol=2e-4)
    assert triton.event_counts == reference.event_counts
    for site in triton.logs:
        for row in range(2):
            ours, theirs = triton.delta_weight(*site, row), reference.delta_weight(*site, row)
            assert float((ours - theirs).norm()) <= 2e-4 * float(theirs.norm())


def test_triton_probes_every_moment_and_undoes():
    triton, reference = reversed(list(both(RULES["hebbian"])))
    for episode in (triton, reference):
        episode.feed(prompt(2, 6))
        list(episode.generate(None, 3, stop_token_ids=()))
        episode.undo(2)
    traces = [episode.probe(prompt(2, 4, seed=8), at="every").logits for episode in (triton, reference)]
    assert len(traces[0]) == 8
    torch.testing.assert_close(*traces, rtol=2e-4, atol=2e-4)


def test_a_non_finite_event_that_a_kernel_wrote_is_named_and_taken_back():
    for episode in both(fw.Hebbian(rate=0.3)):
        episode.feed(prompt(2, 3))
        kept = episode.model.model.embed_tokens.weight[7].clone()
        episode.model.model.embed_tokens.weight[7] = float("nan")
        with pytest.raises(ValueError, match=r"event 4 of layers.1.mlp.gate_proj \(row 1\) has a non-finite factor"):
            episode.feed([[5], [7]])
        episode.model.model.embed_tokens.weight[7] = kept
        assert episode.lengths == [3, 3]
        assert torch.isfinite(episode.feed([[5], [6]])).all()


@pytest.mark.parametrize("overflow", ["grow", "evict", "compress"])
def test_a_budget_scales_what_a_kernel_wrote_as_it_scales_on_torch(overflow):
    out = []
    for episode in both(RULES["hebbian"], overflow, budget=0.02):
        episode.feed(prompt(2, 3))
        write = torch.tensor([[True], [False]])
        for n in range(9):
            logits = episode.feed(prompt(2, 1, seed=n), update=write if n % 2 else "all")
        out.append((logits, episode))
    (theirs, reference), (ours, triton) = out
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
    for site, log in triton.logs.items():
        assert log.scaled == reference.logs[site].scaled
        assert min(log.scaled) > 2
        limit = log.budget.limit
        for row in range(2):
            assert log.delta_norm(row) == pytest.approx(reference.logs[site].delta_norm(row), rel=2e-4)
            assert log.delta_norm(row) <= limit * (1 + 1e-6)


def test_an_event_of_a_kernel_that_stops_is_taken_back():
    for episode in both(fw.Hebbian(rate=0.02), budget=0.02, over_budget="stop"):
        steps = episode.generate(prompt(2, 1), 40, update="all", stop_token_ids=())
        with pytest.raises(
            ValueError, match=r"event \d+ of layers.\d.mlp.\w+ \(row \d\) makes ‖ΔW‖ .* over its budget"
        ):
            list(steps)
        assert episode.length == episode.events > 1
        assert torch.isfinite(episode.feed(prompt(2, 4), update="none")).all()


def test_half_precision_steps_stay_near_torch():
    out = []
    for episode in both(fw.Hebbian(rate=0.2, mu=0.1), dtype=torch.float16):
        episode.feed(prompt(2, 4))
        out.append(torch.cat([episode.feed(prompt(2, 1, seed=n)) for n in range(4)], dim=1).float())
    assert float((out[0] - out[1]).norm() / out[0].norm()) < 5e-3


@pytest.mark.parametrize("rule", [fw.Hebbian, lambda rate: fw.LocalLeastSquares(0.7, rate=rate, clip=0.05)])
def test_a_rate_per_row_in_prompts_and_steps(rule):
    out = []
    for episode in both(rule(rate=(0.05, 0.4))):
        out.append(torch.cat([episode.feed(prompt(2, n, seed=n)) for n in (5, 1, 1)], dim=1))
    torch.testing.assert_close(*out, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("overflow", ["grow", "evict", "compress"])
def test_rows_that_share_their_fast_weights(name, overflow):
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:], mask[2, :2] = 0, 0
    out = []
    for episode in both(RULES[name], overflow, rows=3, shared=True):
        logits = episode.feed(prompt(3, 8), attention_mask=mask)
        logits = torch.cat([logits[mask.bool()], *(episode.feed(prompt(3, 1, seed=n))[:, 0] for n in range(2))])
        out.append((logits, episode.probe(prompt(1, 5, seed=8)).logits, episode))
    (ours, our_probe, triton), (theirs, their_probe, reference) = out[1], out[0]
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(our_probe, their_probe, rtol=2e-4, atol=2e-4)
    assert triton.event_counts == reference.event_counts
    for site in triton.logs:
        ours, theirs = triton.delta_weight(*site), reference.delta_weight(*site)
        assert float((ours - theirs).norm()) <= 2e-4 * float(theirs.norm())


def test_a_rate_per_row_of_shared_fast_weights_is_refused():
    with pytest.raises(ValueError, match="a rate per row, which a shared episode cannot run on backend='triton'"):
        list(both(fw.Hebbian(rate=(0.1, 0.2)), shared=True))
