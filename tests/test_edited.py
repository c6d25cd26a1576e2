"""Blocks of `edited` and `capture`: what they reach, in which thread, and that nothing of them stays."""

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from naive import both, twin
from test_surgery import TEXTS, tokenizer  # noqa: F401
from tiny import naive_of, prompt, tiny

import fastweights as fw

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
IDS = [3, 14, 15, 9, 26, 5, 35, 8]
HEBB = fw.Hebbian(rate=0.3, mu=0.1, decay=0.05, bias=True)
GRADIENT = fw.GradientAscent(rate=0.3, decay=0.05)
LINEARS = ["gate_proj", "up_proj"]
F32 = torch.float32


def no_hooks(model):
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def halve(x, at):
    return x / 2


# ---- edited


def test_every_run_inside_is_edited_and_none_outside():
    model = tiny()
    fw.attach(model, [1, 2], HEBB, LINEARS, rank=32)
    inner, episode = fw.Edit("z", halve, layers=[0, 3]), fw.Episode(model)
    change = twin("z", lambda x: x / 2, layers=[0, 3])
    naive, before = naive_of(model, HEBB), model(torch.tensor([IDS]))
    with fw.edited(model, inner) as done:
        assert list(done) == [{}]
        torch.testing.assert_close(model(torch.tensor([IDS]))[0], naive_of(model).feed(IDS, change), **CLOSE)
        torch.testing.assert_close(episode.feed([IDS])[0], naive.feed(IDS, change, write=True), **CLOSE)
        exact = naive_of(model, HEBB)
        exact.fast = naive.fast
        for logits in (episode.probe(IDS).logits, episode.probe(IDS, at=[0, 8]).logits[1]):
            exact.restart()
            torch.testing.assert_close(logits[0], exact.feed(IDS, change), **CLOSE)
        logits = naive.sites["logits", None][-1]
        for step in episode.generate(None, 3, stop_token_ids=()):
            torch.testing.assert_close(step.logits[0], logits, **CLOSE)
            logits = naive.feed([int(step.token_ids)], change, write=True)[0]
    assert done[0] == {0: list(range(11))}
    assert len(done) == 1
    torch.testing.assert_close(episode.feed([[7]])[0], naive.feed([7], write=True), **CLOSE)
    assert torch.equal(model(torch.tensor([IDS])), before)
    assert no_hooks(model)


def test_a_model_with_a_cache_is_edited_at_absolute_positions():
    model, ids = tiny(), torch.tensor([IDS])
    naive = naive_of(model)
    exact = naive.feed(IDS, twin("k", lambda x: x / 2, positions=[2, 6]))
    with fw.edited(model, fw.Edit("k", halve, positions=[2, 6])) as done:
        cache = model.new_cache(1)
        parts = [model(part, cache=cache) for part in ids.split([5, 1, 2], 1)]
        torch.testing.assert_close(torch.cat(parts, 1)[0], exact, **CLOSE)
        mask = torch.tensor([[0, 0, *[1] * 8]])
        ragged = model(torch.tensor([[0, 0, *IDS]]), attention_mask=mask)
        torch.testing.assert_close(ragged[0, 2:], exact, **CLOSE)
        torch.testing.assert_close(model(ids, logits="last")[0, 0], exact[-1], **CLOSE)
    assert done[0] == {0: [2, 6]}


def test_blocks_stand_inside_each_other_in_the_order_in_which_they_began():
    model, ids = tiny(), torch.tensor([IDS])
    add, double = fw.Edit("mlp_out", lambda x, at: x + 1), fw.Edit("mlp_out", lambda x, at: 2 * x)
    first = twin("mlp_out", lambda x: 2 * (x + 1))
    with fw.edited(model, add) as outer:
        with fw.edited(model, double) as inner:
            torch.testing.assert_close(model(ids)[0], naive_of(model).feed(IDS, first), **CLOSE)
        exact = naive_of(model).feed(IDS, twin("mlp_out", lambda x: x + 1))
        torch.testing.assert_close(model(ids)[0], exact, **CLOSE)
        torch.testing.assert_close(
            fw.Episode(model).feed(ids, edits=double)[0], naive_of(model).feed(IDS, first), **CLOSE
        )
    assert outer[0] == inner[0] == {0: list(range(8))}


