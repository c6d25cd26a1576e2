"""Perplexity with fast weights: a naive loop in float64, windows, rates in one batch, and the command."""

import json
import math
import sys

import pytest
import torch
from test_cli import folder  # noqa: F401 (a fixture)
from test_rates import TARGET
from tiny import naive_of, prompt, tiny

import fastweights as fw
from fastweights.__main__ import main

RULES = {
    "hebbian": lambda rate: fw.Hebbian(rate, mu=0.1, gate="derivative", decay=0.1),
    "slow": lambda rate: fw.LocalLeastSquares(gamma=0.5, mu=0.1, target="slow", rate=rate),
    "delta": lambda rate: fw.Delta(beta=0.4, target=TARGET, mu=0.1, rate=rate),
    "gradient": lambda rate: fw.GradientAscent(rate, decay=0.05),
}
LINEARS = ["gate_proj", "up_proj"]
TEXTS = [prompt(1, 23, seed=3)[0].tolist(), prompt(1, 14, seed=4)[0].tolist()]


def measured(rule, texts=TEXTS, **options):
    return fw.perplexity(tiny(), texts, rule, [1, 2], linears=LINEARS, overflow="grow", **options)


def by_hand(rule, length, stride, reset):
    """Losses of all texts, one token after the other: [N], and how many tokens ΔW had read before."""
    losses, read, naive = [], [], None
    for text in TEXTS:
        new, lived = 0, sum(map(len, TEXTS[: TEXTS.index(text)])) if reset == "never" else 0
        for start in range(0, len(text), stride):
            if new == len(text):
                break
            if naive is None or reset == "window" or (reset == "text" and start == 0):
                naive = naive_of(tiny(), rule)
            else:
                if start:
                    naive.settle(text[new])
                    naive.flush()
                naive.restart()
            for place in range(start, min(start + length, len(text))):
                logits = naive.feed([text[place]], write=place >= new or reset == "window")[0]
                if place >= new and place + 1 < len(text):
                    losses.append(-torch.log_softmax(logits, 0)[text[place + 1]])
                    read.append(place + 1 - start if reset == "window" else place + 1 + lived)
            new = min(start + length, len(text))
    return torch.stack(losses), read


