"""Learned rules: modulated events against a dense loop, lives that lower the loss, files to the bit, the command."""

import json
import random
from dataclasses import dataclass

import pytest
import torch
from dense import F64, DenseLlama, Spec, silu
from test_cli import folder  # noqa: F401 (a fixture)
from tiny import CONFIG, prompt, tiny
from torch import Tensor

import fastweights as fw
from fastweights.__main__ import main
from fastweights.benchmarks.learned import CONTROL, Static, learn_static, summary
from fastweights.rules import event, key_of

D, O = CONFIG["hidden_size"], CONFIG["intermediate_size"]
LINEARS = ("gate_proj", "up_proj")
BY_HAND = {
    "hebbian": fw.Hebbian(0.2, mu=0.1, decay=0.05, bias=True),
    "slow": fw.LocalLeastSquares(gamma=0.4, rate=0.5, mu=0.1, target="slow", gate="derivative"),
    "self": fw.LocalLeastSquares(gamma=0.3, mu=0.1, clip=0.02, gate="positive"),
}


def moved(model, rule, layers=(1, 2), linears=LINEARS, **options):
    """A learned rule whose parameters are not those that it began with."""
    learned = fw.Learned.of(model, rule, layers, linears, **options).to(model.dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return learned


class Modulated(DenseLlama):
    """u kᵀ of one linear is weighed by weights[layer, name](h)."""

    def linear(self, layer, name, prefix, h, phi, write):
        self.h = h
        return super().linear(layer, name, prefix, h, phi, write)


def dense_of(model, learned: fw.Learned, frozen: dict[str, Tensor]):
    """The loop that a learned rule's equations describe, with its parameters as leaves."""
    loop = Modulated(frozen, CONFIG, {})

    def spec(layer, name):
        part, form = learned.parts[f"{layer}-{name}"], learned.form
        phi = silu if name == "gate_proj" else lambda a: a

        def slope(a):
            s = 1 / (1 + torch.exp(-a))
            return s + a * s * (1 - s) if name == "gate_proj" else torch.ones_like(a)

        gates = {"ones": lambda a: 1.0, "positive": lambda a: (phi(a) > 0).double(), "derivative": slope}
        gate = gates[form["gate"]]
        rate = form["rate"] * part.rates.double().reshape(-1)

        def value(a, a0, position):
            h = loop.h
            m = 1.0
            if part.weight is not None:
                m = 2 / (1 + torch.exp(-(part.weight.double() @ h / (h @ h).sqrt() + part.shift.double())))
            if form["target"] == "slow":
                gamma = form["gamma"] * part.gammas.double().reshape(-1)
                return m * (gamma * gate(a0) * phi(a0) - (a - a0))
            return m * form["gamma"] * gate(a) * phi(a)

        decay = 0.0 if part.theta is None else 1 / (1 + torch.exp(-part.theta.double()))
        return Spec(value, rate, form["mu"], decay, form["clip"], form["bias"])

    loop.plastic = {address: spec(*address) for address in learned.addresses}
    loop.dW, loop.db = dict.fromkeys(loop.plastic, 0.0), dict.fromkeys(loop.plastic, 0.0)
    return loop


@pytest.mark.parametrize("per", ["neuron", "layer"])
@pytest.mark.parametrize("name", BY_HAND)
def test_a_learned_rule_is_the_naive_loop_with_and_without_a_graph_and_so_are_its_gradients(name, per):
    model, ids = tiny(), prompt(1, 9)
    learned = moved(model, BY_HAND[name], per=per)
    loop = dense_of(model, learned, {k: v.detach() for k, v in model.state_dict().items()})
    wanted = loop.feed(ids[0])
    fw.attach(model, learned.layers, learned, learned.linears, overflow="grow")
    whole, split, graphed = (fw.Episode(model) for _ in range(3))
    logits = graphed.feed(ids, graph=True)
    parts = [split.feed(ids[:, t : t + 1]) for t in range(9)]  # token by token
    for found in (whole.feed(ids), torch.cat(parts, 1), logits):
        torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-9)
    assert not whole.feed([[3]]).requires_grad
    assert graphed.why.keys() <= {"cuda", "cpu"}
    weights = torch.randn(wanted.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    named = dict(learned.named_parameters())
    ours = torch.autograd.grad((logits[0] * weights).sum(), list(named.values()))
    theirs = torch.autograd.grad((wanted * weights).sum(), list(named.values()))
    for one, other, key in zip(ours, theirs, named, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda said, key=key: f"{key}: {said}")
    assert all(float(gradient.abs().max()) > 1e-6 for gradient in ours)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_learned_rule_in_float32_is_that_in_float64(name):
    ids = prompt(2, 40)
    outs = []
    for dtype in (torch.float64, torch.float32):
        model = tiny(dtype)
        learned = moved(model, BY_HAND[name])
        fw.attach(model, learned.layers, learned, learned.linears, overflow="grow")
        outs.append(fw.Episode(model, 2).feed(ids).double())
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=2e-4)


