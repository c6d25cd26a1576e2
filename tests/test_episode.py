"""What an episode promises: one pass = steps, rows apart, snapshot, fork, generation, refusals."""

import pytest
import torch
from tiny import oracle_of, prompt, tiny

import fastweights as fw
from fastweights.sampling import Sampling

RULES = {
    "hebbian": fw.Hebbian(rate=0.3, mu=0.1, gate="derivative", decay=0.1, bias=True),
    "slow": fw.LocalLeastSquares(gamma=0.4, mu=0.05, target="slow", clip=0.5),
    "gradient": fw.GradientAscent(rate=0.3, decay=0.05),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def plastic(rule, dtype=torch.float64, **options):
    model = tiny(dtype)
    return model, fw.attach(model, [1, 2], rule, rank=4, **{"overflow": "grow", **options})


def same_state(one, other, **tolerance):
    assert one.lengths == other.lengths
    assert one.event_counts == other.event_counts
    for layer in range(4):
        for row, n in enumerate(one.lengths):
            for ours, theirs in ((one.cache.keys, other.cache.keys), (one.cache.values, other.cache.values)):
                torch.testing.assert_close(ours[layer][row, :, :n], theirs[layer][row, :, :n], **tolerance)
    for layer, linear in one.logs:
        for row in range(one.batch_size):
            ours, theirs = one.delta_weight(layer, linear, row), other.delta_weight(layer, linear, row)
            torch.testing.assert_close(ours, theirs, **tolerance)


BITS = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@rules
@pytest.mark.parametrize("splits", [[1] * 40, [40], [1, 17, 22], [39, 1]])
def test_any_split_of_a_prompt_gives_the_same_logits_cache_and_fast_state(rule, splits):
    model, _ = plastic(rule)
    ids = prompt(2, 40)
    whole, parts = fw.Episode(model, 2), fw.Episode(model, 2)
    logits = whole.feed(ids)
    split = torch.cat([parts.feed(part) for part in ids.split(splits, dim=1)], dim=1)
    torch.testing.assert_close(split, logits, **CLOSE)
    same_state(parts, whole, **CLOSE)


def test_a_prompt_is_one_pass_over_the_model_for_neuron_local_rules():
    model, _ = plastic(RULES["hebbian"])
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    fw.Episode(model).feed(prompt(1, 50))
    handle.remove()
    assert len(calls) == 1


@rules
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_a_row_of_a_ragged_batch_equals_that_row_alone(rule, side):
    model, _ = plastic(rule)
    ids = prompt(3, 12)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, {"left": slice(0, 5), "right": slice(8, 12), "inside": slice(3, 6)}[side]] = 0
    mask[2, :10] = 0
    write = torch.rand(3, 12, generator=torch.Generator().manual_seed(4)) < 0.7
    more = prompt(3, 5, seed=8)
    batch = fw.Episode(model, 3)
    logits = batch.feed(ids, update=write, attention_mask=mask)
    more_logits = batch.feed(more, attention_mask=torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]))
    for row in range(3):
        kept = mask[row].bool()
        alone = fw.Episode(model)
        ours = alone.feed(ids[row, kept], update=write[row : row + 1, kept])
        torch.testing.assert_close(logits[row, kept], ours[0], **CLOSE)
        if n := (5, 2, 0)[row]:
            torch.testing.assert_close(more_logits[row, :n], alone.feed(more[row, :n])[0], **CLOSE)
        assert batch.lengths[row] == alone.length
        assert all(batch.event_counts[s][row] == alone.event_counts[s][0] for s in alone.logs)
        for site in alone.logs:
            torch.testing.assert_close(batch.delta_weight(*site, row), alone.delta_weight(*site), **CLOSE)


def test_lists_of_different_lengths_are_a_ragged_batch():
    model, _ = plastic(RULES["slow"])
    episode = fw.Episode(model, 2)
    last = episode.feed([[3, 4, 5, 6], [7, 8]], logits="last")
    alone = fw.Episode(model)
    torch.testing.assert_close(last[1:], alone.feed([7, 8], logits="last"), **CLOSE)
    assert episode.lengths == [4, 2]
    assert (episode.length, episode.events) == (4, 4)


@rules
def test_restore_then_the_same_steps_gives_the_same_bits(rule):
    model, _ = plastic(rule)
    episode = fw.Episode(model)
    episode.feed(prompt(1, 9))
    snapshot = episode.snapshot()
    options = {"max_new_tokens": 12, "temperature": 1.0, "update": "all", "stop_token_ids": ()}
    first = [(step.token_ids, step.logits) for step in episode.generate(**options)]
    after_first = episode.snapshot()
    for _ in range(2):
        episode.restore(snapshot)
        assert (episode.length, episode.events) == (9, 9 if rule.neuron_local else 8)
        again = [(step.token_ids, step.logits) for step in episode.generate(**options)]
        assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, again, strict=True))
    other = fw.Episode(model)
    other.restore(after_first)
    same_state(other, episode, **BITS)


