"""Ids, masks and `update=` in the forms that people have them: taken, or refused in one sentence by name."""

import numpy as np
import pytest
import torch
from test_tokenizer import byte_level
from tiny import tiny
from transformers import PreTrainedTokenizerFast

import fastweights as fw
from fastweights.inputs import tokens, written

OURS = byte_level()
THEIRS = PreTrainedTokenizerFast(tokenizer_object=OURS.backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
RAGGED = ([[1, 5, 9], [1, 5, 0]], [[True, True, True], [True, True, False]])
TEXTS = ["the quick dog", "a"]


@pytest.mark.parametrize(
    "given",
    [
        np.array([[1, 5, 9]], np.uint16),
        np.array([1, 5, 9], np.uint64),
        (1, 5, 9),
        ((1, 5, 9),),
        torch.tensor([1, 5, 9], dtype=torch.int32),
        torch.tensor([[1, 5, 9]], dtype=torch.uint8),
        [torch.tensor(1), torch.tensor(5), torch.tensor(9)],
        [np.int64(1), np.uint8(5), 9],
        [torch.tensor([1, 5, 9])],
        [np.array([1, 5, 9])],
        (i for i in (1, 5, 9)),
        {"input_ids": [1, 5, 9]},
        {"input_ids": torch.tensor([[1, 5, 9]]), "attention_mask": torch.ones(1, 3)},
    ],
)
def test_one_row_of_ids_is_taken_in_every_form(given):
    ids_BT, mask_BT = tokens(given, None, 1, 61)
    assert ids_BT.tolist() == [[1, 5, 9]]
    assert ids_BT.dtype == torch.int64
    assert mask_BT is None


@pytest.mark.parametrize(
    "given",
    [
        [[1, 5, 9], [1, 5]],
        ((1, 5, 9), (1, 5)),
        [np.array([1, 5, 9]), np.array([1, 5])],
        [torch.tensor([1, 5, 9]), [1, 5]],
        {"input_ids": [[1, 5, 9], [1, 5]]},
    ],
)
def test_rows_of_different_lengths_are_padded_in_every_form(given):
    ids_BT, mask_BT = tokens(given, None, 2, 61)
    assert (ids_BT.tolist(), mask_BT.tolist()) == RAGGED


def test_range_and_an_empty_row():
    assert tokens(range(3), None, None, 61)[0].tolist() == [[0, 1, 2]]
    ids_BT, mask_BT = tokens([[1, 2], []], None, None, 61)
    assert ids_BT.tolist() == [[1, 2], [0, 0]]
    assert mask_BT.tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["lists", "pt", "np", "encodings"])
def test_what_a_tokenizer_returns_is_taken_with_its_mask(side, kind):
    model = tiny(vocab_size=400)
    THEIRS.padding_side = side
    given = THEIRS(TEXTS, padding=True, return_tensors=None if kind in ("lists", "encodings") else kind)
    if kind == "encodings":
        given = [OURS.backend.encode(text) for text in TEXTS]
        OURS.backend.no_padding()
    episode = fw.Episode(model, 2)
    logits = episode.feed(given, logits="last")
    for row, text in enumerate(TEXTS):
        alone = fw.Episode(model)
        expected = alone.feed(OURS.backend.encode(text) if kind == "encodings" else THEIRS(text), logits="last")
        torch.testing.assert_close(logits[row], expected[0], rtol=1e-9, atol=1e-9)
        assert episode.token_ids[row] == alone.token_ids[0] == THEIRS(text).input_ids


@pytest.mark.parametrize(
    "mask",
    [
        [1, 1, 0],
        (True, True, False),
        np.array([[1.0, 1.0, 0.0]], np.float32),
        torch.tensor([1, 1, 0], dtype=torch.uint8),
        torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.bfloat16),
        [[np.bool_(True), 1, 0]],
    ],
)
def test_a_mask_is_taken_in_every_form_and_ids_behind_it_do_not_matter(mask):
    ids_BT, mask_BT = tokens([1, 5, -100], mask, 1, 61)
    assert ids_BT.tolist() == [[1, 5, 0]]
    assert mask_BT.tolist() == [[True, True, False]]


def test_a_ragged_mask_belongs_to_ragged_ids():
    assert tokens([[1, 5, 9], [1, 5]], [[1, 1, 1], [0, 1]], 2, 61)[1].tolist() == [[True] * 3, [False, True, False]]