@dataclass(frozen=True)
class Weighed(fw.Hebbian):
    """A rule that the kernels know, weighed by a function of its input."""

    def modulation(self, h: Tensor) -> Tensor:
        return torch.tanh(h[..., 0])


def test_a_modulation_is_a_factor_of_the_key_its_norm_and_its_bias():
    h, value = torch.randn(2, 3, 5, dtype=F64), torch.randn(2, 3, 4, dtype=F64)
    for clip in (None, 0.05):
        numbers = {"rate": 0.3, "mu": 0.1, "bias": True, "clip": clip}
        ours, bare = event(Weighed(**numbers), h, value), event(fw.Hebbian(0.3, mu=0.1, bias=True), h, value)
        m = torch.tanh(h[..., 0])
        torch.testing.assert_close(ours.k, m[..., None] * bare.k)
        torch.testing.assert_close(ours.bias, m * bare.bias)
        norms = ours.u.abs() * ours.k.norm(dim=-1, keepdim=True)
        assert float(norms.max()) <= (clip or 9) + 1e-12
        if clip is None:
            torch.testing.assert_close(ours.u, bare.u)
    rule = fw.Hebbian()
    object.__setattr__(rule, "modulation", lambda h: h[..., :1])
    with pytest.raises(ValueError, match=r"modulation gave shape \[2, 3, 1\], expected one of \[2, 3\]"):
        key_of(rule, h.square().sum(-1), h)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shared", [False, True])
def test_a_modulated_twin_gives_one_number_in_one_pass_token_by_token_and_with_a_graph(dtype, shared):
    model, ids = tiny(dtype), prompt(2, 12)
    fw.attach(model, [1, 2], Weighed(0.4, mu=0.1, decay=0.1, bias=True), overflow="grow")
    whole, split, graphed = (fw.Episode(model, 2, shared=shared) for _ in range(3))
    wanted = whole.feed(ids)
    found = torch.cat([split.feed(ids[:, t : t + 1]) for t in range(12)], 1)
    close = {"rtol": 0, "atol": 1e-9 if dtype == F64 else 2e-5}
    torch.testing.assert_close(found, wanted, **close)
    torch.testing.assert_close(graphed.feed(ids, graph=True), wanted, **close)
    fw.detach(model)
    fw.attach(model, [1, 2], fw.Hebbian(0.4, mu=0.1, decay=0.1, bias=True), overflow="grow")
    assert (fw.Episode(model, 2, shared=shared).feed(ids) - wanted).abs().max() > 1e-3


def test_a_gradient_rule_with_a_modulation_is_refused():
    rule = fw.GradientAscent(0.1)
    object.__setattr__(rule, "modulation", lambda h: h[..., 0])
    with pytest.raises(ValueError, match="GradientAscent is a gradient rule with a modulation"):
        fw.attach(tiny(), [1], rule)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_learned_rule_begins_as_the_rule_set_by_hand(name):
    model, ids = tiny(), prompt(2, 11)
    outs = []
    for rule in (BY_HAND[name], fw.Learned.of(model, BY_HAND[name], [1, 2])):
        fw.attach(model, [1, 2], rule, overflow="grow")
        outs.append(fw.Episode(model, 2).feed(ids))
        fw.detach(model)
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-7)


