"""The text of ids that come one at a time, and where a stop string ends it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from tokenizers import Tokenizer as Backend

from .inputs import whole_numbers

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_CONTEXT = 16  # ids: more than the tokens of any one character


class Decoder(Protocol):
    """What a stream needs of a tokenizer."""

    backend: Backend
    special_ids: frozenset[int]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str: ...


class Stream:
    """Text of ids that come one at a time: `"".join(push(i) for i in ids) + flush()` is `decode(ids)`.

    Text is held back while later ids could still change it, so no half character is ever given out. `context`
    holds ids that were read before: then the text is what `ids` add to theirs, its first space included.
    """

    def __init__(self, tokenizer: Decoder, skip_special_tokens: bool = False, context: Sequence[int] = ()):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._context: list[int] = []  # ids given out last: decoders treat the start of a text differently
        self._pending: list[int] = []
        self._known = ""  # the text of `_context`
        self.held = ""  # the text of what was pushed and not given out, as `decode` shows it now
        start = len(context)
        while start and not self._known:
            start = max(0, start - _CONTEXT)
            while start and self._is_byte(context[start]):  # a run of byte tokens is decoded as a whole
                start -= 1
            self._give_out(context[start:])

    def push(self, token_id: int) -> str:
        """The text that is certain after this id: none for a part of a character."""
        (token_id,) = whole_numbers("ids", token_id)
        piece = self._tokenizer.backend.id_to_token(token_id)
        if piece is None or (self._skip and token_id in self._tokenizer.special_ids):
            return ""  # decode passes over it, and it ends no run of bytes
        self._pending.append(token_id)
        whole = self._tokenizer.decode(self._context + self._pending, self._skip)
        # what was given out is the start of `whole`, unless a flush cut a character that has now come to its end
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._known, whole, strict=False)))
        self.held = whole[same:]
        # "�" may be the start of a character; a run of byte tokens is decoded as a whole, once it has ended
        if not self.held or self.held.endswith("�") or BYTE_TOKEN.fullmatch(piece):
            return ""
        new = self.held
        self._give_out(self._pending)
        return new

    def flush(self) -> str:
        """What was held back, as `decode` shows it. Ids pushed later go on from there."""
        new = self.held
        self._give_out([*self._context, *self._pending])
        return new

    def copy(self) -> Stream:
        other = Stream(self._tokenizer, self._skip)
        other._context, other._pending = list(self._context), list(self._pending)
        other._known, other.held = self._known, self.held
        return other

    def _give_out(self, ids: Iterable[int]) -> None:
        self._context, self._pending, self.held = list(ids), [], ""
        self._known = self._tokenizer.decode(self._context, self._skip)

    def _is_byte(self, token_id: int) -> bool:
        piece = self._tokenizer.backend.id_to_token(token_id)
        return piece is not None and BYTE_TOKEN.fullmatch(piece) is not None


class RowText:
    """The text of one generated row: a stream that ends at a stop string.

    With `include` the text keeps its end: the stop string and what follows it in its token, or the stop token.
    Without, text that may be the start of a stop string is held back until that is known.
    """

    def __init__(self, stream: Stream):
        self.stream = stream
        self._text = ""  # what is certain of it
        self._given = 0  # characters given out
        self._stops: Sequence[str] = ()
        self._include, self._reach = True, 0

    def begin(self, stop_strings: Sequence[str], include: bool) -> None:
        """A new run goes on from here: a stop string counts once it lies in the text of this run."""
        self._stops, self._include = stop_strings, include
        self._reach = max(map(len, stop_strings), default=0)
        self._text, self._given = self._text[self._given :], 0

    def add(self, token_id: int, last: bool, stop_token: bool) -> tuple[str, bool]:
        """What this token adds to the text, and whether a stop string ends it here.

        Args:
            last: no token follows: nothing is held back then.
            stop_token: this is a stop token.
        """
        if stop_token and not self._include:
            return self._rest(), False
        certain = len(self._text)
        self._text += self.stream.push(token_id)
        seen = self._text + self.stream.held
        start = max(0, certain - self._reach + 1)
        found = [at for stop in self._stops if (at := seen.find(stop, start)) >= 0]
        if found and not self._include:
            self.stream.flush()
            new = seen[self._given : min(found)]
            self._text, self._given = seen, len(seen)
            return new, True
        if found or last or stop_token:
            return self._rest(), bool(found)
        hold = 0 if self._include else max((self._started(stop) for stop in self._stops), default=0)
        new = self._text[self._given : len(self._text) - hold]
        self._given += len(new)
        return new, False

    def copy(self) -> RowText:
        other = RowText(self.stream.copy())
        other._text, other._given = self._text, self._given
        other._stops, other._include, other._reach = self._stops, self._include, self._reach
        return other

    def _rest(self) -> str:
        self._text += self.stream.flush()
        new, self._given = self._text[self._given :], len(self._text)
        return new

    def _started(self, stop: str) -> int:
        """How many characters of `stop` the text may end with: the longest."""
        longest = min(len(stop) - 1, len(self._text) - self._given)
        return next((n for n in range(longest, 0, -1) if self._text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Texts:
    """How far the text of each row was given out, so that a run which goes on from there gives out the rest.

    after: length and last tokens of each row, to know whether a run does go on from there.
    """

    tokenizer: Decoder
    texts: list[RowText]
    after: list[tuple[int, list[int]]]

    @classmethod
    def of(cls, last: Texts | None, tokenizer: Decoder, token_ids: list[list[int]]) -> Texts:
        """Those of the last run where its rows have read nothing since, new ones otherwise."""
        if last is not None and last.tokenizer is tokenizer and last.after == cls.ends(token_ids):
            return last
        texts = [RowText(Stream(tokenizer, context=ids)) for ids in token_ids]
        return cls(tokenizer, texts, cls.ends(token_ids))

    @staticmethod
    def ends(token_ids: list[list[int]]) -> list[tuple[int, list[int]]]:
        return [(len(ids), ids[-8:]) for ids in token_ids]

    def begun(self, stop_strings: Sequence[str], include: bool) -> Texts:
        """A copy for a new run that goes on from here, see `RowText.begin`."""
        new = self.rows(range(len(self.texts)))
        for text in new.texts:
            text.begin(stop_strings, include)
        return new

    def rows(self, chosen: Sequence[int]) -> Texts:
        """A copy whose row n is row `chosen[n]`."""
        return Texts(self.tokenizer, [self.texts[row].copy() for row in chosen], [self.after[row] for row in chosen])