def test_an_edit_that_never_fired_is_warned_of_and_others_are_not():
    model = tiny()
    edits = [fw.ablate("z", layers=2), fw.ablate("z", positions=99), fw.ablate("z", rows=0, positions="generated")]
    with pytest.warns(UserWarning, match=r"edit \d.*never acted") as seen, fw.edited(model, *edits) as done:
        fw.Episode(model).feed([IDS])
    assert [str(w.message).split(",")[0] for w in seen] == ["edited(): edit 1", "edited(): edit 2"]
    assert "positions=(99,)" in str(seen[0].message)
    assert done[1] == done[2] == {}
    assert {w.filename for w in seen} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError, match="mine"), fw.edited(model, fw.ablate("z")):
            raise KeyError("mine")  # what went wrong is said, and nothing else
    with pytest.raises(ValueError, match="edits holds a str"), fw.edited(model, "z"):
        pass


def test_linears_become_plastic_and_frozen_inside():
    model = tiny()
    plain = fw.Episode(model).feed([IDS])
    with fw.edited(model, fw.ablate("up.value", layers=1), fw.ablate("z", layers=0)) as done:
        fw.attach(model, [1], HEBB, LINEARS)
        episode, naive = fw.Episode(model), naive_of(model, HEBB, layers=[1])
        change = both(twin("up.value", torch.zeros_like, layers=[1]), twin("z", torch.zeros_like, layers=[0]))
        torch.testing.assert_close(episode.feed([IDS])[0], naive.feed(IDS, change, write=True), **CLOSE)
        torch.testing.assert_close(episode.delta_weight(1, "up_proj"), torch.zeros(52, 24, dtype=torch.float64))
        fw.detach(model)
        exact = naive_of(model).feed(IDS, change)
        torch.testing.assert_close(fw.Episode(model).feed([IDS])[0], exact, **CLOSE)
    assert done[0] == {0: list(range(8))}
    assert torch.equal(fw.Episode(model).feed([IDS]), plain)


def test_surgery_is_edited_and_back_afterwards(tokenizer):  # noqa: F811
    model = tiny()
    options = {"layers": [1, 2], "rule": HEBB, "linears": LINEARS, **TEXTS}
    plain = fw.surgery(model, tokenizer, **options)
    with fw.edited(model, fw.ablate("up.read")), fw.edited(model, fw.ablate("gate.read")):
        frozen = fw.surgery(model, tokenizer, **options)
    assert not torch.allclose(plain.logprob[-1], plain.logprob[0])
    torch.testing.assert_close(frozen.logprob, frozen.logprob[:1].expand_as(frozen.logprob), **CLOSE)
    again = fw.surgery(model, tokenizer, **options)
    assert torch.equal(again.logprob, plain.logprob)
    assert no_hooks(model)


def test_a_generator_made_inside_refuses_to_outlive_its_block():
    model = tiny()
    episode, edit = fw.Episode(model), fw.ablate("z", layers=1)
    with fw.edited(model, edit):
        steps = episode.generate([IDS], 5, stop_token_ids=())
        next(steps)
        unbegun = fw.Episode(model).generate([IDS], 5, stop_token_ids=())
    length = episode.length
    for each in (steps, unbegun):
        with pytest.raises(ValueError, match=r"began inside a block of fw.edited that has ended"):
            next(each)
    assert episode.length == length
    with fw.capture(model, "z"):  # looks do not bind a generator
        steps = episode.generate(None, 5, stop_token_ids=())
        next(steps)
    next(steps)


def test_a_generator_with_edits_of_its_own_works_anywhere():
    model = tiny()
    edit, other = fw.Edit("z", halve, layers=1), fw.Edit("act", halve, layers=3)
    naive = naive_of(model)
    change = twin("z", lambda x: x / 2, layers=[1])
    steps = fw.Episode(model).generate([IDS], 4, edits=edit, stop_token_ids=())
    logits = naive.feed(IDS, change)[-1]
    for number in range(4):
        if number == 2:
            with fw.edited(model, other):  # every run inside
                step = next(steps)
        else:
            step = next(steps)
        torch.testing.assert_close(step.logits[0], logits, **CLOSE)
        inner = twin("act", lambda x: x / 2, layers=[3]) if number == 2 else twin("none")
        logits = naive.feed([int(step.token_ids)], both(inner, change))[0]
        assert no_hooks(model)


