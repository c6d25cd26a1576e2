"""Gradients through a life: feed(graph=...) against plain autograd through a dense loop, token by token."""

import gc
import math
import weakref

import pytest
import torch
from dense import F64, DenseGPT2, DenseLlama, Spec, silu, silu_slope
from family_models import MODELS, pairs
from tiny import CONFIG, prompt, tiny
from torch import Tensor, nn

import fastweights as fw
from fastweights.config import LlamaConfig
from fastweights.kernels import adjoint
from fastweights.model import Llama

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
B, T, O, D = 2, 7, CONFIG["intermediate_size"], CONFIG["hidden_size"]
IDS = prompt(B, T)
LINEARS = ("gate_proj", "up_proj")


def leaf(value, *shape, seed=0) -> Tensor:
    """A number, or numbers around it, that ask for a gradient."""
    noise = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)) if shape else 0.0
    return (value * (1 + 0.3 * noise) + torch.zeros(shape, dtype=F64)).requires_grad_()


def phi(name):
    return silu if name == "gate_proj" else lambda a: a


def slope_of(name):
    return silu_slope if name == "gate_proj" else torch.ones_like


class Gain(nn.Module):
    """A value of one's own: u = exp(raw) · tanh(gain ⊙ z + shift) with parameters of its own."""

    mu, decay, clip, bias, neuron_local = 1e-6, 0.05, None, False, True

    def __init__(self):
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(-1.0, dtype=F64))
        self.gain, self.shift = nn.Parameter(leaf(1.0, O, seed=1).detach()), nn.Parameter(leaf(0.2, O, seed=2).detach())

    @property
    def rate(self):
        return self.raw.exp()

    def value(self, a, z, at):
        return torch.tanh(self.gain * z + self.shift)


def hebbian(gate="ones", **numbers):
    def value(name):
        def of(row):
            gates = {
                "ones": lambda a: phi(name)(a),
                "positive": lambda a: (phi(name)(a) > 0) * phi(name)(a),
                "derivative": lambda a: slope_of(name)(a) * phi(name)(a),
            }
            return lambda a, a0, p: gates[gate](a)

        return of

    return fw.Hebbian(gate=gate, **numbers), value, numbers


def of_row(number, row):
    """A rule's number as it is in one row."""
    if not isinstance(number, Tensor) or number.dim() == 0:
        return number
    return number[row if len(number) > 1 else 0]


def squares(target, gate="ones", **numbers):
    gamma = numbers.pop("gamma")

    def value(name):
        def of(row):
            def gated(a):
                return (phi(name)(a) > 0) * phi(name)(a) if gate == "positive" else phi(name)(a)

            g = of_row(gamma, row)
            return lambda a, a0, p: g * gated(a) if target == "self" else g * gated(a0) - (a - a0)

        return of

    rule = fw.LocalLeastSquares(gamma=gamma, target=target, gate=gate, **numbers)
    return rule, value, {"rate": 1.0, **numbers, "_gamma": gamma}


def delta(beta, target, **numbers):
    def value(name):
        def of(row):
            def value(a, a0, p):
                goal = target if target.dim() == 1 else target[p] if target.dim() == 2 else target[row, p]
                return of_row(beta, row) * (goal - a)

            return value

        return of

    return fw.Delta(beta, target, **numbers), value, {"rate": 1.0, **numbers, "_beta": beta, "_target": target}


def module():
    rule = Gain()

    def value(name):
        return lambda row: lambda a, a0, p: torch.tanh(rule.gain * phi(name)(a) + rule.shift)

    return rule, value, {"rate": lambda: rule.raw.exp(), "decay": 0.05, "_": [rule.raw, rule.gain, rule.shift]}


