"""Sliding windows: tiny random models of transformers whose windows are shorter than their texts, on every path."""

import json

import pytest
import torch
from naive import bent, twin
from test_cuda_path import as_it_stands
from test_weights import add_tokenizer
from tiny import CONFIG, cached, fed, naive_cache, naive_of, prompt, tiny
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

import fastweights as fw
from fastweights.cache import Positions
from fastweights.config import LlamaConfig
from fastweights.engine.cuda import Cuda
from fastweights.engine.gradient import Gradient

SHAPE = {"hidden_size": 60, "intermediate_size": 92, "num_hidden_layers": 3, "num_attention_heads": 6}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 131}
SOME = {"use_sliding_window": True, "sliding_window": 5}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 4, "head_dim": 16}),
    "mistral that sees itself alone": (MistralForCausalLM, MistralConfig, {"sliding_window": 1}),
    "qwen2, later layers": (Qwen2ForCausalLM, Qwen2Config, {**SOME, "max_window_layers": 1}),
    "qwen2, named layers": (Qwen2ForCausalLM, Qwen2Config, {**SOME, "layer_types": KINDS}),
}
WINDOWS = dict(zip(FAMILIES, [(4, 4, 4), (1, 1, 1), (None, 5, 5), (5, None, 5)], strict=True))
T = 17
IDS = torch.arange(2 * T).reshape(2, T) * 11 % 131
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
HEBBIAN = fw.Hebbian(rate=0.3, mu=0.1, decay=0.05, bias=True)


def saved(name, folder):
    torch.manual_seed(0)
    kind, config, changes = FAMILIES[name]
    theirs = kind(config(**SHAPE | changes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(folder)
    add_tokenizer(folder)
    return theirs


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def on(path, model, rows=1):
    """An episode whose single tokens take this path."""
    episode = fw.Episode(model, rows)
    if path == "modules":
        model.model.layers[0].register_forward_hook(lambda *_: None)
    if path == "cuda":
        episode.engine.paths[0] = Cuda(model, episode.engine.linears, episode.state, as_it_stands, "torch")
    return episode


def feed_one_by_one(path, episode, ids):
    logits = []
    for column in ids.split(1, dim=1):
        logits.append(episode.feed(column))
        assert episode.path == path, episode.why
    return torch.cat(logits, 1)


# ---- against transformers


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers_in_one_pass_and_in_pieces(name, tmp_path):
    theirs = saved(name, tmp_path)
    model, _ = fw.load(tmp_path)
    assert model.config.windows == WINDOWS[name]
    wanted = theirs(IDS).logits
    close(model(IDS), wanted)
    for pieces in ([T], [3, 1, 7, 6], [9, 8]):
        episode = fw.Episode(model, 2)
        close(torch.cat([episode.feed(ids) for ids in IDS.split(pieces, dim=1)], 1), wanted)
    full = {"sliding_window": None, "layer_types": None, "use_sliding_window": False}
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tmp_path / "config.json").read_text()) | full))
    assert float((fw.load(tmp_path)[0](IDS) - wanted).abs().max()) > 0.1 * float(wanted.abs().max())


