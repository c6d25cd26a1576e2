"""Every site: its value, its axes, the names it goes by, and what is refused."""

import pytest
import torch
from naive import LAYERED, NEURONS, SQUARE, WHOLE, WIDE, Naive
from test_model import VARIANTS, transformers_twin
from tiny import CONFIG, described, prompt, tiny

import fastweights as fw

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
RULE = fw.Hebbian(rate=0.3, mu=0.1, decay=0.1, bias=True)
IDS = [3, 14, 15, 9, 26, 5, 35]
ODD = ["grouped", "multi-query", "tied", "biases", "head_dim", "llama3 rope"]


def everything(episode, ids, **options):
    return episode.probe(ids, sites=[*LAYERED, *WHOLE], **options)


def axes(site, config, T):
    H, G = config["num_attention_heads"], config["num_key_value_heads"]
    E = config.get("head_dim") or config["hidden_size"] // H
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    per_token = {
        **dict.fromkeys([*WIDE, "embedding", "final_norm"], (T, D)),
        **dict.fromkeys(["q", "q_rot", "z"], (T, H, E)),
        **dict.fromkeys(["k", "k_rot", "v"], (T, G, E)),
        "result": (T, H, D),
        **dict.fromkeys(SQUARE, (H, T, T)),
        **dict.fromkeys(NEURONS, (T, F)),
        "logits": (T, V),
    }
    return per_token[site]


def test_the_table_of_sites_is_that_of_the_contract():
    plastic = [f"{linear}.{part}" for linear in ("gate", "up", "down") for part in ("read", "key", "value")]
    assert set(fw.SITES) == {*LAYERED, *WHOLE, *plastic}
    assert len(fw.SITES) == len(set(fw.SITES))


@pytest.mark.parametrize("variant", ODD)
def test_every_site_has_the_values_and_axes_of_the_naive_model(variant):
    config = {**CONFIG, **VARIANTS[variant]}
    model = tiny(**VARIANTS[variant])
    naive = Naive(model.state_dict(), config)
    naive.feed(IDS)
    trace = everything(fw.Episode(model), IDS)
    assert trace.input_ids.tolist() == [IDS]
    assert trace.positions.tolist() == [list(range(7))]
    for site in LAYERED:
        assert trace.layers[site] == [0, 1, 2, 3]
        assert trace[site].shape == (4, 1, *axes(site, config, 7)), site
        for layer in range(4):
            torch.testing.assert_close(trace[site, layer][0], naive.stacked(site, layer), **CLOSE, msg=site)
    for site in WHOLE:
        assert site not in trace.layers
        assert trace[site].shape == (1, *axes(site, config, 7))
        torch.testing.assert_close(trace[site][0], naive.stacked(site), **CLOSE, msg=site)
    assert trace.logits is trace["logits"]
    hidden = torch.stack([naive.stacked("embedding"), *(naive.stacked("resid_post", n) for n in range(4))])
    torch.testing.assert_close(trace.hidden_states[:, 0], hidden, **CLOSE)