@rules
def test_a_fork_changes_nothing_in_its_parent(rule):
    model, _ = plastic(rule)
    episode, ids = fw.Episode(model), prompt(1, 9)
    episode.feed(ids)
    twin = fw.Episode(model)
    twin.feed(ids)
    fork = episode.fork()
    fork.feed(prompt(1, 30, seed=5))
    same_state(episode, twin, **BITS)
    torch.testing.assert_close(episode.feed(ids), twin.feed(ids), **BITS)
    assert fork.length == 39


@rules
def test_a_probe_starts_at_position_0_and_changes_nothing(rule):
    model, fast = plastic(rule)
    oracle, ids, question = oracle_of(model, fast), prompt(1, 10), prompt(1, 6, seed=7)
    episode = fw.Episode(model)
    for t in range(10):
        before = episode.feed(ids[:, t : t + 1])
        oracle.step(int(ids[0, t]))
        snapshot = episode.snapshot()
        trace = episode.probe(question, sites=["resid_pre", "resid_mid", "resid_post"])
        theirs, hidden_TLD = oracle.frozen_probe(question[0].tolist())
        torch.testing.assert_close(trace.logits[0], theirs, **CLOSE)
        torch.testing.assert_close(trace.hidden_states[:, 0], hidden_TLD.transpose(0, 1), **CLOSE)
        torch.testing.assert_close(trace["resid_post"][:-1], trace["resid_pre"][1:], **BITS)
        other = fw.Episode(model)
        other.restore(snapshot)
        same_state(other, episode, **BITS)
    assert before.shape == (1, 1, 61)


def test_one_question_is_asked_of_every_row_and_many_of_one():
    model, _ = plastic(RULES["hebbian"])
    episode, question = fw.Episode(model, 3), prompt(1, 4)
    episode.feed(prompt(3, 7))
    logits = episode.probe(question).logits
    assert logits.shape == (3, 4, 61)
    assert float((logits[0] - logits[1]).norm()) > 1e-3
    one = fw.Episode(model)
    one.feed(prompt(3, 7)[:1])
    questions = [[5, 6, 7, 8], [9, 10]]
    both = one.probe(questions).logits
    torch.testing.assert_close(both[1, :2], one.probe([9, 10]).logits[0], **CLOSE)
    torch.testing.assert_close(one.probe(question).logits[0], logits[0], **CLOSE)
    with pytest.raises(ValueError, match="got batch 2, but this episode has batch 3"):
        episode.probe(questions)


def test_no_hook_and_no_binding_survives_an_exception():
    model, _ = plastic(RULES["hebbian"])
    episode = fw.Episode(model)
    episode.feed(prompt(1, 3))
    frozen = model(prompt(1, 4))

    def broken(*_):
        raise RuntimeError("broken")

    handle = model.model.layers[3].register_forward_hook(broken)
    for call in (episode.feed, lambda ids: episode.probe(ids, sites=["resid_post", "resid_mid"])):
        with pytest.raises(RuntimeError, match="broken"):
            call(prompt(1, 4))
    handle.remove()
    assert (episode.length, episode.events) == (3, 3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(prompt(1, 4)), frozen)


@pytest.mark.parametrize(
    ("update", "positions"),
    [
        ("all", range(8)),
        ("none", []),
        ("prompt", range(5)),
        ("generated", range(5, 8)),
        ([1, 4, 6, 99], [1, 4, 6]),
        (torch.tensor([0, 7]), [0, 7]),
        (torch.tensor([[True, False, True, False, False]]), [0, 2]),
        (lambda position, token_id: position % 3 == 0, [0, 3, 6]),
        (lambda position, token_id: token_id == 11, [1, 3]),
        (fw.token_ids([11, 12]), [1, 2, 3]),
    ],
)
def test_update_says_which_tokens_of_prompt_and_generation_are_written(update, positions):
    model, _ = plastic(fw.Hebbian(rate=1e-9))
    episode, ids = fw.Episode(model), [10, 11, 12, 11, 13]
    for step in episode.generate(ids, max_new_tokens=3, update=update, stop_token_ids=()):
        ids.append(int(step.token_ids[0]))
    expected = [t for t in positions if not (callable(update) and not update(t, ids[t]))]
    assert episode.length == 8
    log = episode.logs[1, "down_proj"]
    assert log.event_counts == [len(expected)]
    everything = fw.Episode(model)
    everything.feed(ids)
    torch.testing.assert_close(log.K_BRI[0, : len(expected)], everything.logs[1, "down_proj"].K_BRI[0, list(expected)])


