"""The recorded forward and backward of a gradient rule's token: on a GPU as CUDA graphs, else as they stand or through
torch.compile(fullgraph=True), which shows that Python waits for no number in them."""

import gc
import weakref
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from test_gradient import ragged
from test_memory import Allocated
from tiny import prompt, tiny

import fastweights as fw
from fastweights.engine.cuda import graphed
from fastweights.engine.gradient import Gradient

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE, TOLERANCE = (torch.float32, 1e-3) if ON_GPU else (torch.float64, 1e-11)
RECORD = graphed if ON_GPU else lambda run: run
ALL = ("gate_proj", "up_proj", "down_proj")
RULE = fw.GradientAscent(rate=0.1, decay=0.05)
RULES = {
    "plain": fw.GradientAscent(rate=0.1),
    "decay": RULE,
    "mu-clip-bias": fw.GradientAscent(rate=1.0, mu=0.1, decay=0.1, clip=0.05, bias=True),
}


def compiled(run):
    return torch.compile(run, fullgraph=True, backend="eager")


@pytest.fixture(autouse=True)
def compile_anew():
    torch._dynamo.reset()


def recorded(rule=RULE, rows=1, record=RECORD, overflow="grow", rank=4, layers=(1, 2), **options):
    model = tiny(DTYPE).to(DEVICE)
    fw.attach(model, list(layers), rule, ALL, rank=rank, overflow=overflow, backend="torch", **options)
    episode = fw.Episode(model, rows)
    episode.engine.gradient = Gradient(model, episode.engine.linears, episode.state, record)
    return episode


def ordinary(*args, **options):
    episode = recorded(*args, **options)
    episode.engine.gradient.unable = "not wanted"
    return episode


def close(ours, theirs, tolerance=TOLERANCE):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def tokens_one_by_one(episode, count, seed=2):
    return torch.cat([episode.feed(prompt(1, 1, seed + n)) for n in range(count)])


def replayed(episode):
    path = episode.engine.gradient
    return path.forward.replayed and path.backward.replayed and episode.path == "cuda"


def recordings(episode):
    path = episode.engine.gradient
    return path.forward.recordings, path.backward.recordings


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("overflow", ["grow", "evict", "compress"])
@pytest.mark.parametrize("name", RULES)
def test_it_is_the_ordinary_pass(name, overflow, rows):
    ours, theirs = (make(RULES[name], rows, overflow=overflow) for make in (recorded, ordinary))
    for life in (ours, theirs):
        life.feed(prompt(rows, 5))
    close(ragged(ours, rows, 12), ragged(theirs, rows, 12))
    assert replayed(ours)
    assert theirs.path == "modules"
    assert ours.event_counts == theirs.event_counts
    for site in ours.logs:
        for row in range(rows):
            close(ours.delta_weight(*site, row), theirs.delta_weight(*site, row))