def taken_apart(theirs, ids):
    """Sites of a transformers Llama by torch hooks: {(site, layer): [B, T, …]}; attention must be eager."""
    config, found, hooks = theirs.config, {}, []
    E = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def of(module, site, layer, which, heads=False):
        def before(_module, args, kwargs):
            found[site, layer] = args[0] if args else kwargs["hidden_states"]

        def after(_module, _args, output):
            value = output[0] if isinstance(output, tuple) else output
            found[site, layer] = value.unflatten(-1, (-1, E)) if heads else value
            if site == "attn_out":
                found["pattern", layer] = output[1]

        if which == "in":
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            hooks.append(module.register_forward_hook(after))

    of(theirs.model.embed_tokens, "embedding", None, "out")
    of(theirs.model.norm, "final_norm", None, "out")
    of(theirs.lm_head, "logits", None, "out")
    for n, block in enumerate(theirs.model.layers):
        of(block, "resid_pre", n, "in")
        of(block, "resid_post", n, "out")
        of(block.input_layernorm, "attn_norm", n, "out")
        of(block.post_attention_layernorm, "resid_mid", n, "in")
        of(block.post_attention_layernorm, "mlp_norm", n, "out")
        of(block.self_attn, "attn_out", n, "out")
        of(block.self_attn.o_proj, "z", n, "in")
        of(block.mlp, "mlp_out", n, "out")
        of(block.mlp.down_proj, "act", n, "in")
        for name in "qkv":
            of(getattr(block.self_attn, f"{name}_proj"), name, n, "out", heads=True)
        for name in ("gate", "up"):
            of(getattr(block.mlp, f"{name}_proj"), name, n, "out")
    with torch.no_grad():
        theirs(ids)
    for hook in hooks:
        hook.remove()
    for n, block in enumerate(theirs.model.layers):
        found["z", n] = found["z", n].unflatten(-1, (-1, E))
        W_DHE = block.self_attn.o_proj.weight.unflatten(1, (-1, E))
        found["result", n] = torch.einsum("bthe,dhe->bthd", found["z", n], W_DHE).detach()
    return found


def compare_with_transformers(model, theirs, ids, tolerance):
    found = taken_apart(theirs, ids)
    sites = sorted({site for site, _ in found})
    assert set(sites) == {*LAYERED, *WHOLE} - {"q_rot", "k_rot", "scores"}
    trace = fw.Episode(model, len(ids)).probe(ids, sites=sites)
    for (site, layer), value in found.items():
        ours = trace[site] if layer is None else trace[site, layer]
        scale = value.abs().max()
        torch.testing.assert_close(ours / scale, value / scale, rtol=0, atol=tolerance, msg=f"{site} {layer}")


@pytest.mark.parametrize("variant", ODD)
def test_sites_of_odd_models_are_those_of_transformers(variant):
    model = tiny(torch.float32, **VARIANTS[variant])
    compare_with_transformers(model, transformers_twin(model, VARIANTS[variant]), prompt(2, 9), 2e-5)


def test_sites_of_the_real_model_are_those_of_transformers(smollm2, smollm2_folder):
    from transformers import AutoModelForCausalLM

    model, tokenizer = smollm2
    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2_folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.tensor([tokenizer.encode("The capital of France is Paris, and")])
    compare_with_transformers(model, theirs, ids, 1e-4)


# ---- what a plastic linear reads and writes


@pytest.mark.parametrize("rule", [RULE, fw.LocalLeastSquares(gamma=0.4, target="slow", clip=0.05)])
@pytest.mark.parametrize("split", [[7], [1, 6], [3, 1, 3]])
def test_what_a_plastic_linear_reads_and_writes_is_kept_whatever_the_split(rule, split):
    model, linears = tiny(), ["gate_proj", "up_proj", "down_proj"]
    fw.attach(model, [1, 3], rule, linears, rank=16)
    naive = Naive(
        model.state_dict(), CONFIG, {(layer, linear): described(rule) for layer in (1, 3) for linear in linears}
    )
    naive.feed(IDS, write=True)
    episode, start = fw.Episode(model), 0
    names = [f"{linear}.{part}" for linear in ("gate", "up", "down") for part in ("read", "key", "value")]
    with fw.capture(model, names, layers=[1, 3]) as trace:
        for length in split:
            episode.feed([IDS[start : start + length]])
            start += length
    for site in names:
        for layer in (1, 3):
            torch.testing.assert_close(trace[site, layer][0], naive.stacked(site, layer), **CLOSE, msg=site)
    after = episode.probe(IDS, sites=["down.read", "up.read"])
    naive.restart()
    naive.feed(IDS)
    for site in ("down.read", "up.read"):
        assert after.layers[site] == [1, 3]  # those that are plastic
        for layer in (1, 3):
            torch.testing.assert_close(after[site, layer][0], naive.stacked(site, layer), **CLOSE)


# ---- names