CASES = {
    "a rate": lambda: hebbian(rate=leaf(0.4)),
    "every number": lambda: hebbian(rate=leaf(0.4), mu=leaf(0.3), decay=leaf(0.1), clip=leaf(0.05), bias=True),
    "positive, clip and zeros": lambda: hebbian("positive", rate=leaf(0.4), clip=leaf(0.05)),
    "derivative, a plain decay": lambda: hebbian("derivative", rate=leaf(0.4), decay=0.2),
    "a rate per row": lambda: hebbian(rate=leaf(0.4, B), bias=True),
    "a rate per neuron": lambda: hebbian(rate=leaf(0.4, 1, O), decay=leaf(0.05)),
    "a rate per row and neuron": lambda: hebbian(rate=leaf(0.4, B, O), clip=0.1),
    "key h itself": lambda: hebbian(rate=leaf(0.02), mu=None, bias=True),
    "squares": lambda: squares("self", gamma=leaf(0.3, 1, O), rate=leaf(0.9)),
    "squares, slow": lambda: squares("slow", gamma=leaf(0.3, B), rate=leaf(0.9), decay=leaf(0.1), bias=True),
    "squares, slow and positive": lambda: squares("slow", "positive", gamma=leaf(0.3), clip=leaf(0.2)),
    "delta": lambda: delta(leaf(0.4), leaf(1.0, O, seed=3), decay=leaf(0.1)),
    "delta by position": lambda: delta(leaf(0.4, 1, O), leaf(1.0, T, O, seed=3)),
    "delta by row and position": lambda: delta(leaf(0.4, B), leaf(1.0, B, T, O, seed=3), rate=leaf(0.8, B)),
    "a module": module,
}


def pieces(numbers):
    """All leaves among a rule's numbers."""
    flat = [x for n in numbers.values() for x in (n if isinstance(n, list) else [n])]
    return [x for x in flat if isinstance(x, Tensor) and x.requires_grad]


def lives(model, case, kind=DenseLlama, config=CONFIG, layers=(1, 2), linears=LINEARS):
    """A dense life of each row, of the model's own parameters and the case's own leaves."""
    _, value, numbers = case
    weights, found = dict(model.named_parameters()), []
    for row in range(B):
        own = {n: of_row(x() if callable(x) else x, row) for n, x in numbers.items() if not n.startswith("_")}
        plastic = {(layer, n): Spec(value(n)(row), **own) for layer in layers for n in linears}
        found.append(kind(weights, config, plastic))
    return found


def theirs_of(dense) -> Tensor:
    """Logits [B, T, V] of the whole prompt."""
    return torch.stack([one.feed(row) for one, row in zip(dense, IDS, strict=True)])


def plastic(case, layers=(1, 2), linears=LINEARS, model=None, **options):
    model = model or tiny()
    fw.attach(model, layers=layers, rule=case[0], linears=linears, overflow="grow", **options)
    return model


def loss_of(logits, seed=5):
    w = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(seed))
    return (logits * w).sum()