def test_another_thread_does_not_see_the_block():
    model, ids = tiny(F32), torch.tensor([IDS])
    fw.attach(model, [1], HEBB)
    plain, found = fw.Episode(model).feed(ids), []

    def elsewhere():
        episode = fw.Episode(model)
        found.extend([episode.feed(ids), fw.Episode(model).probe(ids).logits, model(ids)])
        episode.feed([[4]])
        found.append(episode.path)

    probe, frozen = fw.Episode(model).probe(ids).logits, model(ids)
    begun, go = threading.Event(), threading.Event()

    def slow(x, at):
        begun.set()
        assert go.wait(20)
        return torch.zeros_like(x)

    def here():
        with fw.edited(model, fw.Edit("z", slow, layers=2)):
            found.append(("here", fw.Episode(model).feed(ids)))

    thread = threading.Thread(target=here)
    thread.start()
    assert begun.wait(20)  # the other pass stands inside its edit
    elsewhere()
    go.set()
    thread.join()
    assert torch.equal(found[0], plain)
    assert torch.equal(found[1], probe)
    assert torch.equal(found[2], frozen)
    assert found[3] == "cpu"
    assert not torch.allclose(found[4][1], plain)
    assert no_hooks(model)


def test_without_edits_the_bits_and_the_path_are_as_before_and_they_come_back():
    model = tiny(F32)
    fw.attach(model, [1, 2], HEBB)
    exact, episode = fw.Episode(model), fw.Episode(model)
    for each in (exact, episode):
        each.feed([IDS])
    kept = episode.snapshot()
    with fw.edited(model, fw.ablate("z", layers=1)):
        edited = episode.feed([[4]])
        assert episode.path == "modules"
        assert "edit" in episode.why["cpu"]
    episode.restore(kept)
    with fw.capture(model, "z"):
        captured = episode.feed([[4]])
        assert episode.path == "modules"
    episode.restore(kept)
    assert torch.equal(episode.feed([[4]]), exact.feed([[4]]))
    assert episode.path == exact.path == "cpu"
    torch.testing.assert_close(captured, exact.logits[:, None], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(edited, captured)
    cache = model.new_cache(1)
    model(torch.tensor([IDS]), cache=cache)
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    handle.remove()
    assert not calls


def test_snapshots_forks_and_restores_under_edits():
    model = tiny()
    fw.attach(model, [1, 2], HEBB, LINEARS, rank=32)
    with fw.edited(model, fw.Edit("z", halve, positions=range(20))):
        episode = fw.Episode(model)
        episode.feed([IDS])
        kept, child = episode.snapshot(), episode.fork()
        first = episode.feed([[4, 5]])
        assert torch.equal(child.feed([[4, 5]]), first)
        episode.restore(kept)
        assert torch.equal(episode.feed([[4, 5]]), first)
    episode.restore(kept)
    assert not torch.allclose(episode.feed([[4, 5]]), first)


def test_a_gradient_event_that_waits_under_edits_is_not_read_again():
    model = tiny()
    fw.attach(model, [1, 2], GRADIENT, LINEARS)
    episode = fw.Episode(model, 2)
    episode.feed([IDS, IDS], edits=fw.ablate("z", layers=1))
    child, kept = episode.fork(), episode.snapshot()  # of the same rows: their graph is there
    with pytest.raises(ValueError, match=r"read under edits.*feed the next token first"):
        episode.fork(rows=[0])
    first = episode.feed([[4], [4]])
    assert torch.equal(child.feed([[4], [4]]), first)
    episode.restore(kept)
    assert torch.equal(episode.feed([[4], [4]]), first)
    episode.fork(rows=[0])


def test_a_frozen_reading_of_one_linear_is_that_of_the_frozen_model():
    model = tiny()
    fw.attach(model, [1, 3], HEBB, rank=32)
    episode = fw.Episode(model)
    episode.feed([IDS])
    question = [7, 8, 9, 10]
    frozen = model(torch.tensor([question]))
    edits = [fw.ablate(f"{name}.read") for name in ("gate", "up", "down")]
    trace = episode.probe(question, at="every", sweep=[[], edits, edits[2]], edits=())
    torch.testing.assert_close(trace.logits[:, 1], frozen.expand(9, -1, -1, -1), **CLOSE)
    alone = episode.probe(question, at=[fw.Moment(linears=["gate_proj", "up_proj"])]).logits[0]
    torch.testing.assert_close(trace.logits[8, 2], alone, **CLOSE)
    torch.testing.assert_close(trace.logits[:, 0], episode.probe(question, at="every").logits, **CLOSE)
    torch.testing.assert_close(trace.logits[0, 2], frozen, **CLOSE)


# ---- capture


def test_a_capture_collects_every_pass_after_the_edits_and_no_probe():
    model = tiny()
    fw.attach(model, [1, 2], HEBB, LINEARS, rank=32)
    episode, naive = fw.Episode(model, 2), [naive_of(model, HEBB) for _ in range(2)]
    rows = prompt(2, 6)
    sites = ["embedding", "z", "pattern", "scores", "k_rot", "act", "resid_post", "up.read", "gate.key", "up.value"]
    edit, change = fw.Edit("z", halve, layers=1), twin("z", lambda x: x / 2, layers=[1])
    with fw.capture(model, sites, layers=[1, 2]) as trace:
        assert trace.sites == {}
        episode.feed(rows[:, :4], edits=edit)
        episode.probe(rows, sites="z")
        episode.feed(rows[:, 4:])
        tokens = [step.token_ids for step in episode.generate(None, 2, stop_token_ids=(), edits=edit)]
    whole = torch.cat([rows, torch.stack(tokens, 1)], 1)
    assert torch.equal(trace.input_ids, whole)
    assert torch.equal(trace.positions, torch.arange(8).expand(2, -1))
    for row in range(2):
        ids = whole[row].tolist()
        naive[row].feed(ids[:4], change, write=True)
        naive[row].feed(ids[4:6], write=True)
        naive[row].feed(ids[6:], change, write=True)
        for site in sites[1:]:
            assert trace.layers[site] == [1, 2]
            for layer in (1, 2):
                torch.testing.assert_close(trace[site, layer][row], naive[row].stacked(site, layer), **CLOSE, msg=site)
        torch.testing.assert_close(trace["embedding"][row], naive[row].stacked("embedding"), **CLOSE)
    with pytest.raises(ValueError, match="nothing ran inside the block"), fw.capture(model, "z"):
        episode.probe(rows)
    assert no_hooks(model)


def test_a_capture_keeps_the_places_that_were_named():
    model, ids = tiny(), prompt(3, 6)
    with fw.capture(model, ["z", "k"]) as whole:
        model(ids)
    with fw.capture(model, ["z", "mlp_out"], layers=[3, 1], heads=[2, 0], positions=[1, 4], rows=[2, 0]) as some:
        model(ids)
    torch.testing.assert_close(some["z"], whole["z"][[3, 1]][:, [2, 0]][:, :, [1, 4]][:, :, :, [2, 0]], **CLOSE)
    assert some.layers["z"] == [3, 1]
    assert some["mlp_out"].shape == (2, 2, 2, 24)
    assert torch.equal(some.input_ids, ids[[2, 0]][:, [1, 4]])
    assert some.positions.tolist() == [[1, 4], [1, 4]]
    with fw.capture(model, "z", units=[5, 1], positions="last") as last:
        fw.Episode(model, 3).feed([ids[0].tolist(), ids[1, :2].tolist(), ids[2, :4].tolist()])
    assert last.positions.tolist() == [[-1, -1, 5], [1, -1, -1], [-1, 3, -1]]
    assert last["z"].shape == (4, 3, 3, 4, 2)
    torch.testing.assert_close(last["z"][:, 1, 0], whole["z"][:, 1, 1][..., [5, 1]], **CLOSE)
    assert last.input_ids[1, 0] == ids[1, 1]


def test_a_pass_that_fails_is_not_captured_and_one_of_another_batch_size_fails():
    model = tiny()
    episode = fw.Episode(model, 2)

    def fails(x, at):
        if int(at.positions.max()) > 4:
            raise KeyError("mine")
        return x

    with fw.capture(model, ["z", "logits"]) as trace:
        episode.feed(prompt(2, 3))
        for edit in (fw.Edit("act", fails, layers=2), fw.Edit("logits", fails)):
            with pytest.raises(KeyError, match="mine"):
                episode.feed(prompt(2, 4), edits=edit)
            with pytest.raises(KeyError, match="mine"), fw.edited(model, edit):
                model(prompt(2, 6))
        with pytest.raises(ValueError, match="has seen a batch of 2, and now one of 1"):
            fw.Episode(model).feed([[4]])
        episode.feed(prompt(2, 2, seed=4))
    whole = torch.cat([prompt(2, 3), prompt(2, 2, seed=4)], 1)
    assert torch.equal(trace.input_ids, whole)
    torch.testing.assert_close(trace["z"], fw.Episode(model, 2).probe(whole, sites="z")["z"], **CLOSE)


def test_a_pass_that_is_run_again_token_by_token_is_captured_once():
    model = tiny()
    fw.attach(model, [1, 2], HEBB, LINEARS, rank=32, budget=0.05)
    plain, episode = fw.Episode(model), fw.Episode(model)
    logits = plain.feed([IDS])
    with fw.capture(model, ["logits", "gate"]) as trace:
        torch.testing.assert_close(episode.feed([IDS]), logits, **CLOSE)
    assert trace.input_ids.tolist() == [IDS]
    torch.testing.assert_close(trace["logits"], logits, **CLOSE)


def test_events_of_rows_that_share_one_state_are_captured_row_by_row():
    model, ids = tiny(), prompt(3, 5)
    fw.attach(model, [1], HEBB, LINEARS, rank=64)
    episode = fw.Episode(model, 3, shared=True)
    with fw.capture(model, ["gate.key", "gate.value", "gate.read"]) as trace:
        episode.feed(ids)
    log = episode.logs[1, "gate_proj"]
    U_BRO, K_BRI, _ = log.factors()
    for events, site in ((U_BRO, "gate.value"), (K_BRI, "gate.key")):
        inner = trace[site, 1].transpose(0, 1).flatten(0, 1)  # column by column, in the order of the rows
        torch.testing.assert_close(events[0, :15], inner, **CLOSE)
    assert trace["gate.read"].shape == (1, 3, 5, 52)


def test_what_was_captured_makes_edits():
    model = tiny()
    with fw.capture(model, "resid_post", layers=2) as source:
        fw.Episode(model).feed([IDS])
    other = [n + 3 for n in IDS]
    exact = fw.Episode(model).feed([IDS])
    with fw.edited(model, fw.patch("resid_post", source, layers=2)):
        torch.testing.assert_close(fw.Episode(model).feed([other]), exact, **CLOSE)
        torch.testing.assert_close(model(torch.tensor([other])), exact, **CLOSE)


def test_a_capture_inside_an_edited_block_sees_what_flows_on():
    model, ids = tiny(), torch.tensor([IDS])
    with fw.capture(model, ["act", "mlp_out"], layers=1) as outer, fw.edited(model, fw.ablate("act", layers=1)):
        model(ids)
    assert not outer["act"].any()
    assert not outer["mlp_out"].any()
    assert outer["act"].shape == (1, 1, 8, 52)


@pytest.mark.parametrize("interrupt", [ValueError("mine"), KeyboardInterrupt()])
def test_no_hook_and_no_block_outlives_an_exception(interrupt):
    model, ids = tiny(), torch.tensor([IDS])
    plain = model(ids)

    def fails(x, at):
        raise interrupt

    for run in (lambda: model(ids), lambda: fw.Episode(model).feed(ids), lambda: fw.Episode(model).probe(ids)):
        with (
            pytest.raises(type(interrupt)),
            fw.capture(model, [*fw.SITES[:22]]),
            fw.edited(model, fw.ablate("q"), fw.Edit("mlp_norm", fails, layers=2)),
        ):
            run()
        assert no_hooks(model)
        assert not model.binding.taps
        assert model.binding.tap is None
        assert model.binding.now is None
        assert torch.equal(model(ids), plain)


def test_a_generator_made_inside_is_not_carried_to_another_thread():
    model, found = tiny(), []

    def elsewhere(steps):
        try:
            next(steps)
        except ValueError as error:
            found.append(str(error))

    with fw.edited(model, fw.ablate("z")):
        episode = fw.Episode(model)
        thread = threading.Thread(target=elsewhere, args=(episode.generate([IDS], 3, stop_token_ids=()),))
        thread.start()
        thread.join()
        model(torch.tensor([IDS]))
    assert "belongs to another thread" in found[0]
    assert episode.length == 0


def test_lives_with_edits_in_threads_give_what_they_give_alone():
    model, interval = tiny(F32), sys.getswitchinterval()
    fw.attach(model, [1, 2], HEBB, rank=8)

    def life(seed):
        edit = fw.Edit(("z", "gate", "resid_mid", "pattern")[seed % 4], halve, layers=seed % 3)
        episode, ids = fw.Episode(model), prompt(1, 5 + seed % 4, seed)
        with fw.capture(model, ["mlp_out", "k"], layers=3) as trace:
            found = [episode.feed(ids, edits=edit if seed % 2 else ())]
        found += trace.sites.values()
        with fw.edited(model, edit) as done:
            found.append(model(ids))
            found += [step.logits for step in episode.generate(None, 2, stop_token_ids=())]
        found.append(episode.probe(ids, sites=["z"], sweep=[[], edit, fw.ablate("down.read")], at=[0, 3])["z"])
        episode.feed([[4]])
        return found, [*done], episode.path

    alone = [life(seed) for seed in range(12)]
    try:
        sys.setswitchinterval(5e-6)
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(life, range(12)))
    finally:
        sys.setswitchinterval(interval)
    for (found, done, path), (exact, was, path_alone) in zip(together, alone, strict=True):
        assert done == was
        assert path == path_alone == "cpu"
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    assert no_hooks(model)


