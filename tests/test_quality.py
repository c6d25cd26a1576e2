"""The benchmarks of quality on tiny inputs: what recall and editing compute, and that they run."""

import json

import pytest
import torch
from tiny import tiny
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

import fastweights as fw
from fastweights.benchmarks import editing, recall
from fastweights.tokenizer import Tokenizer

WORDS = ["the", "capital", "of", "France", "is", "Paris", "Rome", "Lyon", ".", "a", "city", "in", "It", "who"]


# ---- recall


def dense(one, beta, decay=0.0, delta=True):
    """ΔW of every stream in float64, by the equation."""
    found = []
    for keys_TI, values_TO in zip(one.written_BTI.double(), one.values_BTO.double(), strict=True):
        W = torch.zeros(values_TO.shape[1], keys_TI.shape[1], dtype=torch.float64)
        for k, v in zip(keys_TI, values_TO, strict=True):
            u = beta * (v - W @ k if delta else v)
            W = (1 - decay) * W + torch.outer(u, k) / (k @ k)
        found.append(W)
    return torch.stack(found)


@pytest.mark.parametrize("name", recall.RULES)
def test_recall_writes_the_equation_of_its_rule(name):
    one = recall.stream(6, width=5, streams=3)
    log = recall.written(one, recall.RULES[name](one.values_BTO), "grow", 4)
    beta, decay = (0.5 if "0.5" in name else 1.0), (0.02 if "decay" in name else 0.0)
    for row, W in enumerate(dense(one, beta, decay, delta="delta" in name)):
        torch.testing.assert_close(log.delta_weight(row, torch.float64), W, rtol=0, atol=1e-5)


def test_delta_overwrites_orthogonal_keys_and_sum_adds_old_and_new():
    one = recall.stream(4, width=8, streams=2)
    one = one._replace(keys_BNI=torch.eye(8)[:4].expand(2, 4, 8))
    read = {
        name: recall.recalled(recall.written(one, recall.RULES[name](one.values_BTO), "grow", 4), one.keys_BNI)
        for name in ("delta, β 1", "sum")
    }
    scores = recall.scores(one, read["delta, β 1"])
    assert (scores["right"], scores["old"]) == (1.0, 0.0)
    assert scores["error"] < 1e-6
    assert recall.scores(one, read["sum"])["error"] == pytest.approx(1, abs=1e-6)  # the old value is still there
    assert recall.scores(one, recall.least_squares(one))["error"] < 1e-6


@pytest.mark.parametrize("policy", recall.POLICIES)
def test_certificates_bound_what_a_log_lost(policy):
    one = recall.stream(20, width=12, streams=2)
    log = recall.written(one, recall.RULES["delta, β 1"](one.values_BTO), policy, 6)
    found = recall.bounds(log)
    if policy == "compress":
        assert 0.1 < found["error_2"] <= found["bound_2"]
        assert 0.1 < found["error_F"] <= found["bound_F"]
    else:
        assert found["bound_2"] == 0
        assert (found["error_2"] > 0.5) == (policy == "evict")


