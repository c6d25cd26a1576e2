"""Lives on one model in several threads give what they give alone; what cannot be supported is refused."""

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import prompt, tiny

import fastweights as fw

F32 = torch.float32
RULES = {
    "frozen": None,
    "hebbian": fw.Hebbian(rate=0.1, decay=0.05, clip=0.5),
    "gradient": fw.GradientAscent(rate=0.05),
}


@pytest.fixture(autouse=True)
def switch_often():
    """Python hands over between threads a thousand times as often as usual; products run in one thread each."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(5e-6)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def life(model, seed):
    """What one life gives: logits of a prompt, generated tokens, a probe at its moments, ΔW."""
    ids = prompt(1, 5 + seed % 9, seed)
    episode = fw.Episode(model, max_length=(None, 40, 128)[seed % 3])
    found = [episode.feed(ids, logits="last")]
    steps = [step.token_ids for step in episode.generate(None, 8, update="all", stop_token_ids=(), temperature=0.7)]
    found.append(torch.cat(steps))
    at = [episode.events] if episode.events else "now"
    found += episode.probe(ids, sites=["resid_pre", "resid_mid", "resid_post"], at=at).sites.values()
    found += [log.delta_weight(0) for log in episode.logs.values()]
    return found, episode.path


@pytest.mark.parametrize("name", RULES)
def test_lives_in_threads_give_the_bits_they_give_alone_on_the_same_path(name):
    model, rule = tiny(F32), RULES[name]
    if rule is not None:
        fw.attach(model, [1, 2], rule, rank=4)
    alone = [life(model, seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: life(model, seed), range(12)))
    for (found, path), (exact, path_alone) in zip(together, alone, strict=True):
        assert path == path_alone == "cpu"
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_loop_over_the_model_in_threads_gives_the_bits_it_gives_alone():
    model, ids = tiny(F32), prompt(4, 30)

    def loop(row):
        cache = model.new_cache(1)
        return torch.cat([model(ids[row : row + 1, t : t + 1], cache=cache) for t in range(30)])

    alone = [loop(row) for row in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(loop, range(4)), alone, strict=True))


class Pause:
    """A hook that waits inside a pass until it is let go."""

    def __init__(self, model):
        self.inside, self.go = threading.Event(), threading.Event()
        self.handle = model.model.layers[2].register_forward_hook(self)

    def __call__(self, *_):
        self.inside.set()
        assert self.go.wait(30)


def test_an_episode_that_runs_in_another_thread_is_refused_and_goes_on_unharmed():
    model, ids = tiny(F32), prompt(1, 6)
    fw.attach(model, [1], fw.Hebbian(rate=0.1))
    exact = fw.Episode(model).feed(ids)
    episode, pause = fw.Episode(model), Pause(model)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(episode.feed, ids)
        assert pause.inside.wait(30)
        for verb in (lambda: episode.feed(ids), episode.snapshot, episode.reset, lambda: episode.undo(1), episode.fork):
            with pytest.raises(ValueError, match="this episode is running in another thread"):
                verb()
        pause.go.set()
        torch.testing.assert_close(running.result(), exact)
    pause.handle.remove()
    assert (episode.length, episode.events) == (6, 6)


@pytest.mark.parametrize("plastic", [False, True])
def test_attach_and_detach_are_refused_while_a_pass_runs_and_change_nothing(plastic):
    model = tiny(F32)
    if plastic:
        fw.attach(model, [1], fw.Hebbian(rate=0.1))
    before, pause = list(model.modules()), Pause(model)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(fw.Episode(model).feed, prompt(1, 6))
        assert pause.inside.wait(30)
        with pytest.raises(ValueError, match=r"attach\(\) while a pass of this model runs in another thread"):
            fw.attach(model, [3], fw.Hebbian())
        with pytest.raises(ValueError, match=r"detach\(\) while a pass of this model runs in another thread"):
            fw.detach(model)
        assert all(a is b for a, b in zip(model.modules(), before, strict=True))
        pause.go.set()
        running.result()
    fw.attach(model, [3], fw.Hebbian())


def test_a_probe_of_one_thread_neither_sees_nor_slows_the_lives_of_others():
    """Its hooks stand on modules that the other threads run."""
    model, ids = tiny(F32), prompt(1, 6)
    episode, pause = fw.Episode(model), Pause(model)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(fw.Episode(model).probe, ids, sites=["resid_post"])
        assert pause.inside.wait(30)  # inside the probe, while its hooks are set
        pause.handle.remove()
        episode.feed(ids)
        episode.feed(ids[:, :1])
        assert episode.path == "cpu"
        pause.go.set()
        assert running.result()["resid_post"].shape == (4, 1, 6, 24)


def test_which_episode_is_asked_is_the_one_that_ran_last_in_this_thread():
    model, ids = tiny(F32), prompt(1, 6)
    fast = fw.attach(model, [1], fw.Hebbian(rate=0.1))
    mine, other = fw.Episode(model), fw.Episode(model)
    mine.feed(ids)
    norm = float(fast.delta_norm(1, "up_proj"))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(other.feed, ids[:, :2]).result()
        theirs = pool.submit(fast.delta_norm, 1, "up_proj").result()
    fw.Episode(model)  # made, and never run
    assert float(fast.delta_norm(1, "up_proj")) == norm != theirs
    with ThreadPoolExecutor(1) as pool:  # a thread in which none has run
        assert pool.submit(fast.delta_norm, 1, "up_proj").result() == theirs


@pytest.mark.parametrize("way", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy])
def test_a_copy_of_a_plastic_model_is_a_plastic_model_of_its_own(way):
    model, ids = tiny(F32), prompt(1, 6)
    fw.attach(model, [1], fw.Hebbian(rate=0.1, gate="derivative"))
    twin = way(model)
    assert twin.binding is not model.binding
    logits = []
    for each in (model, twin):
        episode = fw.Episode(each)
        episode.feed(ids)
        logits.append(episode.feed(ids[:, :1]))
        assert (episode.path, episode.events) == ("cpu", 7)
    assert torch.equal(*logits)
    fw.detach(twin)
    assert len([m for m in model.modules() if type(m).__name__ == "PlasticLinear"]) == 3
