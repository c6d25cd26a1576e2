"""Memory is flat: over prompts, over decode steps, and within a probe's budget; nothing stays bound to the model."""

import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from tiny import least_bytes, prompt, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastweights as fw

RULES = {
    "hebbian": (fw.Hebbian(rate=0.05, mu=0.1, decay=0.01, bias=True), "compress"),
    "gradient": (fw.GradientAscent(rate=0.05), "grow"),
}
rules = pytest.mark.parametrize(("rule", "overflow"), RULES.values(), ids=RULES)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plastic(rule, overflow, layers=1):
    model = tiny(num_hidden_layers=layers)
    fw.attach(model, [0], rule, rank=2, overflow=overflow)
    return model


def life(episode, n):
    """A short prompt and two tokens more."""
    for _ in episode.generate([5, n % 61, *[8] * 8 * (n % 10 == 0)], 2, update="all", stop_token_ids=()):
        pass


class Allocated(TorchDispatchMode):
    """Bytes of all storages that were made while it is on and still live; `peak` is their maximum."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self.sizes:
                self.made(tensor.untyped_storage())
        return out

    def made(self, storage):
        key, size = id(storage), storage.nbytes()
        self.sizes[key] = weakref.ref(storage, lambda _: self.freed(key)), size
        self.now += size
        self.peak = max(self.peak, self.now)

    def freed(self, key):
        self.now -= self.sizes.pop(key)[1]


def test_the_counter_sees_what_lives_what_died_and_the_peak():
    with Allocated() as bytes_:
        kept = torch.zeros(1000)
        torch.zeros(500).add_(1)
        view = kept[3:]
    assert (bytes_.now, bytes_.peak) == (4000, 6000)
    del kept
    assert bytes_.now == 4000
    del view
    assert bytes_.now == 0


def live():
    """(tensors, their bytes) of this process."""
    kinds = (torch.Tensor, torch.nn.Parameter)  # the fake ones that a compiler keeps have no memory
    found = [o for o in gc.get_objects() if type(o) in kinds]
    return len(found), sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def resident():
    """Bytes of this process in memory; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def passes():
    """Passes over a model that something still holds."""
    return sum(type(o) is fw.passes.Pass for o in gc.get_objects())


@rules
def test_memory_is_flat_over_1000_prompts(rule, overflow):
    model = plastic(rule, overflow)
    episode = fw.Episode(model)
    seen = []
    for n in range(1001):
        episode.reset()
        life(episode, n)
        if n in (100, 1000):
            gc.collect()
            seen.append((live(), len(gc.get_objects()), resident()))
    (tensors, objects, bytes_), (tensors_after, objects_after, bytes_after) = seen
    assert tensors_after == tensors
    assert objects_after - objects < 100
    # one KV cache or one graph kept per prompt would be 45 MB
    assert bytes_after - bytes_ < 16e6


@rules
def test_an_episode_that_nobody_holds_is_gone_at_once(rule, overflow):
    model = plastic(rule, overflow)
    gc.collect()
    gc.disable()  # reference counts alone must do it: nothing holds an episode in a circle
    try:
        before = None
        for n in range(31):
            episode = fw.Episode(model)
            life(episode, n)
            twins = [episode.fork(), episode.fork(rows=[0, 0]), episode.snapshot()]
            episode.probe([5, 6], at=[episode.events] * 3)
            gone = [weakref.ref(thing) for thing in (episode, *twins, episode.cache)]
            episode = twins = None
            assert [ref() for ref in gone] == [None] * 5
            if n in (10, 30):
                before = before or live()
                assert live() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("overflow", ["compress", "evict"])
@pytest.mark.parametrize("rule", [rule for rule, _ in RULES.values()], ids=RULES)
def test_a_decode_step_needs_the_same_memory_after_200_steps(rule, overflow):
    model = plastic(rule, overflow, layers=2)
    episode = fw.Episode(model, max_length=256)
    episode.feed([3, 4, 5])
    held, peaks = [], []
    with Allocated() as bytes_:
        for _ in episode.generate(None, 200, update="all", stop_token_ids=()):
            held.append(bytes_.now)
            peaks.append(bytes_.peak)
            bytes_.peak = bytes_.now
    early, late = slice(40, 80), slice(160, 200)  # each has whole cycles of folds
    assert max(held[late]) == max(held[early])
    # a backward looks at all tokens so far in 4 heads: scores, their gradients and what is between, of 120 tokens more
    looked = 0 if rule.neuron_local else 120 * 4 * 8
    assert max(peaks[late]) - max(peaks[early]) <= 6 * looked


def test_an_episode_keeps_the_logits_of_one_token_whatever_the_prompt():
    episode = fw.Episode(tiny(), max_length=256)
    with Allocated() as bytes_:
        episode.feed(prompt(1, 2))
        short = bytes_.now
        episode.feed(prompt(1, 100))
    assert bytes_.now == short


def test_a_probe_of_many_moments_keeps_to_its_budget():
    model = plastic(RULES["hebbian"][0], "grow", layers=2)
    episode, question = fw.Episode(model), prompt(1, 20)
    episode.feed(prompt(1, 80))

    def needed(max_bytes):
        with Allocated() as bytes_:
            trace = episode.probe(question, at="every", positions=[19], max_bytes=max_bytes)
        assert len(trace.logits) == 81
        return bytes_.peak - bytes_.now  # the logs, whose views it counts as well, and the trace lie there at the end

    least = least_bytes(episode, question, at="every", positions=[19])
    small, large = needed(least), needed(1 << 28)
    assert small <= least
    assert large > 4 * small


def test_nothing_stays_bound_or_hooked_after_life_errors_and_generators_left_half_way():
    frozen, model = tiny(num_hidden_layers=1), plastic(*RULES["hebbian"])
    references, before = sys.getrefcount(model), passes()
    episode, ids = fw.Episode(model), prompt(1, 5)
    for n in range(20):
        life(episode, n)
        episode.probe([5, 6], sites=["resid_pre", "resid_mid", "resid_post"], at=[episode.events])
        next(episode.generate([5], 3))
        with pytest.raises(ValueError, match="outside the vocabulary"):
            episode.feed([61])
        assert torch.equal(model(ids), frozen(ids))
        episode.reset()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert passes() == before
    assert torch.is_grad_enabled()
    del episode
    assert sys.getrefcount(model) == references