LENS = {
    **{f"hook_{name}": name for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")},
    **{f"attn.hook_{name}": name for name in ("q", "k", "v", "z", "result", "pattern")},
    **{"attn.hook_rot_q": "q_rot", "attn.hook_rot_k": "k_rot", "attn.hook_attn_scores": "scores"},
    **{"mlp.hook_pre": "gate", "mlp.hook_pre_linear": "up", "mlp.hook_post": "act"},
}
MODULES = {
    **{"": "resid_post", ".input_layernorm": "attn_norm", ".post_attention_layernorm": "mlp_norm"},
    **{".self_attn": "attn_out", ".self_attn.o_proj": "attn_out", ".mlp": "mlp_out", ".mlp.down_proj": "mlp_out"},
    **{f".self_attn.{name}_proj": name for name in "qkv"},
    **{f".mlp.{name}_proj": name for name in ("gate", "up")},
}
TOP = {"hook_embed": "embedding", "model.embed_tokens": "embedding", "model.norm": "final_norm", "lm_head": "logits"}


def test_the_names_of_transformerlens_and_of_modules_are_the_same_tensors():
    model = tiny(attention_bias=True, mlp_bias=True)
    episode = fw.Episode(model)
    whole = everything(episode, IDS)
    aliases = {f"blocks.2.{name}": site for name, site in LENS.items()}
    aliases |= {f"model.layers.2{name}": site for name, site in MODULES.items()}
    for alias, site in aliases.items():
        trace = episode.probe(IDS, sites=alias)
        assert trace.layers[site] == [2]
        torch.testing.assert_close(trace[alias], whole[site, 2], rtol=1e-12, atol=1e-12, msg=alias)
        assert torch.equal(trace[site, 2], trace[alias])
        assert torch.equal(whole[alias], whole[site, 2]), alias
        edited = episode.probe(IDS, edits=[fw.ablate(alias)]).logits
        assert torch.equal(edited, episode.probe(IDS, edits=[fw.ablate(site, layers=2)]).logits), alias
    for alias, site in TOP.items():
        torch.testing.assert_close(episode.probe(IDS, sites=alias)[alias], whole[site], rtol=1e-12, atol=1e-12)


def test_several_layers_of_one_site_by_their_names():
    episode = fw.Episode(tiny())
    trace = episode.probe(IDS, sites=["blocks.0.attn.hook_z", "blocks.3.attn.hook_z", "resid_mid"], layers=[1])
    whole = episode.probe(IDS, sites=["z", "resid_mid"])
    assert trace.layers == {"z": [0, 3], "resid_mid": [1]}
    assert torch.equal(trace["z"], whole["z"][[0, 3]])
    with fw.capture(episode.model, ["blocks.0.attn.hook_z", "blocks.3.attn.hook_z", "blocks.1.hook_resid_mid"]) as seen:
        episode.feed([IDS])
    assert seen.layers == {"z": [0, 3], "resid_mid": [1]}
    torch.testing.assert_close(seen["z"], whole["z"][[0, 3]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.5.ln2.hook_normalized", "taken before the norm's weight: expected 'mlp_norm'"),
        ("ln2.hook_normalized", "expected 'mlp_norm'"),
        ("blocks.0.ln1.hook_normalized", "expected 'attn_norm'"),
        ("ln_final.hook_normalized", "expected 'final_norm'"),
        ("resid_postt", "site 'resid_postt' does not exist: did you mean 'resid_post'"),
        ("blocks.1.attn.hook_zz", "does not exist: did you mean 'z'"),
        ("mlp_output", "did you mean 'mlp_out'"),
        ("model.layers.1.mlp.gate", "does not exist: did you mean 'gate'"),
        ("gate.reads", "did you mean 'gate.read'"),
        ("", "site '' does not exist"),
        (7, "site 7 is a int: expected a name"),
        ("blocks.9.hook_resid_pre", "layer 9 does not exist: this model has layers 0 to 3"),
        ("model.layers.4", "layer 4 does not exist"),
    ],
)
def test_names_that_mean_no_site_are_refused_with_the_likeliest(name, message):
    model = tiny()
    episode = fw.Episode(model)
    with pytest.raises(ValueError, match=message):
        episode.probe(IDS, sites=[name])
    with pytest.raises(ValueError, match=message):
        episode.feed([IDS], edits=[fw.ablate(name)])
    with pytest.raises(ValueError, match=message), fw.capture(model, name):
        pass
    assert episode.length == 0


PLACES = [
    ("z", {"layers": 4}, "layer 4 does not exist: this model has layers 0 to 3"),
    ("z", {"layers": -1}, "layer -1 is negative"),
    ("z", {"layers": []}, r"layers=\[\]: expected"),
    ("z", {"layers": "last"}, "layers='last': expected"),
    ("z", {"layers": True}, "layers=True: expected"),
    ("z", {"layers": 1.5}, "layers=1.5: expected"),
    ("z", {"heads": 4}, "head 4 does not exist: 'z' has heads 0 to 3"),
    ("k", {"heads": [0, 2]}, "head 2 does not exist: 'k' has heads 0 to 1"),
    ("z", {"heads": -2}, "head -2 is negative"),
    ("mlp_out", {"heads": 0}, "'mlp_out' has no heads"),
    ("logits", {"heads": 0}, "'logits' has no heads"),
    ("logits", {"layers": 0}, "'logits' does not lie in a layer"),
    ("z", {"units": 6}, "unit 6 does not exist: 'z' has units 0 to 5"),
    ("act", {"units": [0, 52]}, "unit 52 does not exist: 'act' has units 0 to 51"),
    ("resid_pre", {"units": -1}, "unit -1 is negative"),
    ("pattern", {"units": 0}, "'pattern' has no units"),
    ("z", {"rows": 2}, "row 2 does not exist: there are rows 0 to 1"),
    ("z", {"rows": -1}, "row -1 is negative"),
    ("z", {"positions": -1}, "position -1 is negative"),
    ("z", {"positions": [0, -3]}, "position -3 is negative"),
    ("z", {"positions": "lasst"}, "positions='lasst': expected 'last'"),
    ("z", {"positions": 1.5}, "positions=1.5"),
    ("z", {"positions": [[0], [1], [2]]}, "lists for 3 rows, but there are 2"),
    ("blocks.1.attn.hook_z", {"layers": 2}, "names layer 1, but layers=2"),
    ("gate.read", {}, "no gate_proj of this model is plastic"),
    ("down.value", {"layers": 2}, "no down_proj of this model is plastic"),
]


@pytest.mark.parametrize(("site", "places", "message"), PLACES)
def test_places_that_a_model_does_not_have_are_refused_everywhere_and_nothing_changes(site, places, message):
    model = tiny()
    episode = fw.Episode(model, 2)
    ids, before = prompt(2, 5), fw.Episode(model, 2).feed(prompt(2, 5))
    for run in (
        lambda edit: episode.feed(ids, edits=[edit]),
        lambda edit: next(episode.generate(ids, 3, edits=[edit])),
        lambda edit: episode.probe(ids, edits=[edit]),
        lambda edit: episode.probe(ids, sweep=[[], edit]),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            run(fw.ablate(site, **places))
        assert "\n" not in str(refused.value)
        assert episode.length == 0
    if site not in ("gate.read", "down.value"):  # linears may become plastic inside a block
        with pytest.raises(ValueError, match=message), fw.edited(model, fw.ablate(site, **places)):
            model(ids)
    assert torch.equal(episode.feed(ids), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("verb", ["probe", "sweep"])
def test_a_position_behind_the_question_is_refused_with_its_number(verb):
    episode = fw.Episode(tiny())
    for positions, number in ((5, 5), ([0, 17], 17), ([[9]], 9)):
        edit = fw.ablate("z", positions=positions)
        with pytest.raises(ValueError, match=f"position {number} does not exist here: there are positions 0 to 4"):
            episode.probe(IDS[:5], **({"edits": [edit]} if verb == "probe" else {"sweep": [edit]}))


def test_what_a_gradient_rule_writes_is_no_site_beforehand():
    model = tiny()
    fw.attach(model, [1], fw.GradientAscent(rate=0.1), ["down_proj"])
    episode = fw.Episode(model)
    for site in ("down.value", "down.key"):
        with pytest.raises(ValueError, match="GradientAscent of layer 1 is not neuron-local"):
            episode.feed([IDS], edits=[fw.ablate(site)])
        with (
            pytest.raises(ValueError, match="GradientAscent of layer 1 is not neuron-local"),
            fw.edited(model, fw.ablate(site)),
        ):
            episode.feed([IDS])
    assert episode.length == 0
    episode.feed([IDS], edits=[fw.ablate("down.read")])
    assert episode.length == 7


def test_a_probe_has_no_events_to_keep():
    model = tiny()
    fw.attach(model, [1], RULE, ["down_proj"])
    episode = fw.Episode(model)
    for part in ("key", "value"):
        with pytest.raises(ValueError, match=f"a probe writes nothing, so it has no 'down.{part}'"):
            episode.probe(IDS, sites=f"down.{part}")
        with pytest.raises(ValueError, match=r"a probe writes nothing, so .* cannot act"):
            episode.probe(IDS, edits=fw.ablate(f"down.{part}"))


# ---- traces


def test_captured_tensors_are_copies():
    model = tiny()
    fw.attach(model, [1], RULE)
    episode = fw.Episode(model)
    sites = [*LAYERED, *WHOLE]
    first, again = everything(episode, IDS), everything(episode, IDS)
    with fw.capture(model, [*sites, "up.key", "up.value", "up.read"]) as fed:
        episode.feed([IDS])
    state = episode.feed(IDS[:2])
    twin = fw.Episode(model)
    twin.feed([IDS])
    for trace in (first, fed):
        for tensor in trace.sites.values():
            tensor.fill_(7.0)
        for tensor in (trace.input_ids, trace.positions):
            tensor.fill_(1)
    third = everything(fw.Episode(model), IDS)
    for name, tensor in again.sites.items():
        assert torch.equal(third[name], tensor), name
    torch.testing.assert_close(twin.feed(IDS[:2]), state, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fw.Episode(model).feed([IDS], update="none"), third.logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at", ["now", [0, 3]])
def test_a_trace_is_the_same_after_its_file(tmp_path, at):
    model = tiny()
    fw.attach(model, [1], RULE)
    episode = fw.Episode(model)
    episode.feed([IDS])
    trace = everything(
        episode,
        [IDS, IDS[:3]],
        at=at,
        sweep=[[], fw.ablate("z", heads=1)],
        gradient=True,
        metric=lambda logits: logits[:, -1].square().sum(-1),
    )
    trace.save(tmp_path / "t.safetensors")
    back = fw.Trace.load(tmp_path / "t.safetensors")
    assert back.sites.keys() == trace.sites.keys()
    assert back.gradients.keys() == trace.gradients.keys() == trace.sites.keys()
    assert (back.layers, back.leading) == (trace.layers, trace.leading)
    for one, other in (
        *((back[n], trace[n]) for n in trace.sites),
        *((back.gradients[n], trace.gradients[n]) for n in trace.gradients),
        *((getattr(back, n), getattr(trace, n)) for n in ("metric", "input_ids", "positions", "hidden_states")),
        (back["z", 2], trace["z", 2]),
    ):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert torch.equal(
        episode.probe(IDS[:3], edits=[fw.patch("z", fw.Trace.load(saved(episode, tmp_path)), rows=0)]).logits,
        episode.probe(IDS[:3]).logits,
    )


def saved(episode, folder):
    episode.probe(IDS[:3], sites="z").save(folder / "z.safetensors")
    return folder / "z.safetensors"


def test_a_file_that_is_no_trace_is_refused(tmp_path):
    (tmp_path / "no.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        fw.Trace.load(tmp_path / "no.safetensors")
    episode = fw.Episode(tiny())
    episode.feed([IDS])
    episode.save(tmp_path / "episode.safetensors")
    with pytest.raises(ValueError, match="is not a trace of format 1"):
        fw.Trace.load(tmp_path / "episode.safetensors")


def test_what_a_trace_does_not_hold_is_said():
    trace = fw.Episode(tiny()).probe(IDS, sites="z", layers=[1, 2])
    with pytest.raises(KeyError, match=r"site 'q' was not captured; captured are \['logits', 'z'\]"):
        trace["q"]
    with pytest.raises(KeyError, match=r"layer 0 of 'z' was not captured; captured are \[1, 2\]"):
        trace["z", 0]
    with pytest.raises(ValueError, match="site 'zett' does not exist"):
        trace["zett"]


def test_a_capture_of_plastic_sites_holds_the_layers_that_are_plastic():
    model = tiny()
    fw.attach(model, [1, 2], RULE, ["up_proj"])
    with fw.capture(model, ["up.key", "up.read", "z"], layers=None) as trace:
        fw.Episode(model).feed([IDS])
    assert trace.layers == {"up.key": [1, 2], "up.read": [1, 2], "z": [0, 1, 2, 3]}
    with (
        pytest.raises(ValueError, match=r"no run inside the block came by 'up.key' of layer 3"),
        fw.capture(model, "up.key", layers=[1, 3]),
    ):
        fw.Episode(model).feed([IDS])


@pytest.mark.parametrize(
    ("sites", "places", "message"),
    [
        ([], {}, "expected at least one site"),
        (["mlp_out", "logits"], {"heads": 0}, r"heads=0.*have no heads"),
        ("logits", {"layers": 0}, r"layers=0.*do not lie in layers"),
        ("z", {"rows": 1}, "row 1 does not exist"),
        ("z", {"units": 6}, "unit 6 does not exist"),
    ],
)
def test_a_capture_refuses_places_that_none_of_its_sites_has(sites, places, message):
    model = tiny()
    with pytest.raises(ValueError, match=message), fw.capture(model, sites, **places):
        model(torch.tensor([IDS]))
    assert torch.equal(model(torch.tensor([IDS])), fw.Episode(model).feed([IDS]))


def test_hidden_states_need_every_layer():
    episode = fw.Episode(tiny())
    with pytest.raises(KeyError, match=r"needs 'resid_post' of every layer; captured are \[1\]"):
        episode.probe(IDS, sites="resid_post", layers=1).hidden_states  # noqa: B018
    with pytest.raises(KeyError, match="site 'embedding' was not captured"):
        episode.probe(IDS, sites="z").hidden_states  # noqa: B018


def test_blocks_of_what_is_no_model_are_refused():
    with pytest.raises(ValueError, match="got a int, expected the model"), fw.capture(3, "z"):
        pass
    with pytest.raises(ValueError, match="got a NoneType, expected the model"), fw.edited(None, fw.ablate("z")):
        pass


def test_results_leave_a_hook_of_the_users_own_as_it_is():
    model = tiny(attention_bias=True)
    handle = model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda module, args, output: 2 * output)
    episode = fw.Episode(model)
    exact = episode.probe(IDS).logits
    for options in (
        {"sites": "result"},
        {"edits": fw.Edit("result", lambda x, at: x, layers=1)},
        {"sites": "result", "gradient": True, "metric": torch.sum, "logits": "all"},
    ):
        torch.testing.assert_close(episode.probe(IDS, **options).logits, exact, rtol=1e-11, atol=1e-11)
    handle.remove()


def test_results_of_a_module_without_a_weight_are_refused():
    model = tiny()
    attention = model.model.layers[1].self_attn
    attention.o_proj = torch.nn.Sequential(attention.o_proj)
    episode = fw.Episode(model)
    assert episode.probe(IDS, sites="z")["z"].shape == (4, 1, 7, 4, 6)
    with pytest.raises(ValueError, match="needs the weight of o_proj, but layer 1 has a Sequential"):
        episode.probe(IDS, sites="result")
