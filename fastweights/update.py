"""Which tokens are written: every form of `update=` becomes a bool mask [B, T]."""

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
        raise ValueError(
            f"update={update!r}: expected 'all', 'none', 'prompt', 'generated', absolute positions, "
            "a bool mask [B, T], fw.token_ids([...]) or a function (position, token_id)"
        )
    if isinstance(update, TokenIds):
        return torch.isin(ids_BT, torch.tensor(sorted(update.ids), dtype=torch.int64))
    if callable(update):
        pairs = zip(position_BT.flatten().tolist(), ids_BT.flatten().tolist(), strict=True)
        return torch.tensor([bool(update(position, token)) for position, token in pairs]).reshape(shape)
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