@pytest.mark.parametrize("path", ["cpu", "modules", "cuda"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers_token_by_token_on_every_path(name, path, tmp_path):
    theirs = saved(name, tmp_path)
    model, _ = fw.load(tmp_path)
    close(feed_one_by_one(path, on(path, model, 2), IDS), theirs(IDS).logits)


@pytest.mark.parametrize("path", ["cpu", "modules", "cuda"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_ragged_rows_are_each_as_alone(name, path, tmp_path):
    """Padding before, within and after the tokens; then one more token for a row that is shorter."""
    theirs = saved(name, tmp_path)
    model, _ = fw.load(tmp_path)
    ids, mask = torch.cat((IDS, IDS.flip(1))), torch.ones(4, T, dtype=torch.int64)
    mask[1, :6], mask[2, 4:9], mask[3, 12:] = 0, 0, 0
    rows = [row[real.bool()] for row, real in zip(ids, mask, strict=True)]
    wanted = [theirs(row[None]).logits[0] for row in rows]
    alone = model(ids, attention_mask=mask)
    episode = on(path, model, 4)
    pieces = [
        episode.feed(columns, attention_mask=real)
        for columns, real in zip(ids.split([5, 2, 10], 1), mask.split([5, 2, 10], 1), strict=True)
    ]
    for found in (alone, torch.cat(pieces, 1)):
        for row in range(4):
            close(found[row][mask[row].bool()], wanted[row])
    last = episode.feed(IDS[:1, :1].repeat(4, 1))
    assert episode.path == path
    for row in range(4):
        close(last[row], theirs(torch.cat((rows[row], IDS[0, :1]))[None]).logits[0, -1:])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("window", [33, 64, 70])
@torch.no_grad()
def test_a_window_of_several_threads_in_a_long_text(window, threads):
    """The threads share the keys of the window, not of the text; C's tiles read it in one pass."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        changes = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": window, "max_window_layers": 2}
        model = tiny(torch.float32, hidden_size=64, **changes)
        ids = prompt(2, 150)
        found = feed_one_by_one("cpu", fw.Episode(model, 2), ids)
        close(found, tiny(torch.float64, hidden_size=64, **changes)(ids).float())
        close(model(ids), found)
        half = model.to(torch.bfloat16)
        found = feed_one_by_one("cpu", fw.Episode(half, 2), ids)
        assert float((found - half(ids)).abs().mean()) < 0.01 * float(found.abs().max())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_generation_goes_on_past_the_window(name, tmp_path):
    theirs = saved(name, tmp_path)
    model, _ = fw.load(tmp_path)
    episode = fw.Episode(model)
    episode.feed(IDS[:1, :3])
    assert sum(1 for _ in episode.generate(None, 20, stop_token_ids=[])) == 20
    ids = episode.token_ids[0]
    assert len(ids) == 23
    wanted = theirs(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    assert wanted[2:-1] == list(ids[3:])


# transformers' KV cache keeps every key where the window is 1: it drops the first -0
@pytest.mark.parametrize("name", [name for name in FAMILIES if "itself" not in name])
@torch.no_grad()
def test_hebbian_writes_are_those_of_a_loop_of_hooks_on_transformers(name, tmp_path):
    """k = h / (‖h‖² + mu), u = rate · z, dense, token by token, in float64."""
    theirs = saved(name, tmp_path).double()
    model, _ = fw.load(tmp_path, dtype=torch.float64)
    rate, mu = 0.05, 0.1
    fast = fw.attach(model, [1], fw.Hebbian(rate=rate, mu=mu))
    episode = fw.Episode(model)
    found = episode.feed(IDS[:1])
    mlp = theirs.model.layers[1].mlp
    linears = {"gate_proj": mlp.gate_proj, "up_proj": mlp.up_proj, "down_proj": mlp.down_proj}
    before = {site: linear.weight.clone() for site, linear in linears.items()}
    seen, cache, logits = {}, None, []
    for site, linear in linears.items():
        linear.register_forward_hook(lambda _m, args, a, site=site: seen.update({site: (args[0][0, 0], a[0, 0])}))
    for t in range(T):
        out = theirs(IDS[:1, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
        for site, linear in linears.items():
            h, a = seen[site]
            z = torch.nn.functional.silu(a) if site == "gate_proj" else a
            linear.weight += torch.outer(rate * z, h / (h @ h + mu))
    close(found, torch.cat(logits, 1))  # transformers normalises in float32 even in a float64 model
    for site, linear in linears.items():
        delta = linear.weight - before[site]
        assert float((fast.delta_weight(1, site) - delta).norm() / delta.norm()) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_saved_model_is_the_same_to_transformers(name, tmp_path):
    theirs = saved(name, tmp_path / "theirs")
    model, _ = fw.load(tmp_path / "theirs")
    fw.save(model, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)
    assert LlamaConfig.from_folder(tmp_path / "ours") == model.config


# ---- against the naive model, in float64


def windowed(**changes):
    """A float64 model of four layers whose second and last see five tokens; and what the naive model must know."""
    types = ["full_attention", "sliding_attention"] * 2
    changes = {"model_type": "qwen2", **SOME, "layer_types": types, **changes}
    return tiny(**changes), {**CONFIG, "windows": [None, 5, None, 5]}


TEXT = [3, 14, 15, 9, 26, 5, 35, 8, 44, 7, 12]


@pytest.mark.parametrize("split", [[11], [1] * 11, [3, 1, 7]], ids=str)
@pytest.mark.parametrize("site", ["k_rot", "z", "pattern", "scores"])
def test_an_edit_inside_attention_is_that_of_the_naive_model(site, split):
    model, config = windowed()
    places = {"layers": [1, 2], "heads": [0] if site == "k_rot" else [1, 3]}
    naive, episode = naive_of(model, config=config), fw.Episode(model)
    exact = naive.feed(TEXT, twin(site, positions=[1, 6, 9], **places))
    edit = fw.Edit(site, lambda x, at: bent(x), positions=[1, 6, 9], **places)
    torch.testing.assert_close(fed(episode, split, TEXT, edits=[edit]), exact, **CLOSE)
    torch.testing.assert_close(cached(episode), naive_cache(naive), **CLOSE)
    again = fw.Episode(model).probe(TEXT, edits=edit, sites=["scores", "pattern", "z"])
    torch.testing.assert_close(again.logits[0], exact, **CLOSE)
    for seen in ("scores", "pattern", "z"):
        for layer in range(4):
            torch.testing.assert_close(again[seen, layer][0], naive.stacked(seen, layer), **CLOSE)
    pattern = again["pattern", 1][0]
    assert not pattern[:, 10, :6].any()
    assert pattern[:, 10, 6].all()


@pytest.mark.parametrize("rule", [HEBBIAN, fw.GradientAscent(rate=0.3)], ids=["hebbian", "gradient"])
def test_events_and_probes_at_every_moment_are_those_of_an_episode_stopped_there(rule):
    model, config = windowed()
    fw.attach(model, [1, 2], rule, ["gate_proj", "up_proj"])
    naive = naive_of(model, rule, config=config)
    exact = naive.feed(TEXT, write=True)
    for split in ([11], [1] * 11, [4, 7]):
        episode = fw.Episode(model)
        torch.testing.assert_close(fed(episode, split, TEXT), exact, **CLOSE)
    question = [[8, 2, 41, 30, 19, 3, 5, 22], [4, 4, 17, 60, 1, 33]]
    trace = episode.probe(question, at="every", sites=["pattern", "resid_mid"])
    stopped = fw.Episode(model)
    for moment in range(episode.events + 1):
        while stopped.events < moment:
            stopped.feed([TEXT[stopped.length : stopped.length + 1]])
        alone = stopped.probe(question, sites=["pattern", "resid_mid"])
        torch.testing.assert_close(trace.logits[moment], alone.logits, **CLOSE)
        for site in ("pattern", "resid_mid"):
            torch.testing.assert_close(trace[site][moment], alone[site], **CLOSE)
    last = fw.Episode(model)
    last.feed([TEXT])
    torch.testing.assert_close(last.probe(question).logits[1, :6], last.probe(question[1]).logits[0], **CLOSE)


@pytest.mark.parametrize("path", ["cpu", "modules", "cuda"])
def test_gradient_events_of_single_tokens_are_those_of_autograd_on_every_path(path):
    """The way back goes through the attention of a layer with a window and of one without."""
    rule, dtype = fw.GradientAscent(rate=0.1), torch.float32 if path == "cpu" else torch.float64
    model, config = windowed(dtype=dtype)
    fw.attach(model, [0, 1], rule, ["gate_proj", "up_proj"], backend="torch")
    naive = naive_of(model, rule, layers=(0, 1), config=config)
    exact = naive.feed(TEXT, write=True)
    episode = fw.Episode(model)
    if path == "cuda":
        episode.engine.gradient = Gradient(model, episode.engine.linears, episode.state, as_it_stands)
    found = feed_one_by_one(path, episode, torch.tensor([TEXT]))
    near = {"rtol": 1e-4, "atol": 1e-4} if path == "cpu" else CLOSE
    torch.testing.assert_close(found[0].double(), exact, **near)
    for address, fast in naive.fast.items():
        torch.testing.assert_close(episode.delta_weight(*address).double(), fast.dW, **near)


def test_forks_snapshots_and_saved_episodes_go_on_as_if_nothing_had_been(tmp_path):
    model, config = windowed()
    fw.attach(model, [1, 2], HEBBIAN, ["gate_proj", "up_proj"])
    more = [50, 51, 52, 53, 54, 55]
    naive = naive_of(model, HEBBIAN, config=config)
    naive.feed(TEXT, write=True)
    wanted = naive.feed(more, write=True)
    episode = fw.Episode(model)
    episode.feed([TEXT])
    episode.save(tmp_path / "life")
    snapshot, fork = episode.snapshot(), episode.fork(rows=[0, 0])
    episode.feed([[1, 2, 3, 4, 5, 6, 7]])
    episode.restore(snapshot)
    for one in (fork, fw.Episode.load(model, tmp_path / "life"), episode):
        torch.testing.assert_close(one.feed([more] * one.batch_size)[-1], wanted, **CLOSE)


def test_after_an_undo_the_window_goes_on_over_what_was_read():
    model, config = windowed()
    fw.attach(model, [1, 2], HEBBIAN, ["gate_proj", "up_proj"])
    naive, before = (naive_of(model, HEBBIAN, config=config) for _ in range(2))
    naive.feed(TEXT, write=True)
    before.feed(TEXT[:8], write=True)
    for key, fast in before.fast.items():
        naive.fast[key].dW, naive.fast[key].db = fast.dW, fast.db
    episode = fw.Episode(model)
    episode.feed([TEXT])
    episode.undo(3)
    more = [50, 51, 52, 53, 54, 55]
    torch.testing.assert_close(episode.feed([more])[0], naive.feed(more, write=True), **CLOSE)


# ---- where no window cuts


def test_a_text_within_the_window_is_read_without_a_mask_and_to_the_bit_as_without_a_window():
    with_window, without = (
        tiny(torch.float32, hidden_size=64, model_type="mistral", sliding_window=window) for window in (40, None)
    )
    for tokens in (1, 40):
        positions = Positions.alone((1, tokens), None, torch.device("cpu"))
        assert positions.with_visible(with_window.model.windows, cached=False) is positions
        assert torch.equal(with_window(prompt(1, tokens)), without(prompt(1, tokens)))
    episodes = [fw.Episode(model) for model in (with_window, without)]
    for t in range(40):
        ours, theirs = (episode.feed(prompt(1, 40)[:, t : t + 1]) for episode in episodes)
        assert torch.equal(ours, theirs)
    positions = Positions.alone((1, 41), None, torch.device("cpu")).with_visible(with_window.model.windows)
    assert list(positions.windowed) == [40]
    assert positions.visible is None
    assert tiny().model.windows == set()


# ---- config.json

BASE = {**SHAPE, "rms_norm_eps": 1e-6}
MISTRAL, QWEN = {**BASE, "model_type": "mistral"}, {**BASE, "model_type": "qwen2"}


@pytest.mark.parametrize(
    ("hf", "windows"),
    [
        ({**MISTRAL, "sliding_window": 8}, (8, 8, 8)),
        ({**MISTRAL, "sliding_window": 8, "layer_types": ["sliding_attention"] * 3}, (8, 8, 8)),
        ({**MISTRAL, "max_position_embeddings": 32768}, (4096, 4096, 4096)),
        ({**MISTRAL, "sliding_window": 256}, (None, None, None)),
        ({**MISTRAL, "sliding_window": None}, (None, None, None)),
        ({**QWEN, "sliding_window": 8}, (None, None, None)),
        ({**QWEN, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, (None, None, 8)),
        ({**QWEN, "sliding_window": 8, "use_sliding_window": True}, (None, None, None)),  # from layer 28 on
        ({**QWEN, **SOME, "max_window_layers": 3, "layer_types": KINDS}, (5, None, 5)),  # the newer key decides
        ({**QWEN, "use_sliding_window": True, "max_window_layers": 0}, (None, None, None)),  # 4096 of 256
        ({**BASE, "model_type": "llama", "sliding_window": 256}, (None, None, None)),
    ],
)
def test_the_window_of_each_layer(hf, windows):
    config = LlamaConfig.from_dict(hf)
    assert config.windows == windows
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({**MISTRAL, "sliding_window": 0}, "sliding_window is 0, expected a positive whole number"),
        ({**MISTRAL, "sliding_window": 8, "use_sliding_window": False}, "sliding_window is 8, but use_sliding_window"),
        ({**MISTRAL, "sliding_window": None, "use_sliding_window": True}, "true, but sliding_window is null"),
        ({**MISTRAL, "sliding_window": 8, "layer_types": KINDS}, "layer_types is .* but sliding_window is 8 in all"),
        ({**MISTRAL, "sliding_window": None, "layer_types": KINDS}, "layer_types is .* but sliding_window is null"),
        ({**QWEN, "sliding_window": None, "use_sliding_window": True}, "true, but sliding_window is null"),
        ({**QWEN, "layer_types": KINDS}, "layer_types is .*, but use_sliding_window is not true"),
        ({**QWEN, **SOME, "layer_types": KINDS[:2]}, "layer_types has 2 entries, expected one for each of 3 layers"),
        (
            {**QWEN, **SOME, "layer_types": ["chunked_attention"] * 3},
            "layer_types is .* implements only full_attention",
        ),
        ({**QWEN, **SOME, "max_window_layers": -1}, "max_window_layers is -1, expected a number of layers"),
        ({**QWEN, "use_sliding_window": "yes"}, 'use_sliding_window is "yes", expected true, false or null'),
    ],
)
def test_keys_that_contradict_each_other_are_refused(hf, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict(hf)