def test_a_saved_rule_reloads_to_the_bit_and_broken_folders_are_refused(tmp_path):
    model, ids = tiny(torch.float32), prompt(1, 20)
    learned = moved(model, BY_HAND["slow"])
    learned.seen = {"step": 3}
    learned.save(tmp_path / "rule")
    again = fw.rules.load(tmp_path / "rule")
    assert (again.form, again.per, again.modulated, again.seen) == (learned.form, "neuron", True, {"step": 3})
    for key, tensor in learned.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])
    outs = []
    for rule in (learned, again):
        fw.attach(model, rule.layers, rule, rule.linears)
        outs.append(fw.Episode(model).feed(ids))
        fw.detach(model)
    assert torch.equal(*outs)
    with pytest.raises(FileNotFoundError, match=r"rule\.json does not exist, expected a folder that fw\.learn"):
        fw.rules.load(tmp_path)
    moved(model, BY_HAND["slow"], [1]).save(tmp_path / "other")
    (tmp_path / "other" / "rule.json").write_bytes((tmp_path / "rule" / "rule.json").read_bytes())
    with pytest.raises(ValueError, match="is not a whole learned rule"):
        fw.rules.load(tmp_path / "other")
    other = moved(model, BY_HAND["slow"])
    torch.nn.init.zeros_(next(other.parameters()))
    other.save(tmp_path / "other")
    (tmp_path / "other" / "rule.json").write_bytes((tmp_path / "rule" / "rule.json").read_bytes())
    with pytest.raises(ValueError, match=r"does not hold the parameters that rule\.json names"):
        fw.rules.load(tmp_path / "other")


def test_a_saved_episode_knows_the_parameters_of_its_rule(tmp_path):
    model, path = tiny(torch.float32), tmp_path / "episode.safetensors"
    learned = moved(model, BY_HAND["slow"])
    fw.attach(model, learned.layers, learned, learned.linears)
    episode = fw.Episode(model)
    episode.feed([3, 4, 5])
    episode.save(path)
    assert torch.equal(fw.Episode.load(model, path).feed([[6]]), episode.feed([[6]]))
    with torch.no_grad():
        learned.parts["1-up_proj"].weight[3] += 1e-3
    with pytest.raises(ValueError, match=r"was saved with 1\.gate_proj: Plasticity"):
        fw.Episode.load(model, path)


def test_what_a_learned_rule_cannot_be_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="begins as a Hebbian or LocalLeastSquares, and got a GradientAscent"):
        fw.Learned.of(model, fw.GradientAscent(), [1])
    with pytest.raises(ValueError, match="with rate 0, expected one to begin with"):
        fw.Learned.of(model, fw.Hebbian(0.0), [1])
    with pytest.raises(ValueError, match="with several rates"):
        fw.Learned.of(model, fw.Hebbian((0.1, 0.2)), [1])
    with pytest.raises(ValueError, match="layer 4 does not exist: this model has layers 0 to 3"):
        fw.Learned.of(model, fw.Hebbian(), [4])
    learned = fw.Learned.of(model, fw.Hebbian(), [1], ["up_proj"])
    with pytest.raises(ValueError, match="has nothing for layer 2 'up_proj'; it has 1 up_proj"):
        fw.attach(model, [1, 2], learned, ["up_proj"])
    with pytest.raises(ValueError, match=r"has a linear \[52, 24\] at .*, but the model's is \[60, 24\]"):
        fw.attach(tiny(intermediate_size=60), [1], learned, ["up_proj"])


def test_a_learned_rule_has_rates_per_row_in_perplexity():
    model, text = tiny(), prompt(1, 20, seed=3)[0].tolist()
    learned = moved(model, BY_HAND["slow"])
    found = fw.perplexity(model, [text], learned, learned.layers, linears=learned.linears, overflow="grow")
    assert found.rates == [0.0, 1.0]
    frozen = fw.perplexity(model, [text])
    torch.testing.assert_close(found.losses[0][:1], frozen.losses[0], rtol=0, atol=1e-12)
    loop = dense_of(model, learned, {k: v.detach() for k, v in model.state_dict().items()})
    loss = -loop.feed(text).detach().log_softmax(-1)[range(19), text[1:]]
    torch.testing.assert_close(found.losses[0][1], loss, rtol=0, atol=1e-9)


# ---- learning


