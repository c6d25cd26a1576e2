"""A plastic prompt on a device: the host looks once at what was computed, at the end of the pass."""

import pytest
import torch
from other_device import OTHER, counting, moved
from tiny import prompt, tiny

import fastweights as fw
from fastweights import plastic
from fastweights.kernels import scan

TARGET = torch.linspace(-1, 1, 64 * 24, dtype=torch.float64).reshape(64, 24)
RULES = {
    "hebbian": fw.Hebbian(rate=0.2, mu=0.1, gate="derivative", decay=0.05, clip=0.1, bias=True),
    "slow": fw.LocalLeastSquares(gamma=0.4, mu=0.05, target="slow"),
    "delta": fw.Delta(beta=0.3, target=TARGET, mu=0.1),
}


def by_sequence(a, gram, value, known, backend):
    """In the place of Triton's scan, which looks at nothing."""
    return scan.scan_sequential(a, gram, value)


def made(name, overflow, rows, device, monkeypatch, shared=False):
    """An episode whose prompts take the modules; the target of "delta" lies where the model does."""
    model, rule = tiny(num_hidden_layers=3), RULES[name]
    linears = ["gate_proj", "up_proj", "down_proj"]
    if name == "delta":
        linears = ["down_proj"]
        rule = fw.Delta(beta=rule.beta, target=rule.target.to(device), mu=rule.mu)
    fw.attach(moved(model) if device == OTHER else model, [1, 2], rule, linears, rank=8, overflow=overflow)
    monkeypatch.setattr(plastic, "scan", by_sequence)
    return fw.Episode(model, rows, shared=shared)


def fed(episode, looked):
    """A ragged prompt with gaps, in two feeds; what the host looked at in each."""
    rows, logits = episode.batch_size, []
    mask = torch.ones(rows, 40, dtype=torch.long)
    write = torch.rand(rows, 40, generator=torch.Generator().manual_seed(3))
    if rows > 1:
        mask[1, 25:], mask[0, :3] = 0, 0
    for part, update in ((slice(0, 24), "all"), (slice(24, 40), write[:, 24:40] < 0.7)):
        with counting() as seen:
            out = episode.feed(prompt(rows, 40)[:, part], update, mask[:, part])
        looked.append(list(seen.looks))
        logits.append(out.cpu()[mask[:, part].bool()])
    return torch.cat(logits)


@pytest.mark.parametrize(("rows", "shared"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("overflow", ["grow", "evict"])
@pytest.mark.parametrize("name", RULES)
def test_a_prompt_is_looked_at_once_at_its_end(name, overflow, rows, shared, monkeypatch):
    there, here = (made(name, overflow, rows, d, monkeypatch, shared) for d in (OTHER, torch.device("cpu")))
    looked = []
    torch.testing.assert_close(fed(there, looked), fed(here, []), rtol=1e-9, atol=1e-9)
    assert looked == [["aten._local_scalar_dense.default"]] * 2
    assert there.path == "modules"
    assert there.event_counts == here.event_counts
    assert max(there.event_counts[1, "down_proj"]) > 24


def test_a_prompt_that_folds_looks_before_each_fold_and_no_more(monkeypatch):
    episode, folds = made("hebbian", "compress", 1, OTHER, monkeypatch), []
    monkeypatch.setattr(plastic.EventLog, "_fold", lambda log, row: folds.append(log.name))
    with counting() as seen:
        episode.feed(prompt(1, 40))
    assert len(folds) == 6 * 4  # of 40 events, after 16 and then after every 8
    assert len(seen.looks) == len(folds)


@pytest.mark.parametrize("device", ["cpu", OTHER])
@pytest.mark.parametrize("overflow", ["grow", "evict", "compress"])
def test_the_first_event_that_is_not_finite_is_named_and_taken_back(overflow, device):
    """Event 24 has a NaN, and so has every later one. A ring of 8 has long lost it when the host looks."""
    model, target = tiny(), TARGET.repeat(2, 1, 1)
    target[1, 23] = float("nan")
    target = target.to(device)
    fw.attach(
        moved(model) if device == OTHER else model,
        [1, 2],
        fw.Delta(beta=0.3, target=target, mu=0.1),
        ["down_proj"],
        rank=8,
        overflow=overflow,
    )
    episode = fw.Episode(model, 2)
    episode.feed(prompt(2, 3))
    kept = [episode.delta_weight(1, "down_proj", row).clone() for row in range(2)]
    ids = prompt(2, 37, seed=5)
    with pytest.raises(ValueError, match=r"event 24 of layers.1.mlp.down_proj \(row 1\) has a non-finite factor"):
        episode.feed(ids)
    assert episode.lengths == [3, 3]
    assert episode.events == 3
    for row in range(2):
        assert torch.equal(episode.delta_weight(1, "down_proj", row).cpu(), kept[row].cpu())
    target[1, 23] = 0.0
    assert bool(episode.feed(ids).isfinite().all())
