"""Generation: the text of the steps, where and why a row stops, how much room there is, and whose numbers are drawn."""

import random

import numpy as np
import pytest
import torch
from test_tokenizer import KINDS
from tiny import prompt, tiny

import fastweights as fw

VOCABULARY = 400
MODEL = tiny(vocab_size=VOCABULARY, num_hidden_layers=1, max_position_embeddings=128)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


@pytest.fixture
def dictate(monkeypatch):
    """Makes generation choose these ids, one after the other, in every row that runs."""

    def choose(ids):
        left = iter(ids)
        monkeypatch.setattr(
            fw.Sampling, "choose", lambda self, logits, seen, generator: torch.full((len(logits),), next(left))
        )

    return choose


def text_of(steps):
    return "".join(step.text[0] for step in steps)


def added(tokenizer, before, ids):
    """What ids add to the text of those before them."""
    whole, known = tokenizer.decode([*before, *ids]), tokenizer.decode(before)
    assert whole.startswith(known)
    return whole[len(known) :]


def random_ids(tokenizer, rng, most=16):
    """Half of them mostly single bytes and special tokens, which are mostly no text."""
    few = rng.random() < 0.5
    pick = (lambda: rng.choice([0, 1, 2, rng.randrange(3, 259)])) if few else (lambda: rng.randrange(len(tokenizer)))
    return [pick() for _ in range(rng.randrange(1, most))]


def test_3000_random_id_lists_streamed_are_the_decoded_text(tokenizer):
    rng = random.Random(4)
    for number in range(3000):
        ids, skip = random_ids(tokenizer, rng), number % 2 == 0
        stream = tokenizer.stream(skip_special_tokens=skip)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids, skip), ids


def test_streamed_behind_a_context_the_pieces_are_what_the_ids_add_to_its_text(tokenizer):
    rng = random.Random(5)
    for _ in range(1000):
        ids, start = random_ids(tokenizer, rng, 60), rng.randrange(60)
        before, ids = ids[:start], ids[start:]
        if not tokenizer.decode([*before, *ids]).startswith(tokenizer.decode(before)):
            continue  # the cut is inside a character, or bytes after it make those before it no text
        stream = tokenizer.stream(context=before)
        assert "".join(map(stream.push, ids)) + stream.flush() == added(tokenizer, before, ids), (before, ids)


def test_the_pieces_of_a_run_are_the_text_wherever_it_is_cut(tokenizer, dictate):
    """The first space included, which a decoder leaves out at the start of a text, and the tail that was held back."""
    rng, start = random.Random(6), tokenizer.encode("the quick")
    texts = [tokenizer.encode(" brown 日本語 🎉\n\nnew lines 🎉", add_special_tokens=False)]
    for ids in texts + [random_ids(tokenizer, rng) for _ in range(20)]:
        for cut in range(1, len(ids) + 1):
            dictate(ids)
            steps = fw.Episode(MODEL).generate(start, cut, tokenizer=tokenizer, stop_token_ids=())
            assert text_of(steps) == added(tokenizer, start, ids[:cut]), ids[:cut]


@pytest.mark.parametrize("way", ["left", "snapshot", "fork"])
def test_a_run_that_goes_on_gives_out_what_was_held_back(tokenizer, dictate, way):
    start = tokenizer.encode("the quick")
    ids = tokenizer.encode(" brown 日本語🎉\n\nnew lines 🎉", add_special_tokens=False)
    for cut in range(1, len(ids)):
        episode = fw.Episode(MODEL)
        dictate(ids)
        run = episode.generate(start, len(ids), tokenizer=tokenizer, stop_token_ids=())
        text = text_of(next(run) for _ in range(cut))
        if way == "snapshot":
            snapshot = episode.snapshot()
            next(run)
            episode.restore(snapshot)
            dictate(ids[cut:])
        elif way == "fork":
            episode = episode.fork()
        rest = episode.generate(None, len(ids) - cut, tokenizer=tokenizer, stop_token_ids=())
        assert text + text_of(rest) == added(tokenizer, start, ids), cut