def test_greedy_generation_with_plasticity_equals_the_oracle():
    model, fast = plastic(RULES["slow"])
    oracle, ids = oracle_of(model, fast), prompt(1, 6)[0].tolist()
    logits = oracle.feed(ids, write=False)[-1]
    for step in fw.Episode(model).generate(ids, max_new_tokens=10, stop_token_ids=()):
        assert int(step.token_ids[0]) == int(logits.argmax())
        torch.testing.assert_close(step.logits[0], logits, **CLOSE)
        logits = oracle.step(int(logits.argmax()), write=True)


def test_rows_that_end_stop_moving_and_writing():
    model, _ = plastic(fw.Hebbian(rate=1e-6))
    ids = prompt(4, 6, seed=3)
    free = [step.token_ids.tolist() for step in fw.Episode(model, 4).generate(ids, 8, stop_token_ids=())]
    stop = free[2][0]
    episode = fw.Episode(model, 4)
    steps = list(episode.generate(ids, 8, stop_token_ids=[stop]))
    for row in range(4):
        alone = fw.Episode(model)
        own = [int(s.token_ids[0]) for s in alone.generate(ids[row], 8, stop_token_ids=[stop])]
        assert [int(s.token_ids[row]) for s in steps[: len(own)]] == own
        assert episode.lengths[row] == alone.length == 6 + len(own)
        assert episode.event_counts[1, "up_proj"][row] == len(own)
        assert steps[len(own) - 1].ended[row] == (stop in own)
    assert steps[2].ended[0]


def test_a_seed_repeats_and_generation_goes_on_without_a_prompt():
    model, _ = plastic(RULES["hebbian"])
    ids = prompt(1, 5)

    def run(count, **options):
        episode = fw.Episode(model)
        tokens = [int(s.token_ids) for s in episode.generate(ids, count, temperature=1.5, seed=3, stop_token_ids=())]
        more = episode.generate(None, **options) if options else ()
        return tokens + [int(s.token_ids) for s in more]

    assert run(10) == run(10)
    assert run(10) == run(4, max_new_tokens=6, temperature=1.5, stop_token_ids=())


def test_a_row_that_has_read_nothing_cannot_generate():
    model, _ = plastic(RULES["hebbian"])
    episode = fw.Episode(model, 2)
    episode.feed([[3, 4], [5, 6]], attention_mask=[[1, 1], [0, 0]])
    with pytest.raises(ValueError, match="row 1 has read no token"):
        next(episode.generate(None, 1))


def test_sampling_filters_equal_transformers():
    from transformers.generation import logits_process as hf

    logits = 3 * torch.randn(4, 61, generator=torch.Generator().manual_seed(0))
    ids = prompt(4, 9)
    ours = Sampling(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.3)
    theirs = hf.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits)
    for warper in (
        hf.TemperatureLogitsWarper(0.7),
        hf.TopKLogitsWarper(20),
        hf.TopPLogitsWarper(0.8),
        hf.MinPLogitsWarper(0.05),
    ):
        theirs = warper(ids, theirs)
    assert torch.equal(ours.filtered(ours._penalised(logits, ids.tolist())), theirs)


