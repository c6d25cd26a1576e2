"""The experiment on a tiny model, number by number against the oracle's loop."""

import json

import pytest
import torch
from oracle import Oracle
from safetensors.torch import load_file
from tiny import CONFIG, described, tiny
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

import fastweights as fw
from fastweights.plastic import plastic_linears
from fastweights.report import paragraph, table
from fastweights.tokenizer import Tokenizer

WORDS = ["the", "sky", "is", "blue", "red", "question", ":", "who", "?", "A", "B", "(", ")", "and", "so", "it", "goes"]
TEXTS = {"context": "the sky is red and so it goes", "question": "question : who ? (", "answers": ["A", "B goes so"]}


@pytest.fixture
def tokenizer(tmp_path):
    """A word-level tokenizer without special tokens."""
    backend = Backend(models.WordLevel({word: n + 2 for n, word in enumerate(WORDS)} | {"?": 60}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.from_folder(tmp_path)


def test_tokenizer_of_these_tests_joins_answers_by_themselves(tokenizer):
    assert tokenizer.encode("who ?") == [9, 60]


@pytest.mark.parametrize(
    "rule", [fw.Hebbian(rate=0.2, decay=0.05), fw.GradientAscent(rate=0.3)], ids=lambda r: type(r).__name__
)
def test_every_number_of_the_record_equals_the_oracles_loop(tokenizer, rule):
    model = tiny()
    record = fw.surgery(model, tokenizer, layers=[1, 2], rule=rule, linears=["up_proj", "down_proj"], **TEXTS)
    assert not plastic_linears(model)
    plastic = {(layer, linear): described(rule) for layer in (1, 2) for linear in ("up_proj", "down_proj")}
    oracle = Oracle(model.state_dict(), CONFIG, plastic)
    context, question = tokenizer.encode(TEXTS["context"]), tokenizer.encode(TEXTS["question"])
    answers = [tokenizer.encode(a) for a in TEXTS["answers"]]
    target = oracle.frozen_probe(context + question)[1][-1]
    count = len(context) - (not rule.neuron_local)
    assert record.distance.shape == record.cosine.shape == record.relative.shape == (count + 1, 5)
    assert record.logprob.shape == (count + 1, 2)
    row = 0

    def compare():
        hidden_LD = oracle.frozen_probe(question)[1][-1]
        torch.testing.assert_close(record.distance[row], (hidden_LD - target).norm(dim=-1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(record.relative[row], record.distance[row] / target.norm(dim=-1))
        cosine = 1 - (hidden_LD * target).sum(-1) / hidden_LD.norm(dim=-1) / target.norm(dim=-1)
        torch.testing.assert_close(record.cosine[row], cosine, rtol=1e-9, atol=1e-9)
        for column, ids in enumerate(answers):
            logprob_TV = oracle.frozen_probe(question + ids)[0].log_softmax(-1)
            expected = sum(logprob_TV[len(question) - 1 + t, i] for t, i in enumerate(ids))
            torch.testing.assert_close(record.logprob[row, column], expected, rtol=1e-9, atol=1e-9)
        norm = sum(float(dW.norm()) ** 2 for dW in oracle.dW.values()) ** 0.5
        assert float(record.delta_norm[row]) == pytest.approx(norm, rel=1e-7)

    compare()
    for token in context:
        oracle.step(token)
        if max(oracle.events.values()) > row:
            row += 1
            compare()
    assert row == count
    assert [(e.number, e.position, e.token_id) for e in record.events] == [
        (n + 1, n, token) for n, token in enumerate(context[:count])
    ]
    with_context = oracle_logprob(model, context + question, answers)
    torch.testing.assert_close(record.target_logprob, with_context, rtol=1e-9, atol=1e-9)


def oracle_logprob(model, prompt, answers):
    oracle = Oracle(model.state_dict(), CONFIG, {})
    scores = []
    for ids in answers:
        logprob_TV = oracle.frozen_probe(prompt + ids)[0].log_softmax(-1)
        scores.append(sum(logprob_TV[len(prompt) - 1 + t, i] for t, i in enumerate(ids)))
    return torch.stack(scores)


def test_generation_goes_on_after_the_context_and_only_chosen_positions_are_written(tokenizer):
    model = tiny()
    seen = []
    record = fw.surgery(
        model,
        tokenizer,
        layers=[0],
        rule=fw.Hebbian(rate=0.1),
        update=[2, 5, 8, 10],
        max_new_tokens=3,
        probe_every=2,
        on_event=lambda episode, event: seen.append((event.number, episode.length, event.logprob is None)),
        **TEXTS,
    )
    assert [event.position for event in record.events] == [2, 5, 8, 10]
    assert [event.generated for event in record.events] == [False, False, True, True]
    assert record.probed == [0, 2, 4]
    assert record.distance.shape == (3, 5)
    assert seen == [(1, 3, True), (2, 6, False), (3, 9, True), (4, 11, False)]
    assert len(record.tokens) == 11


def test_a_callback_may_read_but_not_disturb(tokenizer):
    model = tiny()

    def looks(episode, event):
        episode.probe([3, 4], sites=["resid_mid"])
        episode.fork().feed([5, 6])

    settings = {"layers": [1], "rule": fw.LocalLeastSquares(gamma=0.3), **TEXTS}
    with_callback = fw.surgery(model, tokenizer, on_event=looks, **settings)
    one_by_one = fw.surgery(model, tokenizer, on_event=lambda episode, event: None, **settings)
    assert torch.equal(with_callback.logprob, one_by_one.logprob)
    batched = fw.surgery(model, tokenizer, **settings)
    torch.testing.assert_close(batched.logprob, one_by_one.logprob, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(batched.distance, one_by_one.distance, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="on_event changed the episode at event 1: it may only read it"):
        fw.surgery(model, tokenizer, on_event=lambda episode, event: episode.feed([3]), **settings)
    assert not plastic_linears(model)


def test_saved_files_hold_the_record(tokenizer, tmp_path):
    record = fw.surgery(tiny(), tokenizer, layers=[1], rule=fw.Hebbian(rate=0.1), **TEXTS)
    record.save(tmp_path / "new" / "folder")
    arrays = load_file(tmp_path / "new" / "folder" / "arrays.safetensors")
    whole = json.loads((tmp_path / "new" / "folder" / "record.json").read_text())
    for name in ("logprob", "distance", "cosine", "relative", "target_logprob", "delta_norm"):
        assert torch.equal(arrays[name], getattr(record, name))
        assert whole[name] == getattr(record, name).tolist()
    assert whole["tokens"] == [*WORDS[0:3], "red", "and", "so", "it", "goes"]
    assert len(whole["events"]) + 1 == len(whole["distance"]) == 9
    assert whole["settings"]["layers"] == [1]


def test_the_table_has_a_line_per_event_and_the_paragraph_a_verdict(tokenizer):
    record = fw.surgery(tiny(), tokenizer, layers=[1], rule=fw.Hebbian(rate=0.1), **TEXTS)
    text = table(record, width=120)
    assert len(text.splitlines()) == 1 + 9 + 1 + 1
    assert f"{float(record.logprob[3, 0]):.3f}" in text
    assert f"{float(record.distance[8, -1]):.2f}" in text
    assert len(table(record, rows=4, width=120).splitlines()) == 1 + 4 + 1 + 1
    said = paragraph(record)
    assert "After 8 events" in said
    lead = record.logprob[:, 0] - record.logprob[:, 1]
    assert f"{abs(float(lead[-1] - lead[0])):.3f} nats" in said
    assert ("gained" in said) == (float(lead[-1]) > float(lead[0]))
    assert ("did not learn" in said) or ("moved towards" in said) or ("learned" in said) or ("did not take" in said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": "  "}, "empty context"),
        ({"question": ""}, "empty question"),
        ({"answers": []}, r"answers=\[\]: expected a list"),
        ({"answers": "AB"}, "answers='AB': expected a list"),
        ({"answers": ["A", ""]}, "answers holds an empty text"),
        ({"layers": [9]}, "layer 9 does not exist"),
        ({"update": [77]}, r"update=\[77\] writes none of the context's 8 tokens"),
        ({"probe_every": 0}, r"probe_every=0\): expected a whole number"),
        ({"context": "the " * 300}, "the context has 300 tokens"),
        ({"question": "who " * 250}, "have 258 tokens, but this model has positions up to 256"),
    ],
)
def test_refusals_leave_the_model_as_it_was(tokenizer, changes, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        fw.surgery(model, tokenizer, **{"layers": [1], "rule": fw.Hebbian(), **TEXTS, **changes})
    assert not plastic_linears(model)