def test_both_compile_whole_and_never_again():
    """60 tokens with changing event counts, rates and masks, and folds on the way."""
    options = dict(overflow="compress", layers=[2])
    ours, theirs = recorded(RULE, 2, RECORD if ON_GPU else compiled, **options), ordinary(RULE, 2, **options)
    random = torch.Generator().manual_seed(3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in range(60):
            ids, write = torch.randint(61, (2, 1), generator=random), torch.rand(2, 1, generator=random) < 0.5
            write[:, 0] |= n == 0
            mask = torch.ones(2, 1, dtype=torch.bool)
            mask[1] = n % 7 != 3
            for linear in (one for life in (ours, theirs) for one in life.engine.linears.values()):
                linear.rule = replace(linear.rule, rate=0.05 + 0.001 * n)
            logits = [life.feed(ids, write, mask)[mask] for life in (ours, theirs)]
            if n < 20:
                close(*logits)
    assert replayed(ours)
    assert recordings(ours) == (1, 1)
    assert ours.event_counts == theirs.event_counts


def test_what_they_rely_on_is_recorded_again_when_it_changes():
    episode = recorded(rank=32)

    def again(change):
        before = recordings(episode)
        change()
        tokens_one_by_one(episode, 3)
        assert replayed(episode)
        return tuple(now - then for now, then in zip(recordings(episode), before, strict=True))

    layer = episode.model.model.layers[3]
    tokens_one_by_one(episode, 4)
    assert again(lambda: None) == (0, 0)
    assert again(lambda: episode.feed(prompt(1, 3), "none")) == (0, 0)
    weight = layer.mlp.up_proj.weight
    assert again(lambda: weight.mul_(2)) == (0, 0)  # in place: a graph reads it there
    assert again(lambda: setattr(layer.mlp.up_proj, "weight", torch.nn.Parameter(weight / 2, False))) == (1, 1)
    assert again(lambda: setattr(layer, "self_attn", deepcopy(layer.self_attn))) == (1, 1)
    plastic = episode.engine.linears[1, "up_proj"]
    assert again(lambda: setattr(plastic, "rule", replace(RULE, rate=0.1, mu=0.3))) == (0, 0)
    assert again(lambda: episode.feed(prompt(1, 20))) == (1, 1)  # the logs grow
    assert again(lambda: episode.undo(2)) == (0, 0)
    episode.cache.limit = 1000
    assert again(lambda: episode.feed(prompt(1, 250), "none")) == (1, 1)  # the bucket, and the KV cache


def test_slots_without_an_event_may_hold_anything():
    ours, theirs = recorded(rank=32), ordinary(rank=32)
    for life in (ours, theirs):
        tokens_one_by_one(life, 4)
    for log in ours.logs.values():
        log.U_BRO[:, 5:] = log.K_BRI[:, 6:] = float("nan")
    close(tokens_one_by_one(ours, 3, 30), tokens_one_by_one(theirs, 3, 30))
    assert replayed(ours)


def test_a_token_that_waits_moves_with_the_life_it_belongs_to():
    """Through snapshot, restore, fork, undo, and a feed that fails, the tape of the recording is put right."""
    ours, theirs = recorded(rank=32), ordinary(rank=32)
    found = []
    for life in (ours, theirs):
        tokens_one_by_one(life, 4)
        before = life.snapshot()
        tokens_one_by_one(life, 3, 9)
        life.restore(before)
        child = life.fork()
        embedding = life.model.model.embed_tokens.weight
        kept = embedding[7].clone()
        embedding[7] = float("nan")
        with pytest.raises(ValueError, match="has a non-finite factor"):
            life.feed([[5, 7, 5]])
        embedding[7] = kept
        assert life.length == 4
        found.append([tokens_one_by_one(life, 3, 20), tokens_one_by_one(child, 3, 20)])
        life.undo(2)
        found[-1].append(tokens_one_by_one(life, 3, 40))
        found[-1] += [life.delta_weight(1, "down_proj"), life.fork(rows=[0, 0]).feed([[3], [4]])]
    for one, other in zip(*found, strict=True):
        close(one, other)


def test_rows_that_have_ended_stay_as_they_are():
    out = []
    for life in (recorded(rows=3), ordinary(rows=3)):
        steps = list(life.generate(prompt(3, 4), 10, update="all", stop_token_ids=list(range(0, 61, 4))))
        out.append((torch.stack([s.token_ids for s in steps]), [s.ended for s in steps], life.lengths))
        assert life.path in ("cuda", "modules")
    assert torch.equal(out[0][0], out[1][0])
    assert out[0][1:] == out[1][1:]


def test_hooks_edits_and_other_rules_are_left_to_the_modules_and_it_says_so():
    episode = recorded()
    tokens_one_by_one(episode, 3)
    seen = []
    handle = episode.model.model.layers[3].post_attention_layernorm.register_forward_hook(lambda *_: seen.append(1))
    episode.feed([[4]])
    assert (episode.path, episode.why["cuda"], len(seen)) == (
        "modules",
        "there are hooks on the model, or a forward of its user's",
        1,
    )
    handle.remove()
    episode.feed([[4]], edits=fw.ablate("z", layers=3))
    assert (episode.path, episode.why["cuda"]) == ("modules", "edits or a capture run on the modules")
    episode.feed([[4]])
    assert episode.path == "cuda"
    assert "cuda" not in episode.why
    episode.feed([[4, 5]], "none")
    assert episode.why["cuda"] == "the pass has more than one token of each row"
    episode.engine.linears[2, "up_proj"].rule = replace(RULE, rate=0.0)
    episode.feed([[4]])
    assert episode.why["cuda"] == "some rules are neuron-local, and some are not"


@pytest.mark.parametrize("options", [{"shared": True}, {"budget": 0.5}])
def test_shared_rows_and_budgets_are_left_to_the_modules(options):
    model = tiny(DTYPE).to(DEVICE)
    fw.attach(model, [1], RULE, **{name: value for name, value in options.items() if name == "budget"})
    episode = fw.Episode(model, 2, shared=options.get("shared", False))
    episode.engine.gradient = Gradient(model, episode.engine.linears, episode.state, RECORD)
    episode.feed(prompt(2, 3))
    assert episode.path == "modules"
    assert episode.events == (4 if "shared" in options else 2)


def test_an_episode_that_nobody_holds_is_gone_at_once():
    """Its recordings do not hold it: a graph holds tensors alone."""

    def weakly(run):
        there = weakref.WeakMethod(run)
        return lambda: there()()

    gc.collect()
    gc.disable()
    try:
        episode = recorded(record=RECORD if ON_GPU else weakly)
        tokens_one_by_one(episode, 5)
        assert replayed(episode)
        gone = weakref.ref(episode.cache)
        del episode
        assert gone() is None
    finally:
        gc.enable()


def test_it_needs_the_same_memory_after_200_tokens():
    episode = recorded(overflow="compress", rank=2)
    episode.feed([3, 4, 5])
    held, peaks = [], []
    with Allocated() as bytes_:
        for _ in episode.generate(None, 200, update="all", stop_token_ids=()):
            held.append(bytes_.now)
            peaks.append(bytes_.peak)
            bytes_.peak = bytes_.now
    early, late = slice(40, 80), slice(160, 200)  # each has whole cycles of folds
    assert max(held[late]) == max(held[early])
    assert max(peaks[late]) == max(peaks[early])