def test_overflow_error_refuses_the_whole_feed_before_it_starts():
    model, _ = plastic(RULES["hebbian"], overflow="error")
    episode = fw.Episode(model)
    episode.feed(prompt(1, 3))
    snapshot = episode.snapshot()
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate_proj: 5 events do not fit its rank of 4 \(3 are"):
        episode.feed(prompt(1, 2))
    other = fw.Episode(model)
    other.restore(snapshot)
    same_state(other, episode, **BITS)
    episode.feed(prompt(1, 2), update=[3])
    assert (episode.length, episode.events) == (5, 4)


@rules
def test_a_non_finite_event_is_named_and_nothing_is_written(rule):
    model, _ = plastic(rule)
    episode = fw.Episode(model)
    episode.feed(prompt(1, 4))
    snapshot = episode.snapshot()
    model.model.embed_tokens.weight[7, 3] = float("nan")
    with pytest.raises(ValueError, match=r"event \d+ of layers.1.mlp.gate_proj \(row 0\) has a non-finite factor"):
        episode.feed([5, 6, 7, 8])
    other = fw.Episode(model)
    other.restore(snapshot)
    same_state(other, episode, **BITS)
    assert torch.isfinite(episode.feed([5, 6])).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.feed([]), r"input_ids has shape \[.*\]: expected \[B, T\] with at least one token"),
        (lambda e: e.feed([[], []]), "expected .* at least one token"),
        (lambda e: e.feed([3, 61]), "token id 61 is outside the vocabulary of 61"),
        (lambda e: e.feed([3, -1]), "token id -1 is outside the vocabulary of 61"),
        (lambda e: e.feed([0.5]), "input_ids is torch.float32: expected whole numbers"),
        (lambda e: e.feed([[1], [2]]), "input_ids has batch 2, but this episode has batch 1"),
        (lambda e: e.feed([1] * 19), r"21 tokens do not fit: the KV cache holds 20 per row \(2 are in use\)"),
        (lambda e: e.feed([1, 2], attention_mask=[1]), r"attention_mask has shape \[1, 1\]"),
        (lambda e: e.feed([1, 2], attention_mask=[0, 0]), "attention_mask is all padding"),
        (lambda e: e.feed([1], update="some"), "update='some': expected 'all', 'none'"),
        (lambda e: e.feed([1], update=[-2]), "update position -2 is negative"),
        (lambda e: e.feed([1], update=torch.tensor([[True, False]])), r"update mask has shape \[1, 2\]"),
        (lambda e: e.feed([1], logits="first"), "logits='first': expected 'all' or 'last'"),
        (lambda e: e.probe([1], at="then"), "at='then'"),
        (lambda e: e.probe([1], sites=["resid"]), "site 'resid' does not exist: did you mean"),
        (lambda e: e.generate([1], top_p=0.0), r"generate\(top_p=0.0\): expected"),
        (lambda e: e.generate([1], temperature=-1.0), r"generate\(temperature=-1.0\): expected"),
        (lambda e: e.generate([1], max_new_tokens=-1), r"generate\(max_new_tokens=-1\)"),
        (lambda e: e.generate([1], max_new_tokens=18), "the KV cache holds 20 per row"),
        (lambda e: e.generate([1], stop_strings=["x"]), "needs tokenizer="),
        (lambda e: fw.Episode(e.model).generate(), "give a prompt"),
        (lambda e: e.restore(fw.Episode(e.model, 3).snapshot()), "batch 3, but this episode has batch 1"),
    ],
)
def test_refusals_name_the_thing_and_change_nothing(call, message):
    model, _ = plastic(RULES["hebbian"])
    episode = fw.Episode(model, max_length=20)
    episode.feed([4, 5])
    snapshot = episode.snapshot()
    with pytest.raises(ValueError, match=message):
        call(episode)
    other = fw.Episode(model, max_length=20)
    other.restore(snapshot)
    same_state(other, episode, **BITS)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("max_length", 0), ("max_length", 2.5)])
def test_an_episode_of_no_size_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"Episode\({name}={value}\): expected a whole number"):
        fw.Episode(tiny(), **{name: value})
    with pytest.raises(ValueError, match=r"Episode\(max_length=300\): this model has positions up to 256"):
        fw.Episode(tiny(), max_length=300)


def test_attaching_after_the_episode_was_made_is_refused():
    model = tiny()
    episode = fw.Episode(model)
    fw.attach(model, [0], fw.Hebbian())
    with pytest.raises(ValueError, match="make a new one"):
        episode.feed([1])


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_model_that_changes_its_dtype_under_an_episode_is_refused(before, after):
    model = tiny(dtype=before)
    episode, cache = fw.Episode(model), model.new_cache(1)
    episode.feed([1, 2, 3])
    model(torch.tensor([[1]]), cache=cache)
    model.to(after)
    for ids in ([4], [4, 5]):
        with pytest.raises(ValueError, match=rf"began with a model in {before} on cpu, which is in {after} on cpu now"):
            episode.feed(ids)
        with pytest.raises(RuntimeError, match="dtype"):  # torch's: the caller's own cache
            model(torch.tensor([ids]), cache=cache)
    assert episode.length == 3
    model.to(before)
    episode.feed([4])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("hello", "input_ids is a str: expected token ids"),
        (["hello"], "input_ids holds text: expected token ids"),
        (5, "input_ids is a int: expected token ids"),
        (None, "input_ids is a NoneType: expected token ids"),
    ],
)
def test_text_and_other_things_that_are_no_ids_are_refused(given, message):
    episode = fw.Episode(tiny())
    for ask in (episode.feed, episode.probe):
        with pytest.raises(ValueError, match=message):
            ask(given)


@pytest.mark.parametrize("update", [None, True, 30])
def test_an_update_that_says_nothing_is_refused(update):
    with pytest.raises(ValueError, match=rf"update={update}: expected 'all', 'none'"):
        fw.Episode(tiny()).feed([1, 2], update=update)