def test_what_a_change_runs_itself_is_neither_edited_nor_captured():
    """Otherwise it would change, and look at, itself without an end."""
    model, found = tiny(), []
    fw.attach(model, [1], HEBB, LINEARS)
    other = [4, 5, 6, 7, 8, 9, 10, 11]
    exact = [fw.Episode(model).feed([other]), fw.Episode(model).probe(other).logits, model(torch.tensor([other]))]
    halved = fw.Episode(model).feed([other], edits=fw.Edit("act", halve))

    def change(x, at):
        found.append(fw.Episode(model).feed([other]))
        found.append(fw.Episode(model).probe(other).logits)
        found.append(model(torch.tensor([other])))
        with fw.edited(model, fw.Edit("act", halve)), fw.capture(model, "act") as inner:
            found.append(fw.Episode(model).feed([other]))
        assert inner["act"].shape == (4, 1, 8, 52)
        return x / 2

    edit = fw.Edit("z", change, layers=2)
    plain = fw.Episode(model).feed([IDS], edits=fw.Edit("z", halve, layers=2))
    with fw.capture(model, ["act"]) as trace:
        assert torch.equal(fw.Episode(model).feed([IDS], edits=edit), plain)
    assert trace.input_ids.tolist() == [IDS]
    with fw.edited(model, edit) as done:
        assert torch.equal(fw.Episode(model).feed([IDS]), plain)
        fw.Episode(model).probe(IDS)
        model(torch.tensor([IDS]))
    assert done[0] == {0: list(range(8))}
    assert len(found) == 4 * 4
    for number, logits in enumerate(found):
        torch.testing.assert_close(logits, [*exact, halved][number % 4], rtol=1e-12, atol=1e-12)


def test_a_capture_that_chooses_no_token_is_warned_of():
    model = tiny()
    with (
        pytest.warns(UserWarning, match="positions chose none of the 8 tokens"),
        fw.capture(model, "z", positions=99) as trace,
    ):
        model(torch.tensor([IDS]))
    assert trace["z"].shape == (4, 1, 0, 4, 6)


def test_an_event_that_waits_from_before_a_block_is_read_again_without_its_edits(tmp_path):
    model = tiny()
    fw.attach(model, [1], GRADIENT, LINEARS)
    episode = fw.Episode(model)
    episode.feed([IDS])
    episode.save(tmp_path / "e")
    with fw.capture(model, "z") as trace, fw.edited(model, fw.ablate("z", layers=0)):
        child, loaded = episode.fork(rows=[0]), fw.Episode.load(model, tmp_path / "e")
        fw.Episode(model).feed([[3]])
    assert trace.input_ids.tolist() == [[3]]
    for each in (episode, child, loaded):
        each.feed([[4]])
    exact = episode.delta_weight(1, "up_proj")
    torch.testing.assert_close(child.delta_weight(1, "up_proj"), exact, **CLOSE)
    torch.testing.assert_close(loaded.delta_weight(1, "up_proj"), exact, **CLOSE)
