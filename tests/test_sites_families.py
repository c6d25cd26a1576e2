"""Sites, edits, lens and parts of every family, against hooks on transformers' modules."""

import functools
import sys

import pytest
import torch
from family_models import MODELS, pairs
from naive import LAYERED, NEURONS, SQUARE, WHOLE

import fastweights as fw

IDS = torch.arange(18).reshape(2, 9) * 11 % 131  # longer than a window
E, LAYERS = 10, range(3)
CLOSE = {"rtol": 0, "atol": 1e-5}


def heads(part, parts):
    """The part of a fused linear's output that is q, k or v, by heads; parts: how many channels each has."""
    return lambda x: x.split(parts, -1)[part].unflatten(-1, (-1, E))


def interleaved(part):
    return lambda x: x.unflatten(-1, (-1, 3 * E))[..., part * E : (part + 1) * E]


def half(part):
    return lambda x: x.chunk(2, -1)[part]


def whole(x):
    return x


ALONE = heads(0, 1 << 10)
# where sites lie in transformers' blocks: a module, its input or output, and the site in that tensor
LLAMA = {
    "resid_pre": ("", "in", whole),
    "resid_post": ("", "out", whole),
    "attn_norm": ("input_layernorm", "out", whole),
    "attn_out": ("self_attn", "out", whole),
    "resid_mid": ("post_attention_layernorm", "in", whole),
    "mlp_norm": ("post_attention_layernorm", "out", whole),
    "mlp_out": ("mlp", "out", whole),
    "z": ("self_attn.o_proj", "in", ALONE),
    **{name: (f"self_attn.{name}_proj", "out", ALONE) for name in "qkv"},
    **{name: (f"mlp.{name}_proj", "out", whole) for name in ("gate", "up")},
    "act": ("mlp.down_proj", "in", whole),
}
GEMMA = {
    **LLAMA,
    "attn_out": ("post_attention_layernorm", "out", whole),
    "resid_mid": ("pre_feedforward_layernorm", "in", whole),
    "mlp_norm": ("pre_feedforward_layernorm", "out", whole),
    "mlp_out": ("post_feedforward_layernorm", "out", whole),
}
OLMO2 = {
    **{site: place for site, place in GEMMA.items() if site not in ("attn_norm", "mlp_norm")},
    "resid_mid": ("mlp", "in", whole),
}
PHI3 = {
    **LLAMA,
    **{name: ("self_attn.qkv_proj", "out", heads(n, [60, 20, 20])) for n, name in enumerate("qkv")},
    **{name: ("mlp.gate_up_proj", "out", half(n)) for n, name in enumerate(("gate", "up"))},
}
GPT2 = {
    "resid_pre": ("", "in", whole),
    "resid_post": ("", "out", whole),
    "attn_norm": ("ln_1", "out", whole),
    "attn_out": ("attn", "out", whole),
    "resid_mid": ("ln_2", "in", whole),
    "mlp_norm": ("ln_2", "out", whole),
    "mlp_out": ("mlp", "out", whole),
    "z": ("attn.c_proj", "in", ALONE),
    **{name: ("attn.c_attn", "out", heads(n, 60)) for n, name in enumerate("qkv")},
    "up": ("mlp.c_fc", "out", whole),
    "act": ("mlp.c_proj", "in", whole),
}
NEOX = {
    **{site: LLAMA[site] for site in ("resid_pre", "resid_post", "attn_norm", "resid_mid", "mlp_norm", "mlp_out")},
    "attn_out": ("attention", "out", whole),
    "z": ("attention.dense", "in", ALONE),
    **{name: ("attention.query_key_value", "out", interleaved(n)) for n, name in enumerate("qkv")},
    "up": ("mlp.dense_h_to_4h", "out", whole),
    "act": ("mlp.dense_4h_to_h", "in", whole),
}
PARALLEL = {site: place for site, place in NEOX.items() if site != "resid_mid"}
PLACES = {
    "gemma3": GEMMA,
    "gemma2": GEMMA,
    "olmo2": OLMO2,
    "gpt2": GPT2,
    "gpt_neox": PARALLEL,
    "gpt_neox, one after the other": NEOX,
    "phi3": PHI3,
}
BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "gpt_neox, one after the other": "gpt_neox.layers"}
HEADS = {"gpt_neox": "embed_out", "gpt_neox, one after the other": "embed_out"}
both = functools.cache(pairs)
families = pytest.mark.parametrize("name", MODELS)