def test_recall_prints_tables_and_draws_its_picture(tmp_path):
    found = recall.measure([3, 9], width=6, rank=4, streams=1)
    assert found["rules"]["least squares"][3]["right"] == 1
    table = recall.lines(found, rank=4)
    assert table[3] == "| | N = 3 | N = 9 |"
    assert {row.count("|") for row in table if row.startswith("|")} == {4}
    recall.picture(found, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").stat().st_size > 10_000


# ---- editing


def test_the_facts_have_counterfacts_form():
    chosen = editing.facts()
    assert len(chosen) == len({fact.asked for fact in chosen}) == 50
    assert not {fact.asked for fact in chosen} & {fact.asked for fact in editing.facts("tune")}
    for fact in [*chosen, *editing.facts("tune")]:
        assert fact.prompt.count("{}") == 1
        assert fact.true != fact.new
        assert len(fact.paraphrases) == 2
        assert 2 <= len(fact.neighbours) <= 3
        assert all(fact.subject in text for text in fact.paraphrases)
        assert fact.asked not in fact.neighbours
        assert fact.up_to_subject.endswith(fact.subject)
        assert fact.stated == f"{fact.asked} {fact.new}."


@pytest.fixture(scope="module")
def small():
    backend = Backend(models.WordLevel({word: n + 2 for n, word in enumerate(WORDS)} | {"?": 60}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return tiny(torch.float32, max_position_embeddings=64), Tokenizer(backend)


FACT = editing.Fact(
    "capital", "France", "the capital of {} is", "Paris", "Rome", ("a city in France is", "It is France"), ("Lyon is",)
)


def asked(model, tokenizer, text):
    return model(torch.tensor([tokenizer.encode(text)]))[0, -1].log_softmax(-1)


def test_scores_are_shares_of_prompts_whose_new_object_is_likelier(small):
    model, tokenizer = small
    found = editing.scored(fw.Episode(model), tokenizer, FACT, [3, 9, 5])
    new, true = (tokenizer.encode(word)[0] for word in ("Rome", "Paris"))
    gains = [float(x[new] - x[true]) for x in (asked(model, tokenizer, p) for p in (FACT.asked, *FACT.paraphrases))]
    assert found["efficacy"] == float(gains[0] > 0)
    assert found["paraphrase"] == sum(gain > 0 for gain in gains[1:]) / 2
    aside = asked(model, tokenizer, "Lyon is")
    assert found["neighbourhood"] == float(aside[true] > aside[new])
    logits = model(torch.tensor([[3, 9, 5]]))[0].log_softmax(-1)
    assert found["passage"] == pytest.approx(-float(logits[0, 9] + logits[1, 5]) / 2, abs=1e-5)


@pytest.mark.parametrize("covariance", [False, True])
def test_romes_event_puts_the_target_out_at_its_key(small, covariance, monkeypatch):
    model, tokenizer = small
    W = model.model.layers[1].mlp.down_proj.weight
    A = torch.randn(52, 52, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(editing, "second_moment", lambda *_: A @ A.T + torch.eye(52))
    k, change = editing.target(model, tokenizer, FACT, 1)
    inverse = torch.linalg.inv(A @ A.T + torch.eye(52)) if covariance else torch.eye(52, dtype=torch.float64)
    expected = torch.outer(change.double(), inverse @ k.double()) / (k.double() @ inverse @ k.double())
    editing_of_one = editing.rome(model, tokenizer, [FACT], covariance, layer=1)
    try:
        episode, prefix = next(editing_of_one)
        assert prefix == ""
        delta = episode.delta_weight(1, "down_proj").double()
        torch.testing.assert_close(delta @ k.double(), change.double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(delta, expected, rtol=1e-3, atol=1e-5)
        new = tokenizer.encode("Rome")[0]
        gain = episode.probe([tokenizer.encode(FACT.asked)]).logits[0, -1].log_softmax(-1)[new]
    finally:
        fw.detach(model)
    assert gain > asked(model, tokenizer, FACT.asked)[new] + 0.5
    assert model.model.layers[1].mlp.down_proj.weight is W


@pytest.mark.parametrize(("passes", "object_alone"), [(1, False), (3, False), (3, True)])
def test_gradient_ascent_over_the_stated_fact_raises_the_new_object(small, passes, object_alone):
    model, tokenizer = small
    before = asked(model, tokenizer, FACT.asked)[tokenizer.encode("Rome")[0]]
    way = editing.reading(model, tokenizer, [FACT, FACT], fw.GradientAscent(0.05), range(1, 3), passes, object_alone)
    try:
        episodes = [episode for episode, _ in way]
        # of the sentence's seven tokens the last writes nothing, and one stands before the object
        assert [episode.events for episode in episodes] == [(1 if object_alone else 6) * passes] * 2
        logits = [episode.probe([tokenizer.encode(FACT.asked)]).logits[0, -1] for episode in episodes]
    finally:
        fw.detach(model)
    torch.testing.assert_close(*logits)
    assert logits[0].log_softmax(-1)[tokenizer.encode("Rome")[0]] > before + 0.1 * passes


def test_intervals_are_of_means_of_facts_drawn_again():
    mean, low, high = editing.interval([0.0, 1.0] * 25)
    assert mean == 0.5
    assert low == pytest.approx(0.36, abs=0.03)
    assert high == pytest.approx(0.64, abs=0.03)
    assert editing.interval([1.0] * 5) == (1.0, 1.0, 1.0)


def test_a_table_has_a_row_for_each_way_and_the_model_is_left_frozen(small, monkeypatch):
    model, tokenizer = small
    ways = {name: editing.WAYS[name] for name in ("nothing", "context in the prompt")}
    ways["Hebbian"] = lambda m, t, f: editing.reading(m, t, f, fw.Hebbian(0.1), range(1, 3))
    found = editing.measure(model, tokenizer, [FACT] * 2, ways)
    assert json.loads(json.dumps(found)) == found
    assert [len(scores) for scores in found.values()] == [2, 2, 2]
    assert len(editing.lines(found)) == 5
    assert "+0.000 (+0.000 to +0.000) |" in editing.lines(found)[2]
    fw.attach(model, [1], fw.Hebbian(0.1))
    fw.detach(model)
