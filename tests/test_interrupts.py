"""A call that is cut short at any line leaves the episode as it was or as it is after, never between."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import prompt, tiny

import fastweights as fw

FOLDER = str(Path(fw.__file__).parent)
F32 = torch.float32
STEP = 0
EDITS = [fw.ablate("z", layers=1, heads=0), fw.ablate("pattern", layers=0, heads=1), fw.ablate("up.read", rows=1)]
RULES = {"hebbian": fw.Hebbian(rate=0.1, decay=0.05), "gradient": fw.GradientAscent(rate=0.05)}


class Interrupt:
    """Counts the lines of ours that run inside, and raises KeyboardInterrupt at one of them."""

    def __init__(self, at=None):
        self.at, self.lines = at, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace


def made(rule, overflow, archive=False):
    model = tiny(F32, num_hidden_layers=2)
    fw.attach(model, [0, 1], rule, rank=4, overflow=overflow, archive=archive, linears=["up_proj", "down_proj"])
    episode = fw.Episode(model, 2)
    episode.feed(prompt(2, 5))
    return model, episode


def facts(episode):
    """Everything that belongs together, as plain values."""
    numbers = [episode.lengths, episode.token_ids, list(episode.event_counts.values())]
    numbers += [log.certificate(row) for log in episode.logs.values() for row in (0, 1)]
    numbers.append(episode.generator.get_state().tolist())
    tensors = [log.delta_weight(row) for log in episode.logs.values() for row in (0, 1)]
    tensors += [t[:, :, : episode.length] for t in (*episode.cache.keys, *episode.cache.values)]
    tensors.append(torch.zeros(0) if episode.logits is None else episode.logits)
    return numbers, tensors


def same(one, other):
    return one[0] == other[0] and len(one[1]) == len(other[1]) and all(map(torch.equal, one[1], other[1]))


VERBS = {
    "a prompt": lambda e: e.feed(prompt(2, 9, seed=1)),
    "a token": lambda e: e.feed(prompt(2, 1, seed=2)),
    "a ragged prompt": lambda e: e.feed([[1, 2, 3, 4, 5, 6, 7], [5, 6]]),
    "a generated token": lambda e: next(e.generate(None, 3, update="all", temperature=0.8, stop_token_ids=())),
    "an edited prompt": lambda e: e.feed(prompt(2, 4, seed=1), edits=EDITS),
    "an edited generated token": lambda e: next(e.generate(None, 3, update="all", edits=EDITS, stop_token_ids=())),
    "undo": lambda e: e.undo(1),
    "reset": lambda e: e.reset(),
    "restore": lambda e: e.restore(e.kept),
}


@pytest.mark.parametrize("overflow", ["compress", "evict", "grow"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupt_at_any_line_leaves_what_was_or_what_is_after(verb, rule, overflow):
    _, start = made(RULES[rule], overflow, archive=verb == "undo")
    if verb == "undo":
        start.feed(prompt(2, 1))
    earlier = start.snapshot()
    after_feed = start.fork()
    after_feed.feed(prompt(2, 3, seed=3))
    start.kept = after_feed.kept = after_feed.snapshot()
    before = facts(start)
    done, warm = start.fork(), start.fork()
    done.kept = warm.kept = start.kept
    VERBS[verb](warm)  # what is made once for a model is made here
    with Interrupt() as count:
        VERBS[verb](done)
    after, lines = facts(done), count.lines
    next_before = facts_after_a_token(start)
    next_after = facts_after_a_token(done)
    outcomes = set()
    for at in range(1, lines + 1, STEP or max(1, lines // 12)):
        episode = start.fork()
        episode.kept = start.kept
        try:
            with Interrupt(at):
                VERBS[verb](episode)
        except KeyboardInterrupt:
            pass
        else:  # caches are warmer than when the lines were counted
            assert at > 0.7 * lines
            break
        found = facts(episode)
        assert same(found, before) or same(found, after), f"between, after line {at} of {lines}"
        outcomes.add("before" if same(found, before) else "after")
        expected = next_before if same(found, before) else next_after
        assert same(facts_after_a_token(episode), expected), f"goes on otherwise, after line {at} of {lines}"
    assert outcomes
    start.restore(earlier)
    assert same(facts(start), before)


def facts_after_a_token(episode):
    twin = episode.fork()
    twin.feed(prompt(2, 1, seed=4))
    return facts(twin)


def test_an_interrupt_of_the_roll_back_is_put_right_by_the_next_call():
    model, episode = made(RULES["hebbian"], "compress")
    before = facts(episode)
    kept = model.model.embed_tokens.weight[7].clone()

    def refused(at=None):
        model.model.embed_tokens.weight[7] = float("inf")
        try:
            with Interrupt(at) as lines:
                episode.feed([[7], [7]])
        except (ValueError, KeyboardInterrupt) as error:
            return type(error), lines.lines
        finally:
            model.model.embed_tokens.weight[7] = kept
        raise AssertionError("nothing was refused")

    reason, lines = refused()
    assert reason is ValueError
    assert same(facts(episode), before)
    for at in range(lines - 40, lines):  # the last lines are those of the roll-back
        refused(at)
        twin = episode.fork()
        assert same(facts(twin), before), f"after line {at} of {lines}"


def test_a_refused_feed_inside_a_generation_leaves_the_text_where_it_was():
    model, episode = made(RULES["hebbian"], "grow")
    steps = episode.generate(None, 5, update="all", stop_token_ids=())
    next(steps)
    before, handle = facts(episode), model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(steps)
    handle.remove()
    assert same(facts(episode), before)
    assert len(list(episode.generate(None, 4, stop_token_ids=()))) == 4


def nothing_stands(model):
    """Nothing that is left of a block does anything in this thread."""
    hooks = [h for m in model.modules() for each in (m._forward_hooks, m._forward_pre_hooks) for h in each.values()]
    return not any(hook.acts() for hook in hooks) and model.binding.tap is None and not model.binding.taps


LOOKS = {
    "edited": lambda m, e: around(fw.edited(m, *EDITS[:2]), lambda: e.feed(prompt(2, 2, seed=1))),
    "capture": lambda m, e: around(fw.capture(m, ["z", "scores", "mlp_out"], layers=1), lambda: m(prompt(2, 3))),
    "sweep": lambda m, e: e.probe(prompt(2, 3), sites=["z", "q_rot"], at=[0, 5], sweep=[[], EDITS[0], EDITS[2]]),
    "gradient": lambda m, e: e.probe(prompt(2, 3), sites=["gate", "resid_mid"], gradient=True, metric=torch.sum),
}


def around(block, run):
    with block:
        run()


@pytest.mark.parametrize("name", LOOKS)
def test_an_interrupt_at_any_line_leaves_nothing_of_an_edit_or_a_look(name):
    model, start = made(RULES["hebbian"], "grow")
    question = prompt(2, 4, seed=5)
    exact, fed, question_alone = start.probe(question).logits, start.fork().feed(question), model(question)
    LOOKS[name](model, start.fork())  # what is made once for a model is made here
    with Interrupt() as count:
        LOOKS[name](model, start.fork())
    for at in range(1, count.lines + 1, STEP or max(1, count.lines // 120)):
        try:
            with Interrupt(at):
                LOOKS[name](model, start.fork())
        except KeyboardInterrupt:
            pass
        else:  # caches are warmer than when the lines were counted
            assert at > 0.5 * count.lines
            break
        assert nothing_stands(model), f"after line {at} of {count.lines}"
        if at % 5 == 0:
            assert torch.equal(start.probe(question).logits, exact)
            assert torch.equal(start.fork().feed(question), fed)
            assert torch.equal(model(question), question_alone)