def patterns(seed: int, count: int = 40) -> list[int]:
    """Six tokens, said four times, and then six others: what a life could learn to foresee."""
    dice, ids = random.Random(seed), []
    for _ in range(count):
        ids += [dice.randrange(2, 61) for _ in range(6)] * 4
    return ids


def learned_by(model=None, rule=None, texts=None, **options):
    defaults = {"length": 24, "lives": 4, "steps": 8, "lr": 0.1, "every": 4, "samples": 4}
    model = model or tiny(torch.float32)
    rule = rule or fw.LocalLeastSquares(gamma=0.1, rate=0.3, mu=0.1, target="slow", decay=0.02)
    return fw.learn(model, texts or [patterns(1)], rule, [1, 2], **{**defaults, **options})


def test_learning_lowers_the_loss_of_held_out_patterns_and_leaves_the_model_alone():
    model = tiny(torch.float32)
    model.lm_head.weight.requires_grad_(True)
    asked = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    how = {"steps": 30, "every": 10, "lr": 0.15, "samples": 8, "lives": 8}
    found = learned_by(model, fw.Hebbian(0.1, mu=0.1), held_out=[patterns(2)], **how)
    assert found.held_out[30] < found.held_out[0] - 0.1
    assert found.held_out[30] < found.frozen - 0.03
    assert (found.step, found.stopped, len(found.losses)) == (30, False, 30)
    assert not any(parameter.requires_grad for parameter in found.rule.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(type(module).__name__ == "PlasticLinear" for module in model.modules())
    fw.attach(model, found.rule.layers, found.rule, found.rule.linears)  # free to be attached again


def test_a_run_that_was_interrupted_goes_on_to_the_bit(tmp_path):
    held = {"held_out": [patterns(2)], "feed": 8, "carry": 2, "lives": 2, "samples": 2}
    whole = learned_by(**held, out=tmp_path / "whole")

    def tired(done, steps):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned_by(**held, out=tmp_path / "parts", progress=tired)
    again = learned_by(**held, out=tmp_path / "parts")
    assert again.losses == whole.losses
    assert again.held_out == whole.held_out
    for name in ("rule.safetensors", "rule.json", "state.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert fw.rules.load(tmp_path / "parts").digest == again.rule.digest
    ended = learned_by(**held, out=tmp_path / "parts")
    assert ended.losses == whole.losses
    assert learned_by(**held, seed=1).losses != whole.losses
    with pytest.raises(ValueError, match=r"is of a run with lr 0\.1, this one has 0\.2"):
        learned_by(**held, lr=0.2, out=tmp_path / "parts")
    with pytest.raises(ValueError, match="is at step 8, and steps=4 were asked for"):
        learned_by(**held, steps=4, out=tmp_path / "parts")


def test_carried_feeds_have_the_gradients_of_one_and_cuts_have_others():
    losses = [learned_by(steps=3, **how).losses for how in ({}, {"feed": 7}, {"feed": 7, "carry": 1})]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[2][0] == pytest.approx(losses[0][0], abs=1e-5)
    assert abs(losses[2][2] - losses[0][2]) > 1e-4


def test_it_ends_where_nothing_gets_better():
    found = learned_by(lr=0.0, steps=20, every=2, patience=3, held_out=[patterns(2)])
    assert (found.stopped, found.step, len(found.losses)) == (True, 0, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 300}, r"learn\(length=300\): expected a whole number from 1 to 256"),
        ({"feed": 25}, r"learn\(feed=25\): expected a whole number from 1 to 24"),
        ({"steps": 0}, r"learn\(steps=0\): expected a whole number from 1"),
        ({"lr": -1.0}, r"learn\(lr=-1.0\): expected a number from 0"),
        ({"texts": [[1, 2, 3]]}, r"learn\(\) got 3 tokens in texts\[0\], expected 25 or more, a life"),
        ({"held_out": [patterns(2)], "steps": 9}, r"learn\(steps=9, every=4\): expected a multiple"),
        ({"rule": fw.Hebbian(1e30)}, "step 1 of learning: .*non-finite factor.*; a smaller lr or rate may help"),
        ({"per": "token"}, r"Learned\(per='token'\): expected one of 'neuron', 'layer'"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_left_as_it_was(options, message):
    model = tiny(torch.float32)
    with pytest.raises(ValueError, match=message):
        learned_by(model, **options)
    assert not any(type(module).__name__ == "PlasticLinear" for module in model.modules())


# ---- the benchmark


def test_the_control_begins_as_the_model_and_ends_with_its_block():
    model, ids = tiny(torch.float32), prompt(1, 9)
    static, wanted = Static(model, [1, 2], LINEARS), model(ids)
    with static.on():
        assert torch.equal(model(ids), wanted)
        found = learn_static(model, static, lambda step: ids, ids.repeat(2, 1), steps=3, lr=0.05, every=1)
    assert list(found) == [0, 1, 2, 3]
    assert found[3] < found[0]
    assert sum(parameter.numel() for parameter in static.parameters()) == 2 * 4 * O
    with static.on():
        assert (model(ids) - wanted).detach().abs().max() > 1e-3
    assert torch.equal(model(ids), wanted)


def test_a_summary_holds_paired_differences_and_intervals_that_cover_their_mean():
    generator = torch.Generator().manual_seed(0)
    frozen = torch.rand(12, 40, generator=generator, dtype=F64)
    losses = {"frozen": frozen, "other": frozen + 0.25, CONTROL: frozen + torch.rand(12, 1, generator=generator)}
    found = summary(losses, (0, 32, 128))
    assert [(row["from"], row["to"]) for row in found["other"]] == [(0, 32), (32, 40), (0, 40)]
    for row in found["other"]:
        assert row["frozen"]["difference"] == pytest.approx(0.25)
        assert row["frozen"]["interval"] == pytest.approx((0.25, 0.25))
        low, high = row[CONTROL]["interval"]
        assert low < row[CONTROL]["difference"] < high
    assert found["other"][2]["perplexity"] == pytest.approx(float((frozen.mean() + 0.25).exp()))


# ---- the command


def words(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for n in range(2):
        (texts / f"{n}.txt").write_text("the sky is blue and so it goes " * 10)
    return f"@{texts}"


def test_the_command_learns_and_every_other_command_takes_the_folder(folder, capsys, tmp_path):  # noqa: F811
    out, texts = str(tmp_path / "out"), words(tmp_path)
    command = ["learn", texts, "--held-out", texts, "--out", out, "--model", folder, "--layers", "1,2", "--rate", "0.1"]
    assert main([*command, "--length", "16", "--steps", "4", "--every", "2", "--samples", "2", "--json"]) == 0
    said = capsys.readouterr().out
    whole = json.loads(said.splitlines()[-1])
    assert len(whole["losses"]) == 4
    assert list(whole["held_out"]) == ["0", "2", "4"]
    assert f"saved to {out}: rule.json, rule.safetensors, state.safetensors" in said
    common = ["--model", folder, "--rule", out, "--json"]
    assert main(["generate", "the sky", "--max-new-tokens", "3", *common]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["events"] == 3
    assert main(["eval-ppl", "the sky is blue and so", *common]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rates"] == [0.0, 1.0]
    run = ["run", "--context", "the sky is red", "--question", "who ?", "--answers", "A,B", "--layers", "1"]
    assert main([*run, *common]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]["rule"].startswith("Learned(")
    assert main([*command[:-4], "--rule", out, "--length", "16", "--steps", "4", "--every", "2", "--samples", "2"]) == 2
    assert "is of a run with start" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "learn needs --layers, or a learned rule to go on from"),
        (["--layers", "1", "--rate", "0.1,0.2"], "--rate 0.1,0.2: learn begins with one rate"),
        (["--layers", "1", "--rule", "gradient-ascent", "--length", "3"], "begins as a Hebbian or LocalLeastSquares"),
        (["--layers", "1"], "tokens in texts[0], expected 257 or more, a life"),
        (["--rule", "nowhere"], "expected hebbian, local-least-squares, delta, gradient-ascent, or a folder"),
        (["--rule", "tests"], "expected a folder that fw.learn or save() wrote"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(folder, capsys, tmp_path, options, message):  # noqa: F811
    (tmp_path / "tests").mkdir()
    options = [str(tmp_path / "tests") if option == "tests" else option for option in options]
    command = ["learn", "the sky is blue", "--out", str(tmp_path / "out"), "--model", folder, *options]
    try:
        status = main(command)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