def test_after_a_run_that_ended_the_next_one_adds_its_own_text(tokenizer, dictate):
    start = tokenizer.encode("the quick")
    ids = tokenizer.encode(" brown 日本語 🎉\n\nnew lines", add_special_tokens=False)
    for cut in range(1, len(ids)):
        if "�" in tokenizer.decode([*start, *ids[:cut]]):
            continue
        episode = fw.Episode(MODEL)
        dictate(ids)
        first = text_of(episode.generate(start, cut, tokenizer=tokenizer, stop_token_ids=()))
        rest = text_of(episode.generate(None, len(ids) - cut, tokenizer=tokenizer, stop_token_ids=()))
        assert first == added(tokenizer, start, ids[:cut])
        assert first + rest == added(tokenizer, start, ids)


def test_a_character_that_was_cut_by_the_end_of_a_run_comes_whole_in_the_next(dictate):
    tokenizer = KINDS["sentencepiece"]()
    ids = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "🎉".encode()]
    episode = fw.Episode(MODEL)
    dictate(ids)
    assert text_of(episode.generate([1, 300], 2, tokenizer=tokenizer, stop_token_ids=())) == "��"
    assert text_of(episode.generate(None, 2, tokenizer=tokenizer, stop_token_ids=())) == "🎉"


@pytest.mark.parametrize("stop", ["\n", "\n\nnew", "日本", "wn 日", " ", "🎉", "the end"])
def test_a_stop_string_ends_a_run_at_the_token_that_completes_it(tokenizer, dictate, stop):
    start = tokenizer.encode("the quick")
    ids = tokenizer.encode(" brown 日本語 🎉\n\nnew lines 🎉 fox", add_special_tokens=False)
    within = [stop in added(tokenizer, start, ids[:n]) for n in range(1, len(ids) + 1)]
    wanted = within.index(True) + 1 if any(within) else len(ids)
    dictate(ids)
    options = {"tokenizer": tokenizer, "stop_token_ids": (), "stop_strings": ["never", stop]}
    steps = list(fw.Episode(MODEL).generate(start, len(ids), **options))
    assert len(steps) == wanted
    assert steps[-1].finish_reason == ["stop_string" if any(within) else "length"]
    assert [step.ended for step in steps] == [[False]] * (wanted - 1) + [[any(within)]]
    text = added(tokenizer, start, ids[:wanted])
    assert text_of(steps) == text
    dictate(ids)
    steps = fw.Episode(MODEL).generate(start, len(ids), include_stop_str_in_output=False, **options)
    assert text_of(steps) == text.split(stop)[0]


def test_a_stop_token_may_be_left_out_of_the_text(dictate):
    tokenizer = KINDS["byte level"]()
    ids = tokenizer.encode(" brown fox</s> jumps", add_special_tokens=False)
    for include, text in ((True, " brown fox</s>"), (False, " brown fox")):
        dictate(ids)
        steps = list(
            fw.Episode(MODEL).generate(
                tokenizer.encode("the"),
                tokenizer=tokenizer,
                stop_token_ids=torch.tensor([1]),
                stop_strings="fo!",
                include_stop_str_in_output=include,
            )
        )
        assert text_of(steps) == text
        assert steps[-1].finish_reason == ["stop_token"]
        assert [step.finish_reason for step in steps[:-1]] == [[None]] * (len(steps) - 1)


def test_each_row_says_why_it_stopped():
    ids = prompt(4, 6, seed=3, vocabulary=VOCABULARY)
    free = [step.token_ids.tolist() for step in fw.Episode(MODEL, 4).generate(ids, 6, stop_token_ids=())]
    stop = free[2][1]
    steps = list(fw.Episode(MODEL, 4).generate(ids, 6, stop_token_ids=stop))
    for row in range(4):
        own = [each[row] for each in free]
        ends = own.index(stop) if stop in own else None
        for n, step in enumerate(steps):
            wanted = "stop_token" if ends is not None and n >= ends else "length" if n == 5 else None
            assert step.finish_reason[row] == wanted
    assert steps[-1].finish_reason.count("stop_token") >= 1


def test_without_a_number_a_run_goes_on_to_64_tokens_or_until_the_cache_is_full():
    for used, wanted in ((1, 64), (64, 64), (65, 63), (127, 1)):
        steps = list(fw.Episode(MODEL).generate([5] * used, stop_token_ids=()))
        assert len(steps) == wanted
        assert steps[-1].finish_reason == ["length"]
    mask = [[0] * 100 + [1] * 26, [1] * 126]  # padding takes no room
    assert len(list(fw.Episode(MODEL, 2).generate([[5] * 126] * 2, attention_mask=mask, stop_token_ids=()))) == 2
    assert len(list(fw.Episode(MODEL).generate([[5] * 160], attention_mask=[[0] * 50 + [1] * 110]))) == 18