def compare(ours, theirs, leaves):
    """Logits and the gradients of one loss of them."""
    torch.testing.assert_close(ours.detach(), theirs.detach(), **CLOSE)
    mine = torch.autograd.grad(loss_of(ours), leaves)
    exact = torch.autograd.grad(loss_of(theirs), leaves, retain_graph=True)
    for a, b in zip(mine, exact, strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_every_rule_are_those_of_the_dense_loop(name):
    case = CASES[name]()
    model = plastic(case)
    write = torch.ones(B, T, dtype=torch.bool)
    write[0, 2] = write[1, 4] = write[1, 5] = False  # gaps
    ours = fw.Episode(model, B).feed(IDS, update=write, graph=True)
    dense = lives(model, case)
    compare(ours, torch.stack([one.feed(*row) for one, *row in zip(dense, IDS, write, strict=True)]), pieces(case[2]))


@pytest.mark.parametrize("split", [[7], [1, 1, 1, 1, 1, 1, 1], [3, 4], [1, 5, 1]], ids=str)
@pytest.mark.parametrize("name", ["every number", "squares, slow", "a module"])
def test_any_split_of_a_carried_prompt_has_the_gradients_of_the_whole(name, split):
    case = CASES[name]()
    model = plastic(case, layers=(1, 2, 3))
    slow = [model.get_parameter("model.layers.0.self_attn.v_proj.weight").requires_grad_()]
    episode, parts = fw.Episode(model, B), []
    for ids in IDS.split(split, 1):
        parts.append(episode.feed(ids, graph="carry"))
    dense = lives(model, case, layers=(1, 2, 3))
    compare(
        torch.cat(parts, 1),
        theirs_of(dense),
        slow + pieces(case[2]),
    )


@pytest.mark.parametrize("name", ["every number", "squares, slow", "delta by row and position"])
def test_what_was_before_a_graph_or_a_cut_is_a_constant_that_decays(name):
    case = CASES[name]()
    model = plastic(case)
    fresh, cut = fw.Episode(model, B), fw.Episode(model, B)
    fresh.feed(IDS[:, :3])
    cut.feed(IDS[:, :2], graph="carry")
    cut.feed(IDS[:, 2:3], graph="carry")
    cut.cut()
    dense = lives(model, case)
    for one, row in zip(dense, IDS, strict=True):
        one.feed(row[:3])
        one.cut()
    theirs = torch.stack([one.feed(row[3:]) for one, row in zip(dense, IDS, strict=True)])
    for episode in (fresh, cut):
        compare(episode.feed(IDS[:, 3:], graph=True), theirs, pieces(case[2]))


def test_reads_without_writes_carry_the_graph_of_earlier_events():
    case = hebbian(rate=leaf(0.4), decay=leaf(0.1), bias=True)
    model = plastic(case)
    episode = fw.Episode(model, B)
    first = episode.feed(IDS[:, :4], graph="carry")
    second = episode.feed(IDS[:, 4:], update="none", graph="carry")
    writes = [True] * 4 + [False] * 3
    theirs = torch.stack([one.feed(row, writes) for one, row in zip(lives(model, case), IDS, strict=True)])
    compare(torch.cat([first, second], 1), theirs, pieces(case[2]))


@pytest.mark.parametrize("carry", [False, True])
def test_a_padded_row_has_the_gradients_of_that_row_alone(carry):
    case = hebbian(rate=leaf(0.4, B), mu=leaf(0.3), decay=leaf(0.1), clip=leaf(0.05), bias=True)
    model = plastic(case)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, :2] = mask[0, 5] = mask[1, 4] = 0
    episode = fw.Episode(model, B)
    if carry:
        parts = [episode.feed(IDS[:, p], attention_mask=mask[:, p], graph="carry") for p in (slice(3), slice(3, None))]
    else:
        parts = [episode.feed(IDS, attention_mask=mask, graph=True)]
    real = mask.bool()
    ours = torch.cat(parts, 1)[real]
    dense = lives(model, case)
    compare(
        ours, torch.cat([one.feed(row[keep]) for one, row, keep in zip(dense, IDS, real, strict=True)]), pieces(case[2])
    )


def test_gradients_of_slow_weights_go_through_every_read_and_write():
    case = squares("slow", gamma=leaf(0.3), decay=0.1, bias=True)
    model = plastic(case, linears=("gate_proj", "up_proj"))
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight")
    slow = [model.get_parameter(name).requires_grad_() for name in (*names, "model.layers.2.input_layernorm.weight")]
    ours = fw.Episode(model, B).feed(IDS, graph=True)
    dense = lives(model, case)
    compare(ours, theirs_of(dense), [*slow, *pieces(case[2])])