@pytest.mark.parametrize(("length", "stride"), [(23, 23), (7, 7), (9, 4)])
@pytest.mark.parametrize("reset", ["window", "text", "never"])
@pytest.mark.parametrize("name", ["hebbian", "gradient"])
def test_a_loss_is_that_of_a_naive_loop_that_writes_after_it_measures(name, reset, length, stride, monkeypatch):
    monkeypatch.setattr(sys.modules["fastweights.perplexity"], "NUMBERS", 61 * 2 * 5)  # pieces of five tokens
    rule = RULES[name](0.3)
    found = measured(rule, length=length, stride=stride, reset=reset)
    assert found.rates == [0.0, 0.3]
    loss_N, read = by_hand(rule, length, stride, reset)
    torch.testing.assert_close(torch.cat(found.losses, 1)[1], loss_N, rtol=0, atol=1e-9)
    assert torch.cat(found.positions).tolist() == read
    assert (found.losses[0][1] - found.losses[0][0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", RULES)
def test_rates_in_one_batch_are_the_rates_alone_and_rate_zero_is_the_frozen_model(name):
    together = measured(RULES[name]((0.3, 0.0, -0.1)), length=9)
    assert together.rates == [0.0, 0.3, -0.1]
    for row, rate in ((1, 0.3), (2, -0.1)):
        alone = measured(RULES[name](rate), length=9)
        for ours, theirs in zip(together.losses, alone.losses, strict=True):
            torch.testing.assert_close(ours[[0, row]], theirs, rtol=0, atol=1e-10)
    frozen = fw.perplexity(tiny(), TEXTS, length=9)
    assert frozen.rates == [0.0]
    torch.testing.assert_close(together.loss[:1], frozen.loss, rtol=0, atol=1e-12)


def test_windows_change_what_attention_sees_and_not_what_was_written():
    whole, cut = (measured(RULES["hebbian"](0.3), TEXTS[:1], length=length) for length in (23, 22))
    torch.testing.assert_close(whole.losses[0][:, :22], cut.losses[0], rtol=0, atol=1e-10)
    carried, forgotten = (measured(RULES["hebbian"](0.3), length=7, reset=reset) for reset in ("text", "window"))
    torch.testing.assert_close(carried.losses[0][:, :7], forgotten.losses[0][:, :7], rtol=0, atol=1e-10)
    assert (carried.losses[0][1, 7:] - forgotten.losses[0][1, 7:]).abs().min() > 1e-6
    torch.testing.assert_close(carried.loss[0], forgotten.loss[0], rtol=0, atol=1e-12)


def test_buckets_share_out_every_token_and_the_standard_error_is_that_of_blocks():
    found = measured(RULES["hebbian"](0.3), [prompt(1, 200, seed=5)[0]])
    buckets = found.by_position()
    assert [(b["from"], b["to"], b["tokens"]) for b in buckets] == [(0, 64, 63), (64, 128, 64), (128, None, 72)]
    total = sum(torch.tensor(b["loss"], dtype=torch.float64) * b["tokens"] for b in buckets)
    torch.testing.assert_close(total / 199, found.loss)
    assert [b["tokens"] for b in found.by_position([1, 2, 190, 500])] == [1, 188, 10]
    apart = (found.losses[0][1] - found.losses[0][0]).tolist()
    means = [sum(apart[n : n + 64]) / 64 for n in (0, 64, 128)]
    middle = sum(means) / 3
    error = math.sqrt(sum((m - middle) ** 2 for m in means) / 2 / 3)
    assert float(found.standard_error[1]) == pytest.approx(error)
    assert float(found.perplexity[1]) == pytest.approx(math.exp(float(found.loss[1])))
    with pytest.raises(ValueError, match=r"by_position\(edges=\[5, 2\]\): expected positions from 0, ascending"):
        found.by_position([5, 2])


def test_what_does_not_fit_is_refused_and_the_model_left_as_it_was():
    model, rule = tiny(), fw.Hebbian(0.1)
    for options, message in (
        ({"reset": "page"}, "expected one of 'window', 'text', 'never'"),
        ({"length": 257}, "expected a whole number from 1 to 256"),
        ({"length": 8, "stride": 9}, "expected a whole number from 1 to 8"),
        ({"names": ["a"]}, "got 1 names for 2 texts"),
        ({"rank": 0}, "expected a whole number of events"),
    ):
        with pytest.raises(ValueError, match=message):
            fw.perplexity(model, TEXTS, rule, [1], **options)
    with pytest.raises(ValueError, match=r"texts of \[1\] tokens"):
        fw.perplexity(model, [[5]], rule, [1])
    with pytest.raises(ValueError, match="a rule and layers, or neither"):
        fw.perplexity(model, TEXTS, rule)
    with pytest.raises(ValueError, match=r"non-finite factor.*; the rows are those of the rates 0, 1e[+]30"):
        fw.perplexity(tiny(torch.float32), TEXTS, fw.Hebbian(1e30), [1])
    fw.attach(model, [1], rule)  # every refusal has left it without fast weights
    with pytest.raises(ValueError, match="already plastic"):
        fw.perplexity(model, TEXTS, rule, [1])


def test_the_command_prints_a_table_and_one_json_line_and_saves_a_picture(folder, capsys, tmp_path):  # noqa: F811
    (tmp_path / "sky.txt").write_text("the sky is blue and so it goes")
    command = ["eval-ppl", f"@{tmp_path / 'sky.txt'}", "who is red ?", "--model", folder, "--json"]
    options = ["--layers", "1,2", "--rate", "0.1,0.5", "--length", "4", "--stride", "3", "--reset", "never"]
    assert main([*command, *options, "--buckets", "0,3,6", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    whole = json.loads(out.splitlines()[-1])
    assert whole["rates"] == [0.0, 0.1, 0.5]
    assert [(text["name"], text["tokens"]) for text in whole["texts"]] == [("sky.txt", 7), ("who is red ?", 3)]
    assert [(b["from"], b["to"], b["tokens"]) for b in whole["buckets"]] == [(0, 3, 2), (3, 6, 3), (6, None, 5)]
    assert whole["standard_error"] == [None] * 3
    assert whole["model"] == folder
    assert out.splitlines()[0].split() == ["position", "tokens", "frozen", "0.1", "0.5"]
    assert json.loads((tmp_path / "out" / "perplexity.json").read_text()) == whole
    assert (tmp_path / "out" / "perplexity.png").stat().st_size > 10_000
    assert main([*command, "--tokens", "3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "0.1"], "--rate needs --layers"),
        (["--gamma", "2", "--layers", "1"], "--gamma does not belong to --rule hebbian"),
        (["--length", "500"], "expected a whole number from 1 to 256"),
        (["--tokens", "1"], "--tokens 1: expected 2 or more"),
        (["--layers", "9"], "layer 9 does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(folder, capsys, options, message):  # noqa: F811
    assert main(["eval-ppl", "the sky is blue", "--model", folder, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_gamma_of_the_command_is_the_target_and_the_rate_the_step(folder, capsys):  # noqa: F811
    command = ["eval-ppl", "the sky is blue", "--model", folder, "--layers", "1", "--json"]
    assert main([*command, "--rule", "local-least-squares", "--target", "slow", "--gamma", "3", "--rate", "0.2,1"]) == 0
    rule = json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]["rule"]
    assert rule.startswith("LocalLeastSquares(gamma=3.0,")
    assert "rate=(0.2, 1.0)" in rule
