"""Sampling: every filter and the penalty as transformers has them, and draws of the right probability."""

import pytest
import torch
from tiny import prompt
from transformers.generation import logits_process as hf

import fastweights as fw
from fastweights.sampling import RowGenerator

LOGITS = 3 * torch.randn(4, 61, generator=torch.Generator().manual_seed(0))
IDS = prompt(4, 9)


@pytest.mark.parametrize(
    ("options", "processors"),
    [
        ({"temperature": 0.7}, [hf.TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 7}, [hf.TopKLogitsWarper(7)]),
        ({"temperature": 1.0, "top_k": 500}, [hf.TopKLogitsWarper(500)]),
        ({"temperature": 1.0, "top_p": 0.3}, [hf.TopPLogitsWarper(0.3)]),
        ({"temperature": 1.0, "top_p": 0.999}, [hf.TopPLogitsWarper(0.999)]),
        ({"temperature": 1.0, "min_p": 0.2}, [hf.MinPLogitsWarper(0.2)]),
        ({"temperature": 1.0, "repetition_penalty": 1.4}, [hf.RepetitionPenaltyLogitsProcessor(1.4)]),
        ({"temperature": 1.0, "repetition_penalty": 0.8}, [hf.RepetitionPenaltyLogitsProcessor(0.8)]),
        (
            {"temperature": 0.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
            [
                hf.RepetitionPenaltyLogitsProcessor(1.3),
                hf.TemperatureLogitsWarper(0.5),
                hf.TopKLogitsWarper(20),
                hf.TopPLogitsWarper(0.8),
                hf.MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
def test_every_sampler_draws_with_the_probabilities_of_transformers(options, processors):
    theirs = LOGITS
    for processor in processors:
        theirs = processor(IDS, theirs)
    sampling, count = fw.Sampling(**options), 4000
    penalised = sampling._penalised(LOGITS, IDS.tolist()) if "repetition_penalty" in options else LOGITS
    assert torch.equal(sampling.filtered(penalised), theirs)
    logits = LOGITS.repeat_interleave(count, 0)
    seen = [ids for ids in IDS.tolist() for _ in range(count)]
    chosen = sampling.choose(logits, seen, torch.Generator().manual_seed(1)).reshape(4, count)
    for row in range(4):
        wanted = theirs[row].softmax(-1)
        got = torch.bincount(chosen[row], minlength=61) / count
        assert (got[wanted == 0] == 0).all()
        deviation = (wanted * (1 - wanted) / count).sqrt()
        assert ((got - wanted).abs() <= 5 * deviation + 3 / count).all()


def test_a_temperature_of_0_takes_the_likeliest_after_the_penalty():
    theirs = hf.RepetitionPenaltyLogitsProcessor(1.7)(IDS, LOGITS).argmax(-1)
    assert torch.equal(fw.Sampling(repetition_penalty=1.7).choose(LOGITS, IDS.tolist()), theirs)
    assert torch.equal(fw.Sampling().choose(LOGITS), LOGITS.argmax(-1))


def test_the_ends_of_the_range_of_a_draw_are_tokens_with_a_probability():
    class Fixed(RowGenerator):
        def __init__(self, value):
            self.value = value

        def draw(self):
            return torch.full((1,), self.value, dtype=torch.float64)

    logits = torch.full((1, 50_000), -torch.inf)
    logits[0, [7, 123, 40_000]] = torch.tensor([0.0, 1.0, 2.0])
    for value, token in ((0.0, 7), (1 - 2**-52, 40_000)):
        assert int(fw.Sampling(temperature=1.0).choose(logits, generator=Fixed(value))) == token


def test_row_numbers_are_even_and_the_same_everywhere():
    generator = RowGenerator(2).manual_seed(5)
    numbers = torch.stack([generator.draw() for _ in range(4000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for row in numbers.T:
        counts = torch.histc(row, 20, 0, 1)
        assert ((counts - 200) ** 2 / 200).sum() < 45  # chi-square with 19 degrees of freedom: p = 0.0007
    assert abs(torch.corrcoef(numbers.T)[0, 1]) < 0.05
    assert RowGenerator(1).manual_seed(5).draw().item() == numbers[0, 0]
    assert RowGenerator(1).manual_seed(6).draw().item() == numbers[0, 1]
    assert f"{numbers[0, 0]:.12f} {numbers[1, 1]:.12f}" == "0.908192138817 0.757342192878"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, r"generate\(temperature=nan\): expected a number >= 0"),
        ({"temperature": "hot"}, r"generate\(temperature='hot'\)"),
        ({"top_k": 0}, r"generate\(top_k=0\): expected 1 or more, or None"),
        ({"top_k": 2.5}, r"generate\(top_k=2\.5\)"),
        ({"top_p": 0.0}, r"generate\(top_p=0\.0\)"),
        ({"min_p": 1.5}, r"generate\(min_p=1\.5\)"),
        ({"repetition_penalty": 0}, r"generate\(repetition_penalty=0\): expected a number > 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fw.Sampling(**options)


def test_what_a_choice_lacks_is_named():
    with pytest.raises(ValueError, match=r"logits have shape \[1, 4, 61\]: expected \[B, V\]"):
        fw.Sampling().choose(LOGITS[None])
    with pytest.raises(ValueError, match="needs seen=, each row's tokens so far"):
        fw.Sampling(repetition_penalty=2.0).choose(LOGITS)
    with pytest.raises(ValueError, match="needs generator=, where random numbers come from"):
        fw.Sampling(temperature=1.0).choose(LOGITS)
    with pytest.raises(ValueError, match=r"the random state has shape \[3, 2\], expected \[2, 2\]"):
        RowGenerator(2).set_state(RowGenerator(3).get_state())