def places(name):
    return PLACES.get(name, LLAMA)


def blocks(name):
    return BLOCKS.get(name, "model.layers")


def module_of(theirs, name, layer, path):
    return theirs.get_submodule(f"{blocks(name)}.{layer}" + (f".{path}" if path else ""))


def hook(module, side, change):
    """Calls change(x), which may return another x, on a module's input or output."""

    def before(_module, args, kwargs):
        if args:
            y = change(args[0])
            return None if y is None else ((y, *args[1:]), kwargs)
        y = change(kwargs["hidden_states"])
        return None if y is None else (args, {**kwargs, "hidden_states": y})

    def after(_module, _args, output):
        if not isinstance(output, tuple):
            return change(output)
        y = change(output[0])
        return None if y is None else (y, *output[1:])

    if side == "in":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def seen_in(theirs, name, monkeypatch):
    """Every site of a model of transformers: {(site, layer): [B, T, …]}."""
    found, hooks = {}, []
    for layer in LAYERS:
        for site, (path, side, part) in places(name).items():

            def keep(x, key=(site, layer), part=part):
                found[key] = part(x)

            hooks.append(hook(module_of(theirs, name, layer, path), side, keep))
    norm = {"gpt2": "transformer.ln_f"}.get(name, blocks(name).replace("layers", "final_layer_norm"))
    norm = "model.norm" if blocks(name) == "model.layers" else norm
    hooks.append(hook(theirs.get_submodule(norm), "out", lambda x: found.update({("final_norm", None): x})))
    home = sys.modules[type(theirs).__module__]
    attend, times = home.eager_attention_forward, theirs.config.num_attention_heads

    def attention(module, query, key, value, mask, scaling=None, softcap=None, **kwargs):
        layer = len([site for site, _ in found if site == "pattern"])
        found["q_rot", layer], found["k_rot", layer] = query.transpose(1, 2), key.transpose(1, 2)
        scores = query @ key.repeat_interleave(times // key.shape[1], 1).transpose(2, 3) * scaling
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        given = attend(module, query, key, value, mask, scaling=scaling, softcap=softcap, **kwargs)
        found["pattern", layer] = given[1]
        found["scores", layer] = scores.masked_fill(given[1] == 0, -torch.inf)
        return given

    monkeypatch.setattr(home, "eager_attention_forward", attention)
    found["logits", None] = theirs(IDS).logits
    for each in hooks:
        each.remove()
    found["embedding", None] = found["resid_pre", 0]
    for layer in LAYERS:
        found["result", layer] = torch.einsum("bthe,dhe->bthd", found["z", layer], output_of(theirs, name, layer))
    return found


def output_of(theirs, name, layer):
    """The weight behind z, [D, H, E]."""
    weight = module_of(theirs, name, layer, places(name)["z"][0]).weight
    return (weight.T if name == "gpt2" else weight).unflatten(1, (-1, E))


def lacking(name):
    """The sites that a family does not have."""
    gate = {"gate", "gate.read", "gate.key", "gate.value"} if "gate" not in places(name) else set()
    return {*LAYERED} - {*places(name), "result", "q_rot", "k_rot", *SQUARE} | gate


@families
@torch.no_grad()
def test_every_site_is_that_of_transformers(name, monkeypatch):
    ours, theirs = both(name)
    found = seen_in(theirs, name, monkeypatch)
    sites = {site for site, _ in found}
    assert sites == {*LAYERED, *WHOLE} - lacking(name)
    trace = fw.Episode(ours, 2).probe(IDS, sites=[*sites])
    with fw.capture(ours, sites) as fed:
        fw.Episode(ours, 2).feed(IDS)
    for (site, layer), value in found.items():
        scale = value[value.isfinite()].abs().max()
        for each in (trace, fed):
            x = each[site] if layer is None else each[site, layer]
            torch.testing.assert_close(x / scale, value / scale, **CLOSE, msg=lambda m, s=site: f"{s}: {m}")
    torch.testing.assert_close(trace.hidden_states[1:], trace["resid_post"])


@families
def test_a_site_that_a_family_does_not_have_is_refused_by_name(name):
    ours, _ = both(name)
    episode = fw.Episode(ours)
    said = {
        "attn_norm": "attention of Olmo2 reads the stream itself, without a norm before it",
        "mlp_norm": "the MLP of Olmo2 reads the stream itself, without a norm before it",
        "resid_mid": "attention and MLP of this GPTNeoX read the same stream, and nothing lies between them",
        "gate": "has no gate: expected 'up'",
        "gate.read": r"has no gate: expected 'up\.read'",
        "gate.key": r"has no gate: expected 'up\.key'",
        "gate.value": r"has no gate: expected 'up\.value'",
    }
    for site in lacking(name):
        message = f"site '{site}' does not exist here: .*{said[site]}"
        with pytest.raises(ValueError, match=message):
            episode.probe(IDS[:1], sites=site)
        with pytest.raises(ValueError, match=message):
            episode.feed(IDS[:1], edits=[fw.ablate(site)])
        with pytest.raises(ValueError, match=message), fw.capture(ours, site):
            pass
        with pytest.raises(ValueError, match=message), fw.edited(ours, fw.ablate(site)):
            pass
    assert episode.length == 0


# ---- edits

AT = [1, 4]


def edited_by_hooks(theirs, name, layer, site, change):
    """Logits with the site changed at two positions; `change` works in place."""
    path, side, part = places(name)[site]

    def edit(x):
        x = x.clone()
        y = part(x)
        y[:, AT] = change(y[:, AT])
        return x

    handle = hook(module_of(theirs, name, layer, path), side, edit)
    logits = theirs(IDS).logits
    handle.remove()
    return logits


@families
@torch.no_grad()
def test_an_edit_is_the_same_edit_by_hooks_on_transformers(name):
    ours, theirs = both(name)
    plain = theirs(IDS).logits
    for site in {"attn_out", "mlp_out", "q", "k", "v", "z", "gate", "up", "act"} - lacking(name):
        shape = fw.Episode(ours, 2).probe(IDS, sites=site, layers=1)[site, 1].shape
        direction = torch.linspace(-1, 1, shape[-1])
        wanted = edited_by_hooks(theirs, name, 1, site, lambda x, d=direction: x / 2 + 3 * d)
        edit = fw.Edit(site, lambda x, at, d=direction: x / 2 + 3 * d, layers=1, positions=AT)
        assert float((wanted - plain).abs().max()) > 1e-2
        episode = fw.Episode(ours, 2)
        fed = torch.cat([episode.feed(part, edits=[edit]) for part in IDS.split([2, 1, 6], 1)], 1)
        for logits in (
            fed,
            fw.Episode(ours, 2).probe(IDS, edits=[edit]).logits,
            fw.Episode(ours, 2).probe(IDS, sweep=[[], edit]).logits[1],
        ):
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()), msg=site)
        with fw.edited(ours, fw.ablate(site, layers=1, positions=AT)) as done:
            logits = ours(IDS)
        assert done[0] == {0: AT, 1: AT}
        wanted = edited_by_hooks(theirs, name, 1, site, torch.zeros_like)
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()), msg=site)
    if "resid_mid" not in lacking(name):  # the same addition to what attention adds
        direction = torch.linspace(-1, 1, ours.config.hidden_size)
        wanted = edited_by_hooks(theirs, name, 1, "attn_out", lambda x: x + 2 * direction)
        logits = fw.Episode(ours, 2).feed(IDS, edits=[fw.steer("resid_mid", direction, 2.0, layers=1, positions=AT)])
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@families
def test_edited_embeddings_and_logits_are_what_flows_on(name):
    ours, _ = both(name)
    episode = fw.Episode(ours, 2)
    trace = episode.probe(IDS, sites=["embedding", "resid_pre"])
    direction = torch.linspace(-1, 1, ours.config.hidden_size)
    steered = episode.probe(IDS, sites="resid_pre", layers=0, edits=[fw.steer("embedding", direction)])
    torch.testing.assert_close(steered["resid_pre", 0], trace["embedding"] + direction)
    double = fw.Edit("logits", lambda x, at: 2 * x + 1, positions="last")
    for logits in (episode.feed(IDS, edits=[double], logits="last"), episode.probe(IDS, edits=[double]).logits[:, -1:]):
        torch.testing.assert_close(logits, 2 * trace.logits[:, -1:] + 1, rtol=1e-5, atol=1e-5)