@pytest.mark.parametrize(
    ("max_length", "used", "asked", "hint"),
    [
        (20, 15, 10, "make the episode with max_length=25 or more, up to 128, or ask for at most 5 new tokens"),
        (20, 20, None, "make the episode with max_length=21 or more, up to 128"),
        (None, 120, 10, "ask for at most 8 new tokens"),
        (None, 128, None, "begin a new episode with a shorter prompt: this model has no more positions"),
        (20, 15, 120, "ask for at most 5 new tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_hint_that_works(max_length, used, asked, hint):
    episode = fw.Episode(MODEL, max_length=max_length)
    with pytest.raises(ValueError, match=rf"the KV cache holds {max_length or 128} per row; {hint}$"):
        episode.generate([5] * used, asked)
    assert episode.length == 0
    if "max_length" in hint:
        longer = fw.Episode(MODEL, max_length=used + (asked or 1))
        assert len(list(longer.generate([5] * used, asked, stop_token_ids=()))) == (asked or 1)
    if "at most" in hint:
        most = int(hint.split("at most ")[1].split()[0])
        assert len(list(episode.generate([5] * used, most, stop_token_ids=()))) == most


@pytest.mark.parametrize(("max_length", "length"), [(20, 30), (20, 200), (None, 200)])
def test_the_advice_for_a_text_that_is_too_long_works(max_length, length):
    with pytest.raises(ValueError, match=f"{length} tokens do not fit") as error:
        fw.Episode(MODEL, max_length=max_length).feed([5] * length)
    if "max_length" in str(error.value):
        advised = int(str(error.value).split("max_length=")[1].split()[0])
        fw.Episode(MODEL, max_length=advised).feed([5] * length)
    else:
        assert length > 128
        assert "this model has 128 positions, so the text must be shorter" in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_strings": [""]}, "'' is no text to stop at"),
        ({"stop_strings": [5]}, "5 is no text to stop at"),
        ({"stop_strings": ["x"]}, "needs tokenizer="),
        ({"stop_token_ids": "eos"}, "stop_token_ids='eos': expected whole numbers"),
        ({"stop_token_ids": [-1]}, "token id -1 is negative: expected stop_token_ids from 0 up"),
        ({"tokenizer": object()}, r"is a object: expected a fastweights Tokenizer, as fw\.load returns it"),
        ({"seed": "x"}, "seed='x': expected a whole number from 0 to"),
        ({"seed": -1}, "seed=-1: expected a whole number from 0 to"),
        ({"seed": [1, 2]}, "seed holds 2 numbers: expected one, or one for each of 1 rows"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens=2\.5"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(options, message):
    episode = fw.Episode(MODEL)
    with pytest.raises(ValueError, match=message):
        episode.generate([1, 2], **options)
    assert episode.length == 0


def test_nothing_is_chosen_from_logits_that_are_not_finite():
    for value in (float("nan"), float("inf")):
        episode = fw.Episode(MODEL)
        episode.feed([1, 2, 3])
        episode.state.logits_BV = torch.full_like(episode.logits, value)
        before = episode.generator.get_state()
        for temperature in (0.0, 1.0):
            with pytest.raises(
                ValueError, match="the logits of row 0 are not finite after 3 tokens: no token was chosen"
            ):
                next(episode.generate(None, 3, temperature=temperature))
        assert episode.length == 3
        assert torch.equal(episode.generator.get_state(), before)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_row_of_a_padded_batch_generates_what_it_generates_alone(tokenizer, side, temperature):
    rows = [tokenizer.encode(text) for text in ("the quick brown fox", "日本語", "a")]
    width = max(map(len, rows))
    pads = [[400] * (width - len(row)) for row in rows]  # an id that the model does not even have
    ids, mask = [], []
    for row, pad in zip(rows, pads, strict=True):
        ids.append(pad + row if side == "left" else row + pad)
        mask.append([0] * len(pad) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(pad))
    options = {"tokenizer": tokenizer, "temperature": temperature, "repetition_penalty": 1.3, "stop_token_ids": ()}
    batch = list(fw.Episode(MODEL, 3).generate(ids, 12, attention_mask=mask, seed=2, **options))
    for n, row in enumerate(rows):
        alone = list(fw.Episode(MODEL).generate(row, 12, seed=2 + n, **options))
        assert [int(step.token_ids[n]) for step in batch] == [int(step.token_ids) for step in alone]
        assert "".join(step.text[n] for step in batch) == text_of(alone)


# ---- drawing


def drawn(rows, seed, count=12, **options):
    episode = fw.Episode(MODEL, len(rows))
    steps = episode.generate(rows, count, temperature=2.0, seed=seed, stop_token_ids=(), **options)
    return torch.stack([step.token_ids for step in steps], 1).tolist()


def test_a_row_of_a_batch_draws_what_it_draws_alone_with_its_seed():
    rows = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8], [11, 12, 13]]
    batch = drawn(rows, 40)
    assert batch == [drawn([row], 40 + n)[0] for n, row in enumerate(rows)]
    assert batch[0] != batch[2]
    assert drawn(rows, np.int64(40)) == batch == drawn(rows, torch.tensor([40, 41, 42, 43]))
    seeds = [3, 3, 3, 9]
    batch = drawn(rows, seeds)
    assert batch == [drawn([row], seed)[0] for row, seed in zip(rows, seeds, strict=True)]
    assert batch[0] == batch[2]


def test_rows_that_end_earlier_change_nothing_for_the_others():
    rows = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    free = drawn(rows, 1)
    stop = free[1][3]
    episode = fw.Episode(MODEL, 3)
    list(episode.generate(rows, 12, temperature=2.0, seed=1, stop_token_ids=[stop]))
    for n, row in enumerate(rows):
        alone = fw.Episode(MODEL)
        list(alone.generate(row, 12, temperature=2.0, seed=1 + n, stop_token_ids=[stop]))
        assert episode.token_ids[n] == alone.token_ids[0]
        more = [list(e.generate(None, 4, temperature=2.0, stop_token_ids=())) for e in (episode.fork(rows=[n]), alone)]
        assert [int(s.token_ids) for s in more[0]] == [int(s.token_ids) for s in more[1]]


@pytest.mark.parametrize("way", ["snapshot", "fork", "file"])
def test_draws_go_on_where_they_were(way, tmp_path):
    episode = fw.Episode(MODEL, 2)
    options = {"temperature": 2.0, "stop_token_ids": ()}
    list(episode.generate([[5, 6], [7, 8]], 5, seed=8, **options))
    if way == "snapshot":
        other = fw.Episode(MODEL, 2)
        other.restore(episode.snapshot())
    elif way == "fork":
        other = episode.fork()
    else:
        episode.save(tmp_path / "e")
        other = fw.Episode.load(MODEL, tmp_path / "e")
    more = [[s.token_ids.tolist() for s in e.generate(None, 6, **options)] for e in (episode, other)]
    assert more[0] == more[1]
    assert episode.token_ids == other.token_ids


def test_continuations_of_one_row_differ_and_the_first_is_the_rows_own():
    episode = fw.Episode(MODEL)
    options = {"temperature": 2.0, "stop_token_ids": ()}
    list(episode.generate([5, 6, 7], 3, seed=8, **options))
    tree = episode.fork(rows=[0] * 6)
    for one in (tree, episode):
        list(one.generate(None, 8, **options))
    assert tree.token_ids[0] == episode.token_ids[0]
    assert len({tuple(ids) for ids in tree.token_ids}) == 6


def test_settings_may_be_numpys():
    options = {"temperature": np.float32(0.5), "top_k": np.int64(5), "top_p": np.float64(0.9), "seed": np.uint8(3)}
    steps = fw.Episode(MODEL).generate([5, 6], np.int32(4), stop_token_ids=np.array([], int), **options)
    assert len(list(steps)) == 4


def test_a_loop_of_ones_own_gives_what_generate_gives():
    sampling = fw.Sampling(temperature=0.9, top_k=30, top_p=0.95, repetition_penalty=1.2)
    rows = [[5, 6, 7], [8, 9, 10]]
    episode, own = fw.Episode(MODEL, 2), fw.Episode(MODEL, 2)
    options = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.2}
    list(episode.generate(rows, 10, seed=5, update="none", stop_token_ids=(), **options))
    own.generator.manual_seed(5)
    own.feed(rows, update="none")
    while own.length < 13:
        own.feed(sampling.choose(own.logits, own.token_ids, own.generator)[:, None], update="none")
    assert own.token_ids == episode.token_ids
