"""Prompts side by side, token by token: an activation patch between two prompts wants them aligned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..tokenizer import Tokenizer
from .exam import prompt_ids


@dataclass(frozen=True)
class Alignment:
    """Prompts, token by token.

    token_ids: per prompt its ids.
    pieces: per prompt one printable piece of text per id.
    aligned: whether all prompts have as many tokens.
    differs: the columns where the prompts are not all equal; a column that a prompt lacks is one of them.
    """

    token_ids: list[list[int]]
    pieces: list[list[str]]
    aligned: bool
    differs: list[int]

    def __str__(self) -> str:
        """A line per column: its number, the prompts' tokens, and a mark where they differ."""
        columns = max(map(len, self.pieces))
        widths = [max(map(len, row)) for row in self.pieces]
        lines = []
        for column in range(columns):
            cells = [
                (f"|{row[column]}|" if column < len(row) else "").ljust(width + 2)
                for row, width in zip(self.pieces, widths, strict=True)
            ]
            mark = "≠" if column in self.differs else ""
            lines.append(f"{column:>4}  {'  '.join(cells)}  {mark}".rstrip())
        lengths = " and ".join(map(str, sorted({len(row) for row in self.token_ids})))
        end = f"aligned: {lengths} tokens each" if self.aligned else f"not aligned: {lengths} tokens"
        return "\n".join([*lines, f"{end}; different in {len(self.differs)} of {columns} columns"])

    def __repr__(self) -> str:
        said = "aligned" if self.aligned else "not aligned"
        return f"Alignment of {len(self.token_ids)} prompts: {said}, different in columns {self.differs}"


def align(tokenizer: Tokenizer, *prompts: str | Sequence[int]) -> Alignment:
    """Prints the prompts' tokens side by side, marks the columns where they differ, and returns what it printed.

    Args:
        prompts: texts, or lists of ids.

    Raises:
        ValueError: no prompt, an empty one, or one list of texts in place of the texts themselves.
    """
    if tokenizer is None:  # what load() returns for a checkpoint without one
        raise ValueError("align() got None for the tokenizer: it turns the texts into ids")
    if not prompts:
        raise ValueError("align() got no prompt: expected fw.align(tokenizer, one, another)")
    if any(isinstance(prompt, list | tuple) and isinstance((*prompt, 0)[0], str) for prompt in prompts):
        raise ValueError("align() got a list of texts: expected the texts one by one, fw.align(tokenizer, *prompts)")
    rows = [prompt_ids(tokenizer, prompt, f"prompt {number}")[1] for number, prompt in enumerate(prompts)]
    longest = max(map(len, rows))
    differs = [column for column in range(longest) if len({tuple(row[column : column + 1]) for row in rows}) > 1]
    pieces = [tokenizer.tokens(row) for row in rows]
    found = Alignment(rows, pieces, len({*map(len, rows)}) == 1, differs)
    print(found)
    return found
