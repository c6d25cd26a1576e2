"""A rate per row: row b of a sweep is an episode of one with rate b."""

import math

import numpy
import pytest
import torch
from test_episode import same_state
from tiny import oracle_of, prompt, tiny

import fastweights as fw

RATES = (0.0, 0.05, -0.2, 0.6)
TARGET = torch.linspace(-1, 1, 52, dtype=torch.float64)
ROWS_TARGET = torch.randn(4, 30, 52, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
RULES = {
    "hebbian": lambda rate: fw.Hebbian(rate, mu=0.1, gate="derivative", decay=0.1, bias=True),
    "clip": lambda rate: fw.Hebbian(rate, mu=0.1, gate="positive", clip=0.02),
    "least-squares-self": lambda rate: fw.LocalLeastSquares(gamma=0.7, mu=0.1, rate=rate),
    "least-squares-slow": lambda rate: fw.LocalLeastSquares(gamma=0.5, mu=0.1, target="slow", decay=0.1, rate=rate),
    "delta": lambda rate: fw.Delta(beta=0.4, target=TARGET, mu=0.1, decay=0.05, rate=rate),
    "gradient": lambda rate: fw.GradientAscent(rate, decay=0.05, clip=0.3),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
BITS = {"rtol": 0, "atol": 0}


def plastic(rule, dtype=torch.float64, **options):
    model = tiny(dtype)
    fw.attach(model, [1, 2], rule, ["gate_proj", "up_proj"], rank=4, **{"overflow": "grow", **options})
    return model


@rules
@pytest.mark.parametrize(
    ("overflow", "dtype"),
    [*((policy, torch.float64) for policy in ("grow", "evict", "compress")), ("grow", torch.float32)],
)
def test_a_row_equals_an_episode_of_one_with_that_rate(rule, overflow, dtype):
    close = CLOSE if dtype == torch.float64 else {"rtol": 1e-3, "atol": 2e-4}
    ids, mask = prompt(4, 19), torch.ones(4, 19, dtype=torch.long)
    mask[1, 12:], mask[2, :3] = 0, 0
    write = torch.rand(4, 19, generator=torch.Generator().manual_seed(4)) < 0.8
    batch = fw.Episode(plastic(rule(RATES), dtype, overflow=overflow), 4)
    logits = batch.feed(ids, update=write, attention_mask=mask)
    steps = list(batch.generate(None, 5, update="all", stop_token_ids=()))
    probe = batch.probe(prompt(1, 4, seed=8)).logits
    for row, rate in enumerate(RATES):
        alone, kept = fw.Episode(plastic(rule(rate), dtype, overflow=overflow)), mask[row].bool()
        ours = alone.feed(ids[row, kept], update=write[row : row + 1, kept])
        torch.testing.assert_close(logits[row, kept], ours[0], **close)
        for step in steps:
            torch.testing.assert_close(step.logits[row], alone.logits[0], **close)
            alone.feed(step.token_ids[row : row + 1], update="all")
        torch.testing.assert_close(probe[row], alone.probe(prompt(1, 4, seed=8)).logits[0], **close)
        for site in alone.logs:
            torch.testing.assert_close(batch.delta_weight(*site, row), alone.delta_weight(*site), **close)


@pytest.mark.parametrize("name", ["hebbian", "clip", "gradient"])
def test_a_row_equals_the_dense_oracle_of_that_rate(name):
    ids, rates = prompt(3, 11), [0.3, 0.0, 0.05]
    episode = fw.Episode(plastic(RULES[name](rates)), 3)
    logits = episode.feed(ids)
    for row, rate in enumerate(rates):
        model = tiny()
        oracle = oracle_of(model, fw.attach(model, [1, 2], RULES[name](rate), ["gate_proj", "up_proj"]))
        torch.testing.assert_close(logits[row], oracle.feed(ids[row].tolist()), **CLOSE)
        for site, theirs in oracle.dW.items():
            torch.testing.assert_close(episode.delta_weight(*site, row), theirs, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["hebbian", "clip", "gradient"])
def test_the_same_rate_in_every_row_is_one_rate_to_the_bit(name, dtype):
    out = []
    for rate in (0.3, [0.3] * 3, torch.tensor([0.3] * 3, dtype=torch.float64)):
        episode = fw.Episode(plastic(RULES[name](rate), dtype), 3)
        logits = [episode.feed(prompt(3, 9)), *(episode.feed(prompt(3, 1, seed=n)) for n in range(3))]
        out.append((torch.cat(logits, 1), episode))
    for logits, episode in out[1:]:
        assert torch.equal(logits, out[0][0])
        same_state(episode, out[0][1], **BITS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_target_per_row_goes_with_a_rate_per_row(dtype):
    close = CLOSE if dtype == torch.float64 else {"rtol": 1e-3, "atol": 2e-4}
    ids = prompt(4, 9)
    batch = fw.Episode(plastic(fw.Delta(beta=0.4, target=ROWS_TARGET, rate=RATES), dtype), 4)
    logits = torch.cat([batch.feed(part) for part in ids.split([7, 1, 1], dim=1)], dim=1)
    for row, rate in enumerate(RATES):
        alone = fw.Episode(plastic(fw.Delta(beta=0.4, target=ROWS_TARGET[row], rate=rate), dtype))
        torch.testing.assert_close(logits[row], alone.feed(ids[row])[0], **close)


def test_rates_are_kept_as_plain_numbers_whatever_they_came_as():
    for given in ([0.5, 2], (0.5, 2.0), torch.tensor([0.5, 2.0]), numpy.array([0.5, 2.0])):
        rule = fw.Hebbian(rate=given)
        assert rule.rate == (0.5, 2)
        assert rule == fw.Hebbian(rate=(0.5, 2.0))
    assert fw.Hebbian(rate=0.5).rate == 0.5
    assert fw.GradientAscent([0.0, 0.0]).neuron_local
    assert not fw.GradientAscent([0.0, 0.1]).neuron_local


@pytest.mark.parametrize(
    "rate", [[], [0.1, math.inf], [0.1, None], ["a"], [True], torch.tensor([math.inf]), "ab", math.nan]
)
def test_rates_that_are_no_finite_numbers_are_refused(rate):
    for make in RULES.values():
        with pytest.raises(ValueError, match=r"\(rate=.*: expected a finite number, or a tuple of them, one per row"):
            make(rate)


def test_an_episode_of_another_batch_is_refused_and_nothing_changes():
    model = plastic(fw.Hebbian(rate=RATES))
    wanted = "layers.1.mlp.gate_proj: Hebbian has 4 rates, one per row, but this episode has batch 3"
    with pytest.raises(ValueError, match=wanted):
        fw.Episode(model, 3)
    episode, twin = fw.Episode(model, 4), fw.Episode(model, 4)
    for one in (episode, twin):
        one.feed(prompt(4, 5))
    with pytest.raises(ValueError, match=wanted):
        episode.fork(rows=[0, 1, 2])
    same_state(episode, twin, **BITS)
    # as many rows: a rate stays with its row of the batch, the past comes from the row that is named
    fork = episode.fork(rows=[3, 3, 3, 3])
    logits = fork.feed(prompt(1, 5, seed=2).expand(4, -1))
    frozen = episode.fork(rows=[3, 0, 1, 2]).feed(prompt(1, 5, seed=2).expand(4, -1), update="none")
    torch.testing.assert_close(logits[0], frozen[0], **CLOSE)  # the rate of row 0 is 0
    assert float((logits[3] - logits[0]).norm()) > 1e-3


@rules
def test_rates_are_saved_and_another_rate_is_refused(rule, tmp_path):
    model = plastic(rule(RATES))
    episode = fw.Episode(model, 4)
    episode.feed(prompt(4, 6))
    episode.save(tmp_path / "e")
    twin = fw.Episode.load(model, tmp_path / "e")
    same_state(twin, episode, **BITS)
    torch.testing.assert_close(twin.feed(prompt(4, 3, seed=5)), episode.feed(prompt(4, 3, seed=5)), **CLOSE)
    for other in ((0.0, 0.05, -0.2, 0.7), 0.05):
        with pytest.raises(ValueError, match="was saved with"):
            fw.Episode.load(plastic(rule(other)), tmp_path / "e")
