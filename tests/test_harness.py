"""The adapter for lm-evaluation-harness: the harness itself on local tasks, and each request against a plain loop."""

import json
import math
import os

import pytest
import torch
from tiny import tiny
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

import fastweights as fw

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # read when lm_eval is imported
lm_eval = pytest.importorskip("lm_eval", reason='needs pip install "fastweights[eval]"')
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from fastweights.harness import FastWeightsLM  # noqa: E402

RULE = fw.Hebbian(rate=0.3, decay=0.01)
DOCS = [
    {"text": "w3 w9 w4 w7", "options": [" w5", " w6 w8"], "gold": 1},
    {"text": "w11 w2 w30", "options": [" w5 w1 w1", " w40"], "gold": 0},
    {"text": "w8 w8 w9 w12 w13", "options": [" w9", " w17"], "gold": 0},
]


@pytest.fixture(scope="module")
def tokenizer():
    """A word is a token."""
    backend = Backend(models.WordLevel({f"w{n}": n for n in range(61)}, "w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fw.Tokenizer(backend, {"eos_token": "w60", "pad_token": "w0"})


def plastic(tokenizer, rule=RULE, **options):
    model = tiny(torch.float64)
    if rule is not None:
        fw.attach(model, [1, 2], rule)
    return FastWeightsLM(model, tokenizer, **options)


def asked(kind, *arguments, document=None):
    numbers = range(len(arguments)) if document is None else document
    return [
        Instance(kind, {}, args, n, ("tiny", doc, 1))
        for n, (args, doc) in enumerate(zip(arguments, numbers, strict=True))
    ]


def by_hand(lm, context, continuation, episode=None, write=(True, True)):
    """log p of ids after ids, one token per feed; the episode, as it is then."""
    episode = episode or fw.Episode(lm.model)
    for ids in context:
        episode.feed([ids], "all" if write[0] else "none")
    total, greedy = 0.0, True
    for n, ids in enumerate(continuation):
        logprob = episode.logits[0].log_softmax(-1)
        total, greedy = total + float(logprob[ids]), greedy and int(logprob.argmax()) == ids
        if n < len(continuation) - 1:
            episode.feed([ids], "all" if write[1] else "none")
    return total, greedy


PAIRS = [(doc["text"], option) for doc in DOCS for option in doc["options"]]


@pytest.mark.parametrize("rule", [None, RULE, fw.GradientAscent(rate=0.05)])
@pytest.mark.parametrize(
    ("update", "write"), [("all", (True, True)), ("prompt", (True, False)), ("none", (False, False))]
)
def test_every_request_is_a_life_of_its_own_in_any_batch(rule, update, write, tokenizer):
    requests = asked("loglikelihood", *PAIRS)
    alone, batch = (plastic(tokenizer, rule, update=update, batch_size=n).loglikelihood(requests) for n in (1, 4))
    lm = plastic(tokenizer, rule)
    for (context, continuation), one, other in zip(PAIRS, alone, batch, strict=True):
        ids, rest = lm.tok_encode(context), lm.tok_encode(continuation)
        wanted = by_hand(lm, ids, rest, write=write)
        assert one == (pytest.approx(wanted[0], rel=1e-9), wanted[1])
        assert other == (pytest.approx(wanted[0], rel=1e-9), wanted[1])


def test_plasticity_changes_the_scores_and_a_rate_of_zero_does_not(tokenizer):
    requests = asked("loglikelihood", *PAIRS)
    frozen, still, moving = (
        plastic(tokenizer, rule).loglikelihood(requests) for rule in (None, fw.Hebbian(rate=0.0), RULE)
    )
    assert frozen == still
    assert max(abs(a - b) for (a, _), (b, _) in zip(frozen, moving, strict=True)) > 0.05


def test_a_carried_life_reads_the_contexts_and_never_an_answer(tokenizer):
    lm = plastic(tokenizer, life="carried", batch_size=2)
    found = lm.loglikelihood(asked("loglikelihood", *PAIRS, document=[0, 0, 1, 1, 2, 2]))
    life = fw.Episode(lm.model)
    for number, doc in enumerate(DOCS):
        start = fw.Episode(lm.model)
        for address, log in life.logs.items():
            start.logs[address].copy_from(log)
        for option, score in zip(doc["options"], found[2 * number :], strict=False):
            ids, rest = lm.tok_encode(doc["text"]), lm.tok_encode(option)
            assert score[0] == pytest.approx(by_hand(lm, ids, rest, start.fork())[0], rel=1e-9)
        start.feed(ids)
        life = start
    assert lm.carried[1, "up_proj"].event_counts == [12]
    lm.reset()
    assert lm.loglikelihood(asked("loglikelihood", *PAIRS[:2], document=[0, 0])) == found[:2]
    lm.reset()
    lm.loglikelihood(asked("loglikelihood", ("w1 w2 w3", " w4"), ("w1 w2 w5", " w4"), document=[0, 0]))
    assert lm.carried[1, "up_proj"].event_counts == [2]  # what both contexts begin with


@pytest.mark.parametrize("life", ["document", "carried"])
def test_long_texts_are_read_in_windows_of_one_life_and_written_once(life, tokenizer):
    texts = ["w3 w4 w5 w6 w7 w8 w9 w3 w4 w5 w6", "w20 w21", "", "w3 w4 w5 w6 w7 w8 w9 w10"]
    lm = plastic(tokenizer, life=life, max_length=4, batch_size=3)
    found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", *[(text,) for text in texts]))
    logs = None
    for text, score in zip(texts, found, strict=True):
        ids, total, logs = [lm.prefix_token_id, *lm.tok_encode(text)], 0.0, logs if life == "carried" else None
        for end in range(4, len(ids) + 3, 4) if len(ids) > 1 else ():
            end, first = (
                min(end, len(ids) - 1),
                end - 4,
            )  # predicts ids[first + 1 : end + 1], in a window that ends there
            episode = fw.Episode(lm.model)
            for address, log in (logs or {}).items():
                episode.logs[address].copy_from(log)
            start = max(0, end - 4)
            for again in ids[start:first]:
                episode.feed([again], "none")
            total += by_hand(lm, ids[first : first + 1], ids[first + 1 : end + 1], episode)[0]
            logs = episode.logs
        assert score == pytest.approx(total, rel=1e-9)
    if life == "carried":
        assert lm.carried[1, "up_proj"].event_counts == [11 + 2 + 8]


def test_generations_stop_sample_by_request_and_may_live_on(tokenizer):
    contexts = [doc["text"] for doc in DOCS]
    options = {"until": ["w4", ""], "max_gen_toks": 6, "do_sample": False, "temperature": 0.7}
    requests = asked("generate_until", *[(context, options) for context in contexts])
    one, many = (plastic(tokenizer, batch_size=n).generate_until(requests) for n in (1, 3))
    assert one == many
    lm = plastic(tokenizer)
    for context, text in zip(contexts, one, strict=True):
        episode, ids = fw.Episode(lm.model), lm.tok_encode(context)
        steps = episode.generate(
            ids, 6, update="all", stop_strings=["w4"], tokenizer=tokenizer, include_stop_str_in_output=False
        )
        assert "".join(step.text[0] for step in steps) == text
        assert "w4" not in text
    sampled = {"do_sample": True, "max_new_tokens": 5}
    requests = asked("generate_until", *[(contexts[0], sampled)] * 4, document=[0] * 4)
    one, many = (plastic(tokenizer, batch_size=n).generate_until(requests) for n in (1, 4))
    assert one == many
    assert len(set(one)) > 1
    lm = plastic(tokenizer, life="carried")
    assert lm.generate_until(requests)[0] == one[0]
    assert lm.carried[1, "up_proj"].event_counts == [len(lm.tok_encode(contexts[0])) + 5]


def test_a_context_that_is_too_long_loses_its_beginning(tokenizer):
    lm = plastic(tokenizer, max_length=6)
    long, short = "w9 w8 w7 w1 w2 w3 w4 w5", "w2 w3 w4 w5"
    both = lm.loglikelihood(asked("loglikelihood", (long, " w6 w7 w8"), (short, " w6 w7 w8")))
    assert both[0] == both[1]
    options = {"max_gen_toks": 2}
    texts = lm.generate_until(asked("generate_until", (long, options), (short, options)))
    assert texts[0] == texts[1]


def test_what_does_not_fit_is_refused(tokenizer):
    model = tiny(torch.float64)
    for options, said in (
        ({"life": "eternal"}, "life='eternal': expected one of 'document', 'carried'"),
        ({"batch_size": "auto"}, "batch_size='auto': expected a whole number, 1 or more"),
        ({"max_length": 1000}, "max_length=1000: expected a whole number from 2 to 256"),
        ({"parallelize": True}, "parallelize: not an argument, and an option of a rule only with layers="),
        ({"layers": "1+2", "rule": "oja"}, "rule='oja': expected one of 'hebbian', "),
        ({"layers": "1+2", "speed": 3}, "rule='hebbian': .*speed"),
    ):
        with pytest.raises(ValueError, match=said):
            FastWeightsLM(model, tokenizer, **options)
    with pytest.raises(ValueError, match="this model came without a tokenizer: pass tokenizer="):
        FastWeightsLM(model)
    lm = FastWeightsLM(model, tokenizer, layers="1+2", rate=0.1, max_length=8)
    with pytest.raises(ValueError, match="a task generates with num_beams, which fastweights does not implement"):
        lm.generate_until(asked("generate_until", ("w1", {"num_beams": 4})))
    with pytest.raises(ValueError, match=r"a task asks for 8 new tokens, expected 1 to 7"):
        lm.generate_until(asked("generate_until", ("w1", {"max_gen_toks": 8})))
    with pytest.raises(ValueError, match="a continuation of 9 tokens is longer than max_length=8"):
        lm.loglikelihood(asked("loglikelihood", ("w1", " w2" * 9)))
    with pytest.raises(ValueError, match="use_cache would leave documents out of a life that is carried over"):
        FastWeightsLM(model, tokenizer, life="carried").set_cache_hook(None)
    fw.detach(model)
    fw.attach(model, 1, fw.Hebbian(rate=(0.1, 0.2)))
    with pytest.raises(ValueError, match="has a rate per row, but here rows are requests: expected one rate"):
        FastWeightsLM(model, tokenizer)


TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "tiny_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "tiny_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "w1",
        "generation_kwargs": {"until": ["w4"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.mark.parametrize("life", ["document", "carried"])
def test_the_harness_itself_scores_a_local_task(life, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **task}))
    lm = plastic(tokenizer, life=life, batch_size=2)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    done = lm_eval.simple_evaluate(lm, tasks=[*TASKS], task_manager=manager, bootstrap_iters=0)["results"]
    same = plastic(tokenizer, life=life)
    document = [n for n in range(3) for _ in range(2)]
    scores = [score for score, _ in same.loglikelihood(asked("loglikelihood", *PAIRS, document=document))]
    right = [(scores[2 * n + 1] > scores[2 * n]) == bool(doc["gold"]) for n, doc in enumerate(DOCS)]
    assert done["tiny_choice"]["acc,none"] == pytest.approx(sum(right) / 3)
    texts = same.loglikelihood_rolling(asked("loglikelihood_rolling", *[(doc["text"],) for doc in DOCS]))
    assert done["tiny_text"]["word_perplexity,none"] == pytest.approx(math.exp(-sum(texts) / 12), rel=1e-6)
    assert done["tiny_generation"]["exact_match,none"] == 0


def test_the_harness_makes_the_model_from_its_command_line_words(tokenizer, tmp_path):
    fw.save(tiny(torch.float32), tmp_path, tokenizer)
    words = f"pretrained={tmp_path},layers=1+2,rule=local-least-squares,gamma=0.3,life=carried,rank=7"
    lm = lm_eval.api.registry.get_model("fastweights").create_from_arg_string(words, {"batch_size": 3, "device": "cpu"})
    linear = lm.model.model.layers[2].mlp.up_proj
    assert (linear.rule, linear.rank, lm.life, lm.batch_size) == (fw.LocalLeastSquares(gamma=0.3), 7, "carried", 3)


def test_a_frozen_model_scores_what_the_harness_finds_with_transformers(tokenizer, tmp_path):
    from lm_eval.models.huggingface import HFLM

    fw.save(tiny(torch.float32, eos_token_id=60), tmp_path, tokenizer)
    theirs = HFLM(str(tmp_path), dtype="float32", device="cpu", batch_size=2, max_length=6)
    ours = FastWeightsLM(str(tmp_path), batch_size=3, max_length=6)
    pairs = [*PAIRS, ("w3 w4 ", "w5 w6"), ("", " w7 w8"), ("w9 w8 w7 w6 w5 w4 w3", " w2 w1 w9")]
    texts = [("w3 w9 w4 w7 w8 w2 w6 w5 w11 w12 w13 w14 w15",), ("w20",)]
    options = {"until": ["w4"], "max_gen_toks": 3}
    contexts = [(doc["text"], options) for doc in DOCS]
    for kind, arguments in (("loglikelihood", pairs), ("loglikelihood_rolling", texts), ("generate_until", contexts)):
        wanted, found = (getattr(lm, kind)(asked(kind, *arguments), disable_tqdm=True) for lm in (theirs, ours))
        if kind == "generate_until":
            assert any(found)
            assert [text.split() for text in found] == [text.split() for text in wanted]
        else:
            torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-4)