WANTED = r"expected token ids \[B, T\] or \[T\], as tokenizer\.encode gives them"


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ("hi", None, f"input_ids is a str: {WANTED}"),
        (b"hi", None, f"input_ids is a bytes: {WANTED}"),
        (["hi"], None, f"input_ids holds text: {WANTED}"),
        ([["hi"]], None, "input_ids holds text: expected numbers"),
        (7, None, f"input_ids is a int: {WANTED}"),
        (None, None, f"input_ids is a NoneType: {WANTED}"),
        (torch.tensor(7), None, r"input_ids has shape \[\]: expected \[B, T\]"),
        ([[[1]]], None, "input_ids is a list of list that are no rows of the same kind"),
        ([1, [2]], None, "input_ids is a list of int and list that are no rows of the same kind"),
        ([None], None, "input_ids is a list of NoneType"),
        ([2**70], None, "input_ids holds object: expected numbers"),
        ([1.0, 2.0], None, "input_ids is torch.float32: expected whole numbers"),
        (torch.tensor([1.0]).bfloat16(), None, "expected whole numbers"),
        ([True, False], None, "input_ids is torch.bool: expected whole numbers"),
        ({"ids": [1]}, None, r"input_ids is a mapping of \['ids'\] without 'input_ids'"),
        ([[1, 2], [3, 61]], None, "token id 61 is outside the vocabulary of 61: row 1, token 1"),
        ([1, -2], [1, 1], "token id -2 is outside the vocabulary of 61: row 0, token 1"),
        ([1, 2], [float("-inf"), 0], "attention_mask holds -inf: expected 1 for a token and 0 for padding"),
        ([1, 2], [2, 1], "attention_mask holds 2: expected 1 for a token and 0 for padding"),
        ([1, 2], "11", "attention_mask is a str: expected 1 for a token and 0 for padding"),
        ([1, 2], [1], r"attention_mask has shape \[1, 1\], but input_ids has \[1, 2\]"),
        ([[1, 2], [3]], [[1, 1], [1, 1]], "attention_mask has more tokens in row 1 than input_ids"),
    ],
)
def test_what_is_no_ids_and_no_mask_is_refused_by_name(ids, mask, message):
    with pytest.raises(ValueError, match=message) as error:
        tokens(ids, mask, None, 61)
    assert "\n" not in str(error.value)


IDS_BT, POSITION_BT = torch.tensor([[5, 6, 7, 8]]), torch.arange(4)[None]


@pytest.mark.parametrize(
    "update",
    [
        [1, 3],
        (1, 3, 99),
        {1, 3},
        range(1, 4, 2),
        np.array([1, 3], np.uint8),
        torch.tensor([1, 3], dtype=torch.int32),
        [np.int64(1), torch.tensor(3)],
        [False, True, False, True],
        [[False, True, False, True]],
        np.array([False, True, False, True]),
        [np.bool_(False), np.bool_(True), np.bool_(False), np.bool_(True)],
        fw.token_ids([6, 8]),
        fw.token_ids(np.array([6, 8])),
        fw.token_ids(torch.tensor([6, 8, 400])),
        lambda position, token_id: np.bool_(token_id in (6, 8)),
    ],
)
def test_update_is_taken_in_every_form(update):
    assert written(update, IDS_BT, POSITION_BT, generated=False).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ([-1], "update position -1 is negative: positions are absolute, from 0"),
        ([0.5], r"update has shape \[1\] and float64: expected positions, a list of ints"),
        ([[1, 2]], r"update has shape \[1, 2\] and int64: expected positions"),
        (["1"], "update holds text: expected numbers"),
        ([None], "update holds object: expected numbers"),
        ("some", "update='some': expected 'all', 'none'"),
        ({"a": 1}, "update={'a': 1}: expected 'all', 'none'"),
        (3, "update=3: expected 'all', 'none'"),
        (True, "update=True: expected 'all', 'none'"),
        ([True, False], r"update mask has shape \[2\], but this feed is \[1, 4\]"),
    ],
)
def test_an_update_that_says_nothing_is_refused_by_name(update, message):
    with pytest.raises(ValueError, match=message):
        written(update, IDS_BT, POSITION_BT, generated=False)


@pytest.mark.parametrize("ids", ["abc", 1.5, [1.5], True, None, [[1]]])
def test_token_ids_are_whole_numbers(ids):
    with pytest.raises(ValueError, match=r"fw\.token_ids=.*: expected whole numbers, one or a list of them"):
        fw.token_ids(ids)
    with pytest.raises(ValueError, match=r"token id -1 is negative: expected fw\.token_ids from 0 up"):
        fw.token_ids([-1])
