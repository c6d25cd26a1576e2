"""Bounded state inside the model: one pass = steps = a row alone, whatever the policy does on the way."""

import pytest
import torch
from test_episode import BITS, CLOSE, same_state
from tiny import prompt, tiny

import fastweights as fw

RULES = {
    "hebbian": fw.Hebbian(rate=0.2, mu=0.1, gate="derivative", decay=0.05, bias=True),
    "slow": fw.LocalLeastSquares(gamma=0.4, mu=0.05, target="slow"),
    "gradient": fw.GradientAscent(rate=0.3, decay=0.05),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
policies = pytest.mark.parametrize("overflow", ["compress", "evict"])


def plastic(rule, overflow, rank=4, **options):
    model = tiny()
    return model, fw.attach(model, [1, 2], rule, rank=rank, overflow=overflow, **options)


@rules
@policies
@pytest.mark.parametrize("splits", [[1] * 33, [33], [2, 17, 14], [12, 1, 20]])
def test_any_split_of_a_prompt_gives_the_same_numbers_past_the_capacity(rule, overflow, splits):
    model, _ = plastic(rule, overflow)
    ids = prompt(1, 33)
    whole, parts = fw.Episode(model), fw.Episode(model)
    write = torch.rand(1, 33, generator=torch.Generator().manual_seed(2)) < 0.8
    logits = whole.feed(ids, update=write)
    pieces = zip(ids.split(splits, dim=1), write.split(splits, dim=1), strict=True)
    split = torch.cat([parts.feed(part, update=mask) for part, mask in pieces], dim=1)
    torch.testing.assert_close(split, logits, rtol=1e-7, atol=1e-8)
    same_state(parts, whole, rtol=1e-7, atol=1e-8)
    assert whole.events > 12


@rules
@policies
def test_a_row_of_a_ragged_batch_equals_that_row_alone_past_the_capacity(rule, overflow):
    model, _ = plastic(rule, overflow)
    ids, mask = prompt(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, 5:14] = 0
    batch = fw.Episode(model, 2)
    logits = batch.feed(ids, attention_mask=mask)
    for row in range(2):
        kept, alone = mask[row].bool(), fw.Episode(model)
        torch.testing.assert_close(logits[row, kept], alone.feed(ids[row, kept])[0], rtol=1e-7, atol=1e-8)
        for site in alone.logs:
            torch.testing.assert_close(batch.delta_weight(*site, row), alone.delta_weight(*site), rtol=1e-7, atol=1e-8)


@policies
def test_below_the_capacity_nothing_differs_from_growing(overflow):
    ids, out = prompt(1, 12), []
    for policy, rank in ((overflow, 12), ("grow", 2)):
        model, _ = plastic(RULES["hebbian"], policy, rank)
        out.append(fw.Episode(model).feed(ids))
    torch.testing.assert_close(out[0], out[1], **CLOSE)


def test_evict_reads_exactly_the_last_events():
    ids = prompt(1, 20)
    model, _ = plastic(fw.Hebbian(rate=0.2, mu=0.1), "evict", rank=5)
    episode = fw.Episode(model)
    episode.feed(ids)
    log = episode.logs[1, "down_proj"]
    live = log.birth_BR[0] >= 15
    assert sorted(log.birth_BR[0, live].tolist()) == [15, 16, 17, 18, 19]
    expected = torch.einsum("ro,ri->oi", log.U_BRO[0, live], log.K_BRI[0, live])
    torch.testing.assert_close(episode.delta_weight(1, "down_proj"), expected)


@rules
@policies
def test_restore_repeats_the_bits_past_the_capacity(rule, overflow):
    model, _ = plastic(rule, overflow)
    episode = fw.Episode(model)
    episode.feed(prompt(1, 11))
    snapshot, runs = episode.snapshot(), []
    for _ in range(2):
        episode.restore(snapshot)
        runs.append(episode.feed(prompt(1, 19, seed=3)))
    assert torch.equal(*runs)


@rules
@policies
def test_a_refused_feed_takes_back_folds_and_evictions(rule, overflow):
    model, _ = plastic(rule, overflow)
    episode, twin = fw.Episode(model), fw.Episode(model)
    episode.feed(prompt(1, 11))
    twin.feed(prompt(1, 11))
    kept = model.model.embed_tokens.weight[7].clone()
    model.model.embed_tokens.weight[7] = float("nan")
    with pytest.raises(ValueError, match="non-finite"):
        episode.feed([*([5] * 15), 7, 6, 5])
    model.model.embed_tokens.weight[7] = kept
    same_state(episode, twin, **BITS)
    assert torch.equal(episode.feed(prompt(1, 5)), twin.feed(prompt(1, 5)))


@policies
def test_an_archive_keeps_every_moment_exact(overflow):
    ids, question = prompt(1, 25), prompt(1, 5, seed=8)
    model, _ = plastic(RULES["hebbian"], overflow, archive=True)
    episode = fw.Episode(model)
    episode.feed(ids)
    trace = episode.probe(question, at="every")
    assert len(trace.logits) == 26
    torch.testing.assert_close(trace.logits[0], tiny()(question), **CLOSE)
    if overflow == "evict":  # a moment of a ring is its window then
        stopped = fw.Episode(model)
        stopped.feed(ids[:, :20])
        torch.testing.assert_close(trace.logits[20], stopped.probe(question).logits, **CLOSE)
    twin, _ = plastic(RULES["hebbian"], "grow")
    exact = fw.Episode(twin)
    exact.feed(ids[:, :4])  # below the capacity both read the same
    torch.testing.assert_close(trace.logits[4, 0], exact.probe(question).logits[0], **CLOSE)
    plain, _ = plastic(RULES["hebbian"], overflow)
    forgetful = fw.Episode(plain)
    forgetful.feed(ids)
    with pytest.raises(ValueError, match="after event 3 is not kept, expected a moment from"):
        forgetful.probe(question, at=[3])
    with pytest.raises(ValueError, match=r"names event 2, but the oldest that layers.1.mlp.\w+ keeps by itself"):
        forgetful.probe(question, at=[fw.Moment(without=[2])])
    episode.probe(question, at=[fw.Moment(without=[2])])


def test_the_handle_reports_errors_and_effective_rank():
    model, fast = plastic(fw.Hebbian(rate=0.2, mu=0.1), "compress")
    episode = fw.Episode(model)
    episode.feed(prompt(1, 8))
    assert fast.error(1, "up_proj") == (0.0, 0.0)
    assert 1 < fast.effective_rank(1, "up_proj") <= 8
    episode.feed(prompt(1, 12, seed=2))
    error_2, error_F = fast.error(1, "up_proj")
    assert 0 < error_2 <= error_F
    assert fast.effective_rank(1, "up_proj") <= 12