@families
def test_gradients_at_sites_are_slopes_of_the_metric(name):
    ours = pairs(name)[0].double()
    episode = fw.Episode(ours, 2)
    sites = {"embedding", "attn_out", "resid_mid", "mlp_out", "q", "v", "gate", "up", "act", "logits"} - lacking(name)

    def metric(logits):
        return logits[:, -1].cos().sum()

    trace = episode.probe(IDS, sites=[*sites], metric=metric, gradient=True)
    for site in sites:
        layer = {} if site in WHOLE else {"layers": 1}
        slope = trace.gradients[site] if site in WHOLE else trace.gradients[site][1]
        direction = torch.linspace(-1, 1, slope.shape[-1], dtype=torch.float64)
        ends = [fw.steer(site, direction, strength, **layer) for strength in (1e-4, -1e-4)]
        up, down = episode.probe(IDS, sweep=ends, metric=metric).metric
        assert float((slope * direction).sum()) == pytest.approx(float(up - down) / 2e-4, rel=1e-4, abs=1e-6), site


# ---- lens, OV, parts, numbers of parameters


@families
@torch.no_grad()
def test_the_lens_of_the_last_layer_is_the_models_logits_and_without_norm_it_adds_up(name):
    ours, theirs = both(name)
    episode = fw.Episode(ours, 2)
    trace = episode.probe(IDS, sites=["resid_post", "final_norm"])
    wanted = theirs(IDS).logits
    close = {"rtol": 0, "atol": 1e-5 * float(wanted.abs().max())}
    torch.testing.assert_close(fw.lens(ours, trace["resid_post", 2]), wanted, **close)
    before_cap = wanted if name != "gemma2" else 3 * torch.atanh(wanted.double() / 3).float()
    bare = fw.lens(ours, trace["final_norm"], norm=False)
    seen = slice(None) if name != "gemma2" else wanted.abs() < 2.9
    torch.testing.assert_close(bare[seen], before_cap[seen], rtol=1e-4, atol=1e-4)


