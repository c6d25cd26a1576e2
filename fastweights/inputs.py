"""At the door: every form in which callers give tokens, masks and `update=` becomes a CPU tensor [B, T]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenIds:
    """Writes wherever one of these tokens stands; made by `token_ids`."""

    ids: frozenset[int]


def token_ids(ids: Iterable[int]) -> TokenIds:
    """`update=fw.token_ids([...])`: writes the tokens with these ids, wherever they stand."""
    return TokenIds(frozenset(int(i) for i in ids))


Ids = Tensor | Sequence[int] | Sequence[Sequence[int]]
Mask = Tensor | Sequence | None
UPDATES = (
    "'all', 'none', 'prompt', 'generated', absolute positions, a bool mask [B, T], fw.token_ids([...]) "
    "or a function (position, token_id)"
)
Update = str | TokenIds | Tensor | Sequence | Callable[[int, int], bool]


def written(update: Update, ids_BT: Tensor, position_BT: Tensor, generated: bool) -> Tensor:
    """The mask of one feed, bool [B, T] on the CPU.

    Args:
        update: "all", "none", "prompt", "generated", absolute positions (whole numbers from 0), a bool mask
            [B, T] for this feed, `token_ids`, or a function (position, token id) → bool.
        ids_BT, position_BT: int64, on the CPU.
        generated: whether the model produced these tokens itself.
    """
    shape = tuple(ids_BT.shape)
    if isinstance(update, str):
        match update:
            case "all" | "none":
                return torch.full(shape, update == "all")
            case "prompt" | "generated":
                return torch.full(shape, (update == "generated") == generated)
        raise ValueError(f"update={update!r}: expected {UPDATES}")
    if isinstance(update, TokenIds):
        return torch.isin(ids_BT, torch.tensor(sorted(update.ids), dtype=torch.int64))
    if callable(update):
        pairs = zip(position_BT.flatten().tolist(), ids_BT.flatten().tolist(), strict=True)
        return torch.tensor([bool(update(position, token)) for position, token in pairs]).reshape(shape)
    if not isinstance(update, Iterable):
        raise ValueError(f"update={update!r}: expected {UPDATES}")
    given = torch.as_tensor(update if isinstance(update, Tensor) else list(update)).cpu()
    if given.dtype == torch.bool:
        if generated:
            return torch.zeros(shape, dtype=torch.bool)  # a mask speaks of the prompt it was made for
        if given.shape not in (shape, shape[1:]):
            raise ValueError(f"update mask has shape {list(given.shape)}, but this feed is {list(shape)}")
        return given.expand(shape)
    if given.numel() == 0:
        return torch.zeros(shape, dtype=torch.bool)
    if given.dtype.is_floating_point or given.dim() != 1:
        raise ValueError(f"update has shape {list(given.shape)} and {given.dtype}: expected positions, a list of ints")
    if int(given.min()) < 0:
        raise ValueError(f"update position {int(given.min())} is negative: positions are absolute, from 0")
    return torch.isin(position_BT, given.to(torch.int64))


def tokens(input_ids: Ids, mask: Mask, rows: int | None, vocabulary: int) -> tuple[Tensor, Tensor | None]:
    """(ids [B, T] int64, mask [B, T] bool or None), both on the CPU.

    Args:
        input_ids: [B, T] or [T]; lists of different lengths are padded on the right.
        mask: [B, T] or [T], 0 = padding.
        rows: the batch that is wanted; None = any.

    Raises:
        ValueError: wrong shapes or types, no token at all, an id outside the vocabulary.
    """
    if not isinstance(input_ids, Tensor):
        given = type(input_ids).__name__
        if isinstance(input_ids, str) or not isinstance(input_ids, Iterable):
            raise ValueError(
                f"input_ids is a {given}: expected token ids [B, T] or [T], as tokenizer.encode gives them"
            )
        if any(isinstance(row, str) for row in input_ids):
            raise ValueError("input_ids holds text: expected token ids [B, T] or [T], as tokenizer.encode gives them")
        ragged = [list(row) for row in input_ids if isinstance(row, (Sequence, Tensor))]
        if mask is None and len({len(row) for row in ragged}) > 1:
            width = max(map(len, ragged))
            mask = [[1] * len(row) + [0] * (width - len(row)) for row in ragged]
            ragged = [row + [0] * (width - len(row)) for row in ragged]
        input_ids = torch.tensor(ragged or input_ids)
    ids_BT = input_ids.detach().cpu()
    ids_BT = ids_BT[None] if ids_BT.dim() == 1 else ids_BT
    if ids_BT.dim() != 2 or ids_BT.numel() == 0:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}: expected [B, T] with at least one token")
    if ids_BT.dtype.is_floating_point or ids_BT.dtype == torch.bool:
        raise ValueError(f"input_ids is {ids_BT.dtype}: expected whole numbers")
    if rows is not None and len(ids_BT) != rows:
        raise ValueError(f"input_ids has batch {len(ids_BT)}, but this episode has batch {rows}")
    for outside in ids_BT[(ids_BT < 0) | (ids_BT >= vocabulary)].tolist():
        raise ValueError(f"token id {outside} is outside the vocabulary of {vocabulary}")
    if mask is None:
        return ids_BT.long(), None
    mask_BT = torch.as_tensor(mask).cpu()
    mask_BT = mask_BT[None] if mask_BT.dim() == 1 else mask_BT
    if mask_BT.shape != ids_BT.shape:
        raise ValueError(f"attention_mask has shape {list(mask_BT.shape)}, but input_ids has {list(ids_BT.shape)}")
    mask_BT = mask_BT != 0
    if not mask_BT.any():
        raise ValueError("attention_mask is all padding: expected at least one token")
    return ids_BT.long(), mask_BT
