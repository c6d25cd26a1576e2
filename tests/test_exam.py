"""Exams: the rows they ask for, the scores against loops that run every answer by itself, and what is refused."""

import math
import warnings

import pytest
import torch
from tiny import tiny
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import fastweights as fw
from fastweights.tokenizer import Tokenizer

WORDS = ["the", "sky", "is", "blue", "red", "grass", "green", "and", "dark", "very"]


@pytest.fixture
def tokenizer(tmp_path):
    """Words behind a space are tokens with the space, as in GPT-2; two blanks are a token, too."""
    vocabulary = {word: n + 2 for n, word in enumerate(WORDS)} | {f"▁{word}": n + 20 for n, word in enumerate(WORDS)}
    backend = Backend(models.WordLevel(vocabulary | {"▁": 50, "?": 60}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    backend.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.from_folder(tmp_path)


PROMPTS = ["the sky is", "the grass is very"]
ANSWERS = [[" blue", " dark and very blue", " dark red"], [" green", " green and blue", " red"]]


def logits_of(model, rows, lead=()):
    """Logits of rows padded on the right, NaN in the padding; one row at a time."""
    width = max(map(len, rows))
    logits = torch.full((len(rows), width, model.config.vocab_size), math.nan, dtype=torch.float64)
    for n, row in enumerate(rows):
        logits[n, : len(row)] = model(torch.tensor([row]))[0]
    return logits.expand(*lead, *logits.shape)


def loop(model, prompt_ids, answer_ids):
    """(log-probability, worst rank) of one answer, token by token, one forward pass for each."""
    total, worst = 0.0, 0
    for t, token in enumerate(answer_ids):
        values = model(torch.tensor([prompt_ids + answer_ids[:t]]))[0, -1].tolist()
        top = max(values)
        total += values[token] - top - math.log(sum(math.exp(value - top) for value in values))
        worst = max(worst, sum(value > values[token] for value in values))
    return total, worst


def test_rows_of_one_token_answers_are_the_prompts_in_order_repeats_included(tokenizer):
    prompts = ["the sky is", "the grass is very", "the sky is"]
    exam = fw.Exam(tokenizer, prompts, [" blue", " red"])
    assert exam.rows == [tokenizer.encode(text) for text in prompts] == exam.prompt_ids
    assert exam.columns == [2, 3]
    assert exam.row_columns == [[2], [3], [2]]
    assert exam.starts == [2, 3, 2]
    assert exam.answer_ids == [[[23], [24]]] * 3
    assert len(exam) == 3


def test_a_row_that_begins_another_is_served_by_it(tokenizer):
    with pytest.warns(UserWarning, match="' green and blue' begins with the tokens of ' green'"):
        exam = fw.Exam(tokenizer, PROMPTS, ANSWERS)
    first, second = (tokenizer.encode(text) for text in PROMPTS)
    assert exam.rows == [[*first, 28, 27, 29], [*second, 26, 27]]
    assert exam.starts == [2, 3]
    assert exam.row_columns == [[2, 3, 4, 5], [3, 4, 5]]
    assert exam.columns == [2, 3, 4, 5]


@pytest.mark.filterwarnings("ignore:the answer")
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_scores_equal_a_loop_that_runs_every_token_of_every_answer(tokenizer, lead):
    model = tiny()
    exam = fw.Exam(tokenizer, PROMPTS, ANSWERS)
    scores = exam.score(logits_of(model, exam.rows, lead))
    assert scores.logprob.shape == scores.rank.shape == (*lead, 2, 3)
    assert (scores.logprob.dtype, scores.rank.dtype) == (torch.float64, torch.int64)
    for p, text in enumerate(PROMPTS):
        for a, answer in enumerate(ANSWERS[p]):
            question = tokenizer.encode(text)
            logprob, rank = loop(model, question, tokenizer.encode(text + answer)[len(question) :])
            assert scores.logprob[..., p, a].flatten().tolist() == pytest.approx([logprob] * math.prod(lead), abs=1e-9)
            assert set(scores.rank[..., p, a].flatten().tolist()) == {rank}
    best = scores.logprob[..., 1:].amax(-1)
    assert torch.equal(scores.difference, scores.logprob[..., 0] - best)


def test_each_alternative_in_front_is_scored_by_its_own_logits(tokenizer, monkeypatch):
    exam = fw.Exam(tokenizer, PROMPTS, [" blue", " dark red"])
    logits = torch.randn(7, 2, len(exam.rows), 5, 61, generator=torch.Generator().manual_seed(0))
    whole = exam.score(logits)
    monkeypatch.setattr("fastweights.probes.exam.SLICE_BYTES", 3 * 8 * 61)  # three rows at a time
    sliced = exam.score(logits)
    for m in range(7):
        for n in range(2):
            alone = exam.score(logits[m, n])
            for scores in (whole, sliced):
                torch.testing.assert_close(scores.logprob[m, n], alone.logprob, rtol=1e-13, atol=0)
                assert torch.equal(scores.rank[m, n], alone.rank)


def test_the_difference_of_one_token_answers_is_the_logit_difference(tokenizer):
    exam = fw.Exam(tokenizer, PROMPTS, [" blue", " red"])
    logits = logits_of(tiny(), exam.rows)
    expected = torch.stack(
        [logits[p, len(exam.rows[p]) - 1, 23] - logits[p, len(exam.rows[p]) - 1, 24] for p in (0, 1)]
    )
    torch.testing.assert_close(exam.score(logits).difference, expected, rtol=1e-12, atol=1e-12)


def test_kept_columns_give_the_scores_of_all_columns(tokenizer):
    exam = fw.Exam(tokenizer, PROMPTS, [" blue", " dark red"])
    logits = logits_of(tiny(), exam.rows)
    whole = exam.score(logits)
    kept = exam.score(logits[:, exam.columns], exam.columns)
    backwards = exam.score(logits[:, exam.columns[::-1]], torch.tensor(exam.columns[::-1]))
    per_row = torch.tensor([[2, 3], [3, 4]])
    own = exam.score(logits.gather(1, per_row[..., None].expand(-1, -1, 61)), per_row)
    for scores in (kept, backwards, own):
        assert torch.equal(scores.logprob, whole.logprob)
        assert torch.equal(scores.rank, whole.rank)
    with pytest.raises(ValueError, match="needs the logits of row 0, column 3, and columns lack it"):
        exam.score(logits[:, [2, 4]], [2, 4])


def test_an_exam_of_one_row_scores_every_row_of_a_batch_as_a_prompt(tokenizer):
    exam = fw.Exam(tokenizer, PROMPTS[:1], [" blue", " red"])
    logits = torch.randn(4, 5, 3, 61, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = exam.score(logits)
    assert scores.logprob.shape == (4, 5, 2)
    for row in range(5):
        assert torch.equal(scores.logprob[:, row], exam.score(logits[:, row : row + 1]).logprob[:, 0])


def test_the_gradient_of_the_difference_is_that_of_finite_differences(tokenizer):
    exam = fw.Exam(tokenizer, PROMPTS, [" blue", " dark red", " very green"])
    logits = torch.randn(2, len(exam.rows), 5, 61, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = logits.clone().requires_grad_()
    exam.score(x).difference.sum().backward()
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    there, back = (exam.score(logits + step * direction).difference.sum() for step in (1e-6, -1e-6))
    assert float((x.grad * direction).sum()) == pytest.approx(float(there - back) / 2e-6, rel=1e-7)
    assert bool((x.grad[:, 0, [0, 1]] == 0).all())  # columns that no answer asks for


def test_rank_zero_is_what_greedy_decoding_says_and_nan_is_never_first(tokenizer):
    model = tiny()
    first = int(model(torch.tensor([tokenizer.encode(PROMPTS[0])]))[0, -1].argmax())
    exam = fw.Exam(tokenizer, PROMPTS[:1], [" blue", " red"])
    logits = torch.zeros(1, 3, 61)
    logits[0, 2, 23] = 1
    assert exam.score(logits).rank.tolist() == [[0, 1]]
    assert exam.score(logits * math.nan).rank.tolist() == [[61, 61]]
    assert fw.rank(model(torch.tensor([tokenizer.encode(PROMPTS[0])]))[0, -1], first) == 0


def test_prompts_may_be_ids_and_are_continued_as_the_text_they_stand_for(tokenizer):
    by_text = fw.Exam(tokenizer, PROMPTS, [" blue"])
    by_ids = fw.Exam(tokenizer, [torch.tensor(ids) for ids in by_text.rows], [" blue"])
    assert by_ids.rows == by_text.rows
    assert by_ids.answer_ids == by_text.answer_ids
    noise = fw.Exam(tokenizer, [[0, 0, 1]], ["blue"])  # ids that no text gives
    assert (noise.rows, noise.answer_ids) == ([[0, 0, 1]], [[[5]]])


@pytest.mark.parametrize("start", [[1], []])
def test_ids_with_or_without_bos_are_continued_by_the_token_that_follows_the_text(tmp_path, start):
    """By itself an answer gets SentencePiece's first space; behind "(" it has none."""
    backend = Backend(models.WordLevel({"<s>": 1, "▁the": 2, "▁(": 3, "A": 4, "▁A": 5, "?": 60}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first"), pre_tokenizers.Split("▁(", "isolated")]
    )
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "add_bos_token": true}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("the (") == [1, 2, 3]
    assert tokenizer.encode("A", add_special_tokens=False) == [5]
    exam = fw.Exam(tokenizer, [[*start, 2, 3]], ["A"])
    assert (exam.rows, exam.answer_ids) == ([[*start, 2, 3]], [[[4]]])


def test_white_space_behind_the_prompt_is_named_in_one_warning(tokenizer):
    with pytest.warns(
        UserWarning, match=r"'the sky is ' ends in white space that belongs to the token of the answer 'blue'"
    ):
        exam = fw.Exam(tokenizer, ["the sky is ", "the grass is "], ["blue", "red"])
    assert exam.rows[0] == [2, 21, 22, 50]
    assert exam.answer_ids[0] == [[5], [6]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fw.Exam(tokenizer, ["the sky is"], [" blue", " red"])


def test_its_repr_shows_how_prompts_and_answers_meet(tokenizer):
    exam = fw.Exam(tokenizer, PROMPTS, [" blue", " dark red"])
    assert repr(exam) == (
        "Exam: prompts 2, answers to each 2, rows 2 of 4 to 5 tokens\n"
        "  0: the| sky| is → ' blue', ' dark| red'\n"
        "  1: the| grass| is| very → ' blue', ' dark| red'"
    )
    many = repr(fw.Exam(tokenizer, ["the sky is very very very"] * 6, [" blue"]))
    assert many.splitlines()[0] == "Exam: prompts 6, answers to each 1, rows 6 of 6 tokens"
    assert many.splitlines()[1] == "  0: … is| very| very| very → ' blue'"
    assert many.splitlines()[-1] == "  …"


@pytest.mark.parametrize(
    ("prompts", "answers", "message"),
    [
        ([], [" red"], "prompts is empty"),
        ("the sky is", [" red"], "prompts='the sky is': expected a list of texts"),
        ([2, 3], [" red"], "prompts is a list of int: expected a list of texts or of id lists"),
        (torch.tensor([2, 3]), [" red"], "prompts is a list of Tensor: expected"),
        (["the", ""], [" red"], r"prompts\[1\] is empty"),
        ([[2], []], [" red"], r"prompts\[1\] is empty"),
        ([[2], [2.5]], [" red"], r"prompts\[1\]=\[2.5\]: expected whole numbers"),
        (["the"], " red", "answers=' red': expected a list"),
        (["the"], [], r"answers=\[\]: expected a list"),
        ({"input_ids": [[2]]}, [" red"], "prompts={'input_ids': .*}: expected a list of texts"),
        (["the"], {" red", " blue"}, "answers={.*}: expected a list"),
        (["the"], [{" red", " blue"}], "expected one list of texts, or one such list per prompt"),
        (["the"], 3, "answers=3: expected a list"),
        (["the"], [" red", ""], "answers holds an empty text"),
        (["the"], [" red", 3], "expected one list of texts, or one such list per prompt"),
        (["the"], [[" red"], [" blue"]], "answers holds 2 lists, but there are 1 prompts"),
        (["the", "sky"], [[" red"], [" blue", " green"]], r"answers\[1\] has 2 texts and answers\[0\] has 1"),
        (["the", "sky"], [[" red"], []], r"answers\[1\]=\[\]: expected a list"),
        (["the"], [" red", " blue", " red"], r"prompt 0: the answers ' red' and ' red' have the same ids \[24\]"),
    ],
)
def test_what_makes_no_exam_is_refused(tokenizer, prompts, answers, message):
    with pytest.raises(ValueError, match=message):
        fw.Exam(tokenizer, prompts, answers)


def test_an_exam_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="got None for the tokenizer"):
        fw.Exam(None, ["the"], ["sky"])


def test_logits_that_are_not_the_exams_are_refused(tokenizer):
    exam = fw.Exam(tokenizer, PROMPTS, [" blue"])
    for logits, message in (
        (torch.zeros(3, 4, 61), "logits of 3 rows, but exam.rows has 2"),
        (torch.zeros(2, 61), r"got logits \[2, 61\] of torch.float32: expected floats \[.., R, T′, V\]"),
        (torch.zeros(2, 4, 61, dtype=torch.int64), "of torch.int64: expected floats"),
        (torch.zeros(2, 4, 20), "logits of 20 tokens, but an answer holds the token id 23"),
        (torch.zeros(2, 3, 61), "needs the logits of row 1, column 3"),
    ):
        with pytest.raises(ValueError, match=message):
            exam.score(logits)
    with pytest.raises(
        ValueError, match=r"score\(columns=…\) has shape \[3\], but these logits want \[4\] or \[2, 4\]"
    ):
        exam.score(torch.zeros(2, 4, 61), [1, 2, 3])
    with pytest.raises(ValueError, match="difference needs two answers or more"):
        _ = exam.score(torch.zeros(2, 4, 61)).difference


def test_align_prints_the_prompts_side_by_side_and_marks_where_they_differ(tokenizer, capsys):
    found = fw.align(tokenizer, "the sky is blue", "the grass is", [2, 21])
    assert found.token_ids == [[2, 21, 22, 23], [2, 25, 22], [2, 21]]
    assert found.pieces == [["the", " sky", " is", " blue"], ["the", " grass", " is"], ["the", " sky"]]
    assert (found.aligned, found.differs) == (False, [1, 2, 3])
    assert capsys.readouterr().out == (
        "   0  |the|    |the|     |the|\n"
        "   1  | sky|   | grass|  | sky|  ≠\n"
        "   2  | is|    | is|             ≠\n"
        "   3  | blue|                    ≠\n"
        "not aligned: 2 and 3 and 4 tokens; different in 3 of 4 columns\n"
    )
    assert fw.align(tokenizer, "the sky is", "the sky is").aligned
    assert capsys.readouterr().out.splitlines()[-1] == "aligned: 3 tokens each; different in 0 of 3 columns"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "got no prompt"),
        ([["the", "sky"]], "got a list of texts"),
        (["the", ""], "prompt 1 is empty"),
        (["the", 2.5], r"prompt 1=2.5: expected whole numbers"),
    ],
)
def test_what_cannot_be_aligned_is_refused(tokenizer, prompts, message):
    with pytest.raises(ValueError, match=message):
        fw.align(tokenizer, *prompts)


def test_scores_come_from_a_probe_of_the_exams_rows(tokenizer):
    model = tiny()
    exam = fw.Exam(tokenizer, PROMPTS, [" blue", " dark red"])
    trace = fw.Episode(model, 2).probe(exam.rows, positions=exam.columns)
    scores = exam.score(trace.logits, exam.columns)
    torch.testing.assert_close(scores.logprob, exam.score(logits_of(model, exam.rows)).logprob, rtol=1e-12, atol=1e-12)