@families
@torch.no_grad()
def test_the_parts_sum_to_the_final_norm_with_every_head_apart(name):
    ours, _ = both(name)
    episode = fw.Episode(ours, 2)
    sites = ["embedding", "mlp_out", "final_norm"]
    by_layer = fw.decompose(ours, episode.probe(IDS, sites=[*sites, "attn_out"]))
    by_head = fw.decompose(ours, episode.probe(IDS, sites=[*sites, "result"], positions="last"))
    norm = episode.probe(IDS, sites="final_norm")["final_norm"]
    torch.testing.assert_close(by_layer[1].sum(0), norm, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(by_head[1].sum(0), norm[:, -1:], rtol=1e-5, atol=2e-5)
    names, parts = by_head
    for layer in LAYERS:
        own = [part for part, each in zip(parts, names, strict=True) if each.startswith((f"L{layer} H", f"L{layer} a"))]
        attention = by_layer[1][by_layer[0].index(f"L{layer} attn")][:, -1:]
        torch.testing.assert_close(sum(own), attention, rtol=1e-5, atol=2e-5)
    biased = name.startswith(("gpt2", "gpt_neox"))
    assert len(names) == 1 + 3 * (6 + 1 + biased) + biased
    assert ("norm bias" in names) == ("norm bias" in by_layer[0]) == biased


@families
@torch.no_grad()
def test_ov_is_what_transformers_modules_taken_apart_give(name):
    ours, theirs = both(name)
    tokens, layer = [3, 77, 130], 2
    x_ND = theirs(torch.tensor(tokens)[:, None], output_hidden_states=True).hidden_states[1][:, 0]
    where = places(name)
    h_ND = module_of(theirs, name, layer, where["attn_norm"][0])(x_ND) if "attn_norm" in where else x_ND
    v_NKE = where["v"][2](module_of(theirs, name, layer, where["v"][0])(h_ND))
    v_NHE = v_NKE.repeat_interleave(6 // v_NKE.shape[1], 1)
    written_HND = torch.einsum("nhe,dhe->hnd", v_NHE, output_of(theirs, name, layer))
    if "layernorm" in where["attn_out"][0]:
        written_HND = module_of(theirs, name, layer, where["attn_out"][0])(written_HND)
    norm = {"gpt2": "transformer.ln_f"}.get(name, blocks(name).replace("layers", "final_layer_norm"))
    norm = theirs.get_submodule("model.norm" if blocks(name) == "model.layers" else norm)
    wanted = theirs.lm_head(norm(written_HND))
    wanted = wanted if name != "gemma2" else 3 * torch.tanh(wanted / 3)
    found = fw.ov(ours, layer, tokens)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@families
def test_parameters_are_counted_as_transformers_has_them(name):
    ours, theirs = both(name)
    counts = fw.anatomy(ours).parameters
    assert counts["total"] == theirs.num_parameters()
    assert sum(counts.values()) == 2 * counts["total"]
    attention, mlp = (places(name)[site][0].split(".")[0] for site in ("z", "act"))
    assert counts["mlp"] == sum(p.numel() for n, p in theirs.named_parameters() if f".{mlp}." in n)
    inside = [(n, p) for n, p in theirs.named_parameters() if f".{attention}." in n]
    assert counts["attention"] == sum(p.numel() for n, p in inside if "_norm" not in n)
    embeddings = [m for m in theirs.modules() if isinstance(m, torch.nn.Embedding)]
    assert counts["embedding"] == sum(m.weight.numel() for m in embeddings)


# ---- plastic linears

HEBB = {"rate": 0.05, "mu": 0.1}


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2", "phi3"])
@pytest.mark.parametrize("batch", [1, 2])
def test_what_a_plastic_linear_of_any_name_reads_and_writes_is_seen_by_its_role(name, batch):
    """read_t = Σ_{s<t} u_s (k_s · h_t), k = h / (‖h‖² + mu), u = rate · φ(a)."""
    ours = pairs(name)[0].double()
    fw.attach(ours, [1], fw.Hebbian(**HEBB))
    gate = "gate" not in lacking(name)
    writers = {"up": "mlp_norm", "down": "act"} | ({"gate": "mlp_norm"} if gate else {})
    parts = [f"{linear}.{part}" for linear in writers for part in ("read", "key", "value")]
    neurons = [site for site in NEURONS if site not in lacking(name)]
    episode = fw.Episode(ours, batch, shared=batch > 1)
    with fw.capture(ours, [*parts, *neurons, "mlp_norm"], layers=1) as trace:
        for ids in IDS[:batch].split([1, 5, 3], 1):
            episode.feed(ids)
    phi = {"gemma2": lambda a: torch.nn.functional.gelu(a, approximate="tanh"), "phi3": torch.nn.functional.silu}
    z = {"gate": phi[name](trace["gate", 1]), "up": trace["up", 1]} if gate else {"up": trace["act", 1]}
    for linear, reads in writers.items():
        h_BTI, u_BTO = trace[reads, 1], trace[f"{linear}.value", 1]
        key_BTI = h_BTI / (h_BTI.square().sum(-1, keepdim=True) + HEBB["mu"])
        torch.testing.assert_close(trace[f"{linear}.key", 1], key_BTI)
        if linear in z:
            torch.testing.assert_close(u_BTO, HEBB["rate"] * z[linear], rtol=1e-6, atol=1e-9)
        if batch == 1:
            scores_BTS = (h_BTI @ key_BTI.transpose(1, 2)).tril(-1)
            torch.testing.assert_close(trace[f"{linear}.read", 1], scores_BTS @ u_BTO)
    read = episode.probe(IDS[:batch], sites=["up.read", "up"], sweep=[[], fw.ablate("up.read")])
    assert float(read["up.read", 1][0].abs().max()) > 0
    assert float(read["up.read", 1][1].abs().max()) == 0
    assert read.layers["up.read"] == [1]
    with pytest.raises(ValueError, match=r"(c_fc|dense_h_to_4h|up_proj|gate_up_proj) of layer 0 is not plastic"):
        episode.probe(IDS[:batch], sites="up.read", layers=0)


def test_the_halves_of_a_fused_gate_and_up_are_edited_apart_and_their_key_is_one():
    ours = pairs("phi3")[0].double()
    fw.attach(ours, [1], fw.Hebbian(**HEBB))
    sites = ["gate", "up", *(f"{half}.{part}" for half in ("gate", "up") for part in ("read", "key", "value"))]

    def fed(*edits):
        with fw.capture(ours, sites, layers=1) as trace:
            fw.Episode(ours).feed(IDS[:1], edits=edits)
        return trace

    plain, cut = fed(), fed(fw.ablate("gate.read"))
    assert float(plain["gate.read", 1].abs().max()) > 0
    assert float(cut["gate.read", 1].abs().max()) == 0
    torch.testing.assert_close(cut["gate", 1], plain["gate", 1] - plain["gate.read", 1])
    torch.testing.assert_close(cut["up", 1], plain["up", 1])
    silent = fed(fw.ablate("up.value"))
    torch.testing.assert_close(silent["up", 1], plain["up", 1] - plain["up.read", 1])
    torch.testing.assert_close(silent["gate", 1], plain["gate", 1])
    doubled = fed(fw.Edit("up.key", lambda x, at: 2 * x))
    torch.testing.assert_close(doubled["up.key", 1], 2 * plain["gate.key", 1])
    torch.testing.assert_close(doubled["gate.key", 1], plain["gate.key", 1])  # seen before the edit of the other name


# ---- names


@families
def test_the_names_of_a_familys_modules_are_aliases(name, tmp_path):
    ours, _ = both(name)
    episode = fw.Episode(ours, 2)
    sites = [*({*LAYERED, *WHOLE} - lacking(name))]
    whole_trace = episode.probe(IDS, sites=sites)
    whole_trace.save(tmp_path / "trace.safetensors")
    loaded = fw.Trace.load(tmp_path / "trace.safetensors")
    aliases = {
        f"{blocks(name)}.1" + (f".{path}" if path else ""): site
        for site, (path, side, part) in places(name).items()
        if side == "out" and part in (whole, ALONE)
    }
    aliases |= {
        "blocks.1.hook_mlp_out": "mlp_out",
        "blocks.1.mlp.hook_post": "act",
        "blocks.1.attn.hook_rot_k": "k_rot",
    }
    aliases["blocks.1.mlp.hook_pre"] = "up" if "gate" in lacking(name) else "gate"
    assert len(aliases) > 8
    for alias, site in aliases.items():
        for trace in (episode.probe(IDS, sites=alias), whole_trace, loaded):
            close = {"rtol": 0, "atol": 1e-5 * float(whole_trace[site].abs().max())}
            torch.testing.assert_close(trace[alias], whole_trace[site, 1], **close, msg=f"{alias} {site}")
        edited = episode.probe(IDS, edits=[fw.ablate(alias)]).logits
        assert torch.equal(edited, episode.probe(IDS, edits=[fw.ablate(site, layers=1)]).logits), alias
    head = HEADS.get(name, "lm_head")
    if name == "gemma2":
        with pytest.raises(ValueError, match=f"site '{head}' is taken before the cap: expected 'logits'"):
            episode.probe(IDS, sites=head)
    else:
        torch.testing.assert_close(episode.probe(IDS, sites=head)[head], whole_trace.logits)


NO_NAMES = [
    (
        "llama",
        "transformer.h.1.mlp.c_fc",
        "is a name in GPT2, and this model is of the family Llama: expected 'up' of layer 1",
    ),
    (
        "gpt2",
        "model.layers.1.mlp.up_proj",
        "is a name in Llama, and this model is of the family GPT2: expected 'up' of layer 1",
    ),
    (
        "gpt2",
        "gpt_neox.layers.2.attention",
        "is a name in GPTNeoX, and this model is of the family GPT2: expected 'attn_out' of",
    ),
    ("gpt2", "transformer.wte", "is taken before positions are added: expected 'embedding'"),
    ("gpt2", "hook_embed", "is taken before positions are added: expected 'embedding'"),
    ("gpt2", "transformer.h.0.attn.c_attn", "holds several sites side by side: expected 'q', 'k' or 'v'"),
    ("gpt2", "blocks.1.mlp.hook_pre_linear", "belongs to an MLP with a gate: expected 'up'"),
    ("phi3", "model.layers.0.mlp.gate_up_proj", "holds several sites side by side: expected 'gate' or 'up'"),
    ("gemma2", "model.layers.0.self_attn", "is taken before the norm behind it: expected 'attn_out'"),
    ("olmo2", "model.layers.0.mlp.down_proj", "is taken before the norm behind it: expected 'mlp_out'"),
    ("olmo2", "blocks.0.ln1.hook_normalized", "is taken before the norm's weight"),
    ("gpt_neox", "blocks.0.hook_resid_mid", "does not exist here: attention and MLP of this GPTNeoX read the same"),
]


@pytest.mark.parametrize(("name", "site", "message"), NO_NAMES)
def test_a_name_of_another_family_or_of_another_tensor_is_refused_with_the_likeliest(name, site, message):
    ours, _ = both(name)
    with pytest.raises(ValueError, match=f"site '{site}' {message}"):
        fw.Episode(ours).probe(IDS[:1], sites=site)
    with pytest.raises(ValueError, match=f"site '{site}' {message}"):
        fw.Episode(ours).feed(IDS[:1], edits=[fw.ablate(site)])