def test_another_family_and_its_only_input_linear():
    torch.manual_seed(0)
    config = {"hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 3, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 4, "head_dim": 6, "max_position_embeddings": 32, "vocab_size": 61}
    config |= {"rms_norm_eps": 1e-5, "rope_theta": 1e4}
    more = {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_tanh", "tie_word_embeddings": True}
    model = Llama(LlamaConfig(**config, **more, model_type="gpt2")).to(F64)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=F64) * 0.3
    rate, decay, shift = leaf(0.3), leaf(0.1), leaf(0.3, 24, seed=4)
    fw.attach(model, layers=[0, 1], linears="c_fc", rule=fw.Hebbian(rate=rate, decay=decay))
    fw.attach(model, layers=[0, 1], linears="c_proj", rule=fw.Delta(0.2, shift, bias=True))
    slow = model.get_parameter("transformer.h.0.attn.c_attn.weight").requires_grad_()
    gelu = lambda a, a0, p: nn.functional.gelu(a, approximate="tanh")  # noqa: E731
    own = {(layer, "c_fc"): Spec(gelu, rate, decay=decay) for layer in (0, 1)}
    own |= {(layer, "c_proj"): Spec(lambda a, a0, p: 0.2 * (shift - a), bias=True) for layer in (0, 1)}
    dense = [DenseGPT2(dict(model.named_parameters()), config, own) for _ in range(B)]
    theirs = theirs_of(dense)
    compare(fw.Episode(model, B).feed(IDS, graph=True), theirs, [rate, decay, shift, slow])
    carried = fw.Episode(model, B)
    parts = [carried.feed(ids, graph="carry") for ids in IDS.split([2, 5], 1)]
    compare(torch.cat(parts, 1), theirs, [rate, decay, shift, slow])


@pytest.mark.parametrize("name", MODELS)
def test_central_differences_in_every_family(name):
    """All linears of the MLP; the way along a random direction of three numbers, and the same of a carried split."""
    model = pairs(name)[0].to(F64)
    ids, numbers = torch.randint(131, (B, 9), generator=torch.Generator().manual_seed(0)), (0.02, 0.1, 0.5)
    rate, decay, mu = leaves = [leaf(number) for number in numbers]
    fw.attach(model, layers=[0, 1], rule=fw.Hebbian(rate=rate, decay=decay, mu=mu, bias=True), overflow="grow")

    def life(graph, *parts):
        episode = fw.Episode(model, B)
        return loss_of(torch.cat([episode.feed(part, graph=graph) for part in ids.split(parts, 1)], 1))

    def moved(by):
        with torch.no_grad():
            for number, value in zip(leaves, numbers, strict=True):
                number.fill_(value * (1 + by))
        return life(False, 9)

    difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
    plain, whole, carried = moved(0.0), life(True, 9), life("carry", 2, 1, 6)
    torch.testing.assert_close(whole.detach(), plain, **CLOSE)
    found, split = (torch.autograd.grad(loss, leaves) for loss in (whole, carried))
    along = sum(gradient * value for gradient, value in zip(found, numbers, strict=True))
    torch.testing.assert_close(difference, along, rtol=1e-6, atol=1e-6)
    for one, other in zip(found, split, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_a_state_that_was_folded_before_is_a_constant():
    """Against central differences of the same feed from the same snapshot."""
    rate, decay = leaf(0.3), 0.05
    model = tiny()
    fw.attach(model, layers=[1, 2], rule=fw.Hebbian(rate=rate, decay=decay), linears=LINEARS, rank=4)
    episode, ids = fw.Episode(model, B), prompt(B, 4, seed=4)
    episode.feed(prompt(B, 14, seed=3))
    assert max(error for log in episode.logs.values() for error in log.certificate(0)) > 0
    before = episode.snapshot()

    def fed(by):
        episode.restore(before)
        with torch.no_grad():
            rate.add_(by)
            out = episode.feed(ids)
            rate.sub_(by)
        return loss_of(out)

    out = fed(0.0)
    episode.restore(before)
    loss = loss_of(episode.feed(ids, graph=True))
    torch.testing.assert_close(loss.detach(), out, **CLOSE)
    (found,) = torch.autograd.grad(loss, rate)
    torch.testing.assert_close((fed(1e-5) - fed(-1e-5)) / 2e-5, found, rtol=1e-6, atol=1e-6)


def test_edits_are_made_in_a_graph_as_without_one_and_gradients_go_through_them():
    case = hebbian(rate=leaf(0.4), decay=leaf(0.1))
    model = plastic(case)
    strength = leaf(1.7)
    edit = fw.Edit("gate.read", lambda x, at: x * strength, layers=2)  # token by token
    dense = lives(model, case)
    for one in dense:
        one.change = lambda name, layer, x: x * strength if (name, layer) == ("gate_proj", 2) else x
    theirs = theirs_of(dense)
    episode = fw.Episode(model, B)
    compare(episode.feed(IDS, edits=[edit], graph=True), theirs, [strength, *pieces(case[2])])
    assert episode.state.carried is None
    direction = torch.randn(D, dtype=F64).requires_grad_()
    edit = fw.Edit("resid_pre", lambda x, at: x + direction, layers=1, positions=[1, 3])
    out = fw.Episode(model, B).feed(IDS, edits=[edit], graph=True)
    (found,) = torch.autograd.grad(loss_of(out), direction)
    step = torch.randn(D, dtype=F64)

    def moved(by):
        other = fw.Edit("resid_pre", lambda x, at: x + direction.detach() + by * step, layers=1, positions=[1, 3])
        return loss_of(fw.Episode(model, B).feed(IDS, edits=[other]))

    torch.testing.assert_close((moved(1e-5) - moved(-1e-5)) / 2e-5, found @ step, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_central_differences_through_the_public_calls(shared):
    """A long prompt: chunks and halves of the way back; and rows that share one ΔW."""
    ids, numbers = prompt(B, 70), {"rate": 0.1, "mu": 0.3, "decay": 0.02}

    def life(graph, parts=(70,), **changed):
        rule = fw.LocalLeastSquares(target="slow", gamma=numbers["rate"], bias=True, **{**numbers, **changed})
        episode = fw.Episode(plastic((rule,), linears=None), B, shared=shared)
        return torch.cat([episode.feed(part, graph=graph) for part in ids.split(parts, 1)], 1)

    leaves = {name: leaf(value) for name, value in numbers.items()}
    out = life(True, **leaves)
    found = torch.autograd.grad(loss_of(out), list(leaves.values()))
    torch.testing.assert_close(out.detach(), life(False), rtol=1e-11, atol=1e-11)
    split = torch.autograd.grad(loss_of(life("carry", (34, 1, 35), **leaves)), list(leaves.values()))
    for one, other in zip(found, split, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-8)
    for (name, value), gradient in zip(numbers.items(), found, strict=True):
        up, down = (loss_of(life(False, **{name: value + step})) for step in (1e-5, -1e-5))
        torch.testing.assert_close((up - down) / 2e-5, gradient, rtol=1e-6, atol=1e-6)


def test_the_way_back_is_that_of_autograd_through_the_loop_in_blocks_halves_and_leaves():
    T, generator = 300, torch.Generator().manual_seed(0)
    h, start, target = (torch.randn(2, T, n, dtype=F64, generator=generator).requires_grad_() for n in (6, 5, 5))
    scale, decay = leaf(0.1, 2, T), leaf(0.01)
    write = torch.rand(2, T, generator=generator) < 0.8
    rate = leaf(0.3, 5)

    def event(a, t0, t1):
        return rate * torch.tanh(target[:, t0:t1] - a)

    def graph():
        return adjoint.gram(h, h * scale[..., None], scale, write, decay)

    fast = adjoint.scan_with_graph(start, graph(), h, write, event, None, "torch")
    G, a, u = graph(), [], []
    for t in range(T):
        read = (G[:, t, :t, None] * torch.stack(u, 1)).sum(1) if u else 0.0
        a.append(start[:, t] + read)
        u.append(event(a[t][:, None], t, t + 1)[:, 0] * write[:, t, None])
    leaves = [h, start, target, scale, decay, rate]
    slow = (torch.stack(a, 1), torch.stack(u, 1))
    mine, exact = (torch.autograd.grad(loss_of(a) + loss_of(u, 6), leaves) for a, u in (fast, slow))
    for a, b in zip(mine, exact, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_a_graph_changes_no_number_of_a_life():
    """float32, where the scan and single tokens run in C without a graph."""
    for rule in (fw.Hebbian(rate=0.1, decay=0.05, clip=0.2), fw.Delta(0.2, torch.randn(O), bias=True)):
        model = tiny(torch.float32)
        fw.attach(model, layers=[1, 2], rule=rule, linears=LINEARS)
        episodes = plain, graphed, carried = [fw.Episode(model, B) for _ in range(3)]
        for ids in (prompt(B, 20), prompt(B, 1, seed=2), prompt(B, 5, seed=3)):
            how = zip(episodes, (False, True, "carry"), strict=True)
            expected, *others = (one.feed(ids, graph=graph) for one, graph in how)
            for other in others:
                torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-5)
        for one in (graphed, carried):
            assert one.event_counts == plain.event_counts
            assert one.token_ids == plain.token_ids
            assert not one.logits.requires_grad
            assert not any(log.U_BRO.requires_grad or log.K_BRI.requires_grad for log in one.logs.values())
            assert not any(x.requires_grad for x in (*one.cache.keys, *one.cache.values))
            for address, log in one.logs.items():
                expected = plain.logs[address].delta_weight(1)
                torch.testing.assert_close(log.delta_weight(1), expected, rtol=1e-5, atol=1e-6)
        assert graphed.why["cpu"] == "the pass has more than one token of each row"
        graphed.feed(prompt(B, 1), graph=True)
        assert graphed.why["cpu"] == "a graph is made by the modules"


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("asks", [False, True])
def test_tensors_as_numbers_are_the_plain_numbers_without_a_graph(dtype, asks):
    """A prompt, single tokens (in C, of a float32 model) and a probe."""

    def said(model):
        episode = fw.Episode(model, B)
        found = [episode.feed(IDS), *(episode.feed(row) for row in prompt(B, 3, seed=2).split(1, 1))]
        return [*found, episode.probe(IDS[:1]).logits]

    def tensor(x):
        return torch.as_tensor(x, dtype=dtype).requires_grad_(asks)

    plain = {"rate": 0.3, "mu": 0.2, "decay": 0.1, "clip": 0.4}
    expected = said(plastic((fw.Hebbian(**plain, bias=True),), model=tiny(dtype)))
    per_neuron = {**plain, "rate": torch.full((1, O), 0.3)}
    for numbers in (plain, per_neuron):
        rule = fw.Hebbian(**{name: tensor(x) for name, x in numbers.items()}, bias=True)
        found = said(plastic((rule,), model=tiny(dtype)))
        for a, b in zip(found, expected, strict=True):
            assert not a.requires_grad
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    rows = said(plastic((fw.Hebbian(rate=torch.tensor([0.3, 0.1])[:, None].expand(B, O)),), model=tiny(dtype)))
    expected = said(plastic((fw.Hebbian(rate=[0.3, 0.1]),), model=tiny(dtype)))
    for a, b in zip(rows, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_module_as_a_rule_is_no_part_of_the_model():
    model = tiny()
    before = set(model.state_dict())
    rule = Gain()
    fast = fw.attach(model, layers=[1], rule=rule, linears=LINEARS)
    assert set(model.state_dict()) == before
    assert not any(parameter is rule.raw for parameter in model.parameters())
    fast.linears[1, "up_proj"].rule = other = Gain()
    assert fast.linears[1, "up_proj"].rule is other
    assert set(model.state_dict()) == before


# ---- refusals


def test_what_cannot_be_differentiated_is_refused_by_name_and_nothing_changes():
    def refused(match, ids=IDS, graph=True, before=0, **options):
        rule = options.pop("rule", fw.Hebbian(rate=leaf(0.1)))
        model = tiny()
        fw.attach(model, layers=[1], rule=rule, linears="up_proj", **options)
        episode = fw.Episode(model, B)
        if before:
            episode.feed(prompt(B, before, seed=3))
        length, events = episode.length, episode.events
        with pytest.raises(ValueError, match=match):
            episode.feed(ids, graph=graph)
        assert (episode.length, episode.events, episode.state.carried) == (length, events, None)
        assert episode.cache.graphs is None

    name = r"feed\(graph=True\): layers.1.mlp.up_proj"
    refused(name + " has the gradient rule GradientAscent", rule=fw.GradientAscent(0.1))
    refused(name + " has a budget", budget=0.5)
    refused(name + r" would overflow \(rank 2, overflow='compress'\)", rank=2, before=4)
    refused(name + r" would overflow \(rank 6, overflow='evict'\)", rank=6, overflow="evict")
    refused("7 events do not fit its rank of 3", rank=3, overflow="error")
    refused("graph='all': expected True, False or 'carry'", graph="all")
    with torch.inference_mode():
        refused(r"inside torch.inference_mode\(\)")


def test_a_carried_graph_is_torn_by_no_other_feed():
    case = hebbian(rate=leaf(0.4))
    episode = fw.Episode(plastic(case), B)
    episode.feed(IDS, graph="carry")
    for graph in (False, True):
        with pytest.raises(ValueError, match=r'carries a graph: expected feed\(graph="carry"\), .* or cut\(\)'):
            episode.feed(IDS, graph=graph)
    with pytest.raises(ValueError, match="carries a graph"):
        next(episode.generate(IDS, 3))
    assert episode.length == T
    assert not episode.probe(IDS).logits.requires_grad
    copy, child = episode.snapshot(), episode.fork()
    assert copy.carried is child.state.carried is copy.cache.graphs is None
    assert not child.feed(IDS).requires_grad
    out = episode.feed(IDS, graph="carry")  # the copies have left it alone
    assert torch.autograd.grad(loss_of(out), case[2]["rate"])[0] != 0
    for ends in (episode.cut, episode.reset, lambda: episode.restore(copy), episode.undo):
        episode.cut()
        episode.feed(IDS, graph="carry")
        ends()
        assert episode.state.carried is episode.cache.graphs is None


def test_a_carried_feed_that_fails_leaves_the_graph_of_before():
    case = hebbian(rate=leaf(0.4), decay=leaf(0.1))
    model = plastic(case)
    episode = fw.Episode(model, B)
    first = episode.feed(IDS[:, :3], graph="carry")

    def interrupt(x, at):
        raise KeyboardInterrupt

    for site in ("resid_post", "gate.value"):
        with pytest.raises(KeyboardInterrupt):
            episode.feed(IDS[:, 3:], graph="carry", edits=[fw.Edit(site, interrupt, layers=2)])
        assert episode.length == 3
    second = episode.feed(IDS[:, 3:], graph="carry")
    theirs = theirs_of(lives(model, case))
    compare(torch.cat([first, second], 1), theirs, pieces(case[2]))
    other = fw.Episode(model, B)
    with pytest.raises(KeyboardInterrupt):
        other.feed(IDS, graph=True, edits=[fw.Edit("resid_post", interrupt, layers=2)])
    assert other.state.carried is other.cache.graphs is None
    assert not other.feed(IDS).requires_grad


def test_numbers_of_a_wrong_form_are_refused():
    for numbers, match in (
        ({"rate": torch.zeros(1, 2, 3)}, r"Hebbian\(rate=...\) is a tensor of shape \[1, 2, 3\]"),
        ({"decay": leaf(0.1, B)}, r"Hebbian\(decay=...\) is a tensor of shape \[2\]: expected \[\]"),
        ({"decay": leaf(1.5)}, r"Hebbian\(decay=1.5\): expected a number from 0 to 1"),
        ({"rate": leaf(math.inf, 1, O)}, "not finite"),
        ({"rate": torch.zeros(1, 3, dtype=torch.long)}, "a float dtype"),
    ):
        with pytest.raises(ValueError, match=match):
            fw.Hebbian(**numbers)
    with pytest.raises(ValueError, match=r"gate_proj: Hebbian has rate of shape \[1, 3\], but there are 52 neurons"):
        fw.Episode(plastic(hebbian(rate=leaf(0.1, 1, 3))), B)
    with pytest.raises(ValueError, match="LocalLeastSquares has 3 gammas, one per row, but this episode has batch 2"):
        fw.Episode(plastic(squares("self", gamma=leaf(0.1, 3))), B)


def test_a_decay_that_was_learned_in_the_middle_of_a_life_is_refused():
    decay = leaf(0.1)
    episode = fw.Episode(plastic(hebbian(rate=0.4, decay=decay)), B)
    episode.feed(IDS)
    with torch.no_grad():
        decay.mul_(2)
    with pytest.raises(ValueError, match=r"decay is 0.2 now, but the 7 events of this episode decay by 0.1"):
        episode.feed(IDS)
    episode.reset()
    fresh = fw.Episode(plastic(hebbian(rate=0.4, decay=0.2)), B)
    torch.testing.assert_close(episode.feed(IDS), fresh.feed(IDS), **CLOSE)
    with torch.no_grad():
        decay.fill_(-1)
    episode.reset()
    with pytest.raises(ValueError, match=r"Hebbian\(decay=-1.0\): expected a number from 0 to 1"):
        episode.feed(IDS)


def test_a_saved_episode_knows_the_tensors_of_its_rule(tmp_path):
    model = plastic(hebbian(rate=leaf(0.4, 1, O)))
    episode = fw.Episode(model, B)
    episode.feed(IDS, graph="carry")
    episode.save(tmp_path / "life.safetensors")
    again = fw.Episode.load(model, tmp_path / "life.safetensors")
    episode.cut()
    torch.testing.assert_close(again.feed(IDS), episode.feed(IDS), rtol=0, atol=0)
    with pytest.raises(ValueError, match="was saved with"):
        fw.Episode.load(plastic(hebbian(rate=leaf(0.4, 1, O, seed=1))), tmp_path / "life.safetensors")


# ---- memory


def test_a_graph_holds_as_many_tensors_for_many_tokens_as_for_few():
    held = []
    for tokens in (3, 80):
        episode, kept = fw.Episode(plastic(hebbian(rate=leaf(0.1), decay=leaf(0.1)))), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.shape) or x, lambda x: x):
            episode.feed(prompt(1, tokens), graph=True)
        held.append(len(kept))
    assert held[0] == held[1]


def test_memory_is_flat_over_steps_of_learning():
    case = hebbian(rate=leaf(0.4), decay=leaf(0.1))
    model = plastic(case, layers=0, model=tiny(num_hidden_layers=1))
    episode, optimizer = fw.Episode(model, B), torch.optim.SGD(pieces(case[2]), 1e-6)
    counts, gone = [], []
    for step in range(50):
        episode.reset()
        for ids in IDS.split(4, 1):
            out = episode.feed(ids, graph="carry")
        optimizer.zero_grad()
        loss_of(out).backward()
        optimizer.step()
        gone.append(weakref.ref(out))
        del out
        episode.cut()
        if step in (5, 49):
            gc.collect()
            counts.append(sum(type(x) is Tensor for x in gc.get_objects()))
    assert counts[0] == counts[1]
    assert not any(ref() for ref in gone)
