"""At the door: every form in which callers give tokens, masks and `update=` becomes a CPU tensor [B, T]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Encoding
from torch import Tensor


@dataclass(frozen=True)
class TokenIds:
    """Writes wherever one of these tokens stands; made by `token_ids`."""

    ids: frozenset[int]


def token_ids(ids: int | Iterable[int]) -> TokenIds:
    """`update=fw.token_ids([...])`: writes the tokens with these ids, wherever they stand."""
    return TokenIds(frozenset(whole_numbers("fw.token_ids", ids)))


Ids = Tensor | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Mapping[str, Any]
Mask = Tensor | Sequence | np.ndarray | None
UPDATES = (
    "'all', 'none', 'prompt', 'generated', absolute positions, a bool mask [B, T], fw.token_ids([...]) "
    "or a function (position, token_id)"
)
Update = str | TokenIds | Tensor | Sequence | np.ndarray | Callable[[int, int], bool]
WANTED = "token ids [B, T] or [T], as tokenizer.encode gives them"


def written(update: Update, ids_BT: Tensor, position_BT: Tensor, generated: bool, name: str = "update") -> Tensor:
    """The mask of one feed, bool [B, T] on the CPU.

    Args:
        update: "all", "none", "prompt", "generated", absolute positions (whole numbers from 0: a list, a
            range, an array), a bool mask [B, T] for this feed, `token_ids`, or a function (position, token id) → bool.
        ids_BT, position_BT: int64, on the CPU.
        generated: whether the model produced these tokens itself.
        name: what a refusal calls `update`.
    """
    shape = tuple(ids_BT.shape)
    if isinstance(update, str):
        match update:
            case "all" | "none":
                return torch.full(shape, update == "all", device="cpu")
            case "prompt" | "generated":
                return torch.full(shape, (update == "generated") == generated, device="cpu")
        raise ValueError(f"{name}={update!r}: expected {UPDATES}")
    if isinstance(update, TokenIds):
        return torch.isin(ids_BT, torch.tensor(sorted(update.ids), dtype=torch.int64, device="cpu"))
    if callable(update):
        pairs = zip(position_BT.flatten().tolist(), ids_BT.flatten().tolist(), strict=True)
        return torch.tensor([bool(update(position, token)) for position, token in pairs], device="cpu").reshape(shape)
    given = None if isinstance(update, int | float | Mapping) else _array(name, update)
    if given is None:
        raise ValueError(f"{name}={update!r}: expected {UPDATES}")
    if given.dtype == bool:
        if generated:
            return torch.zeros(shape, dtype=torch.bool, device="cpu")  # a mask speaks of the prompt it was made for
        if given.shape not in (shape, shape[1:]):
            raise ValueError(f"{name} mask has shape {list(given.shape)}, but this feed is {list(shape)}")
        return torch.tensor(given, device="cpu").expand(shape)
    if given.size and (given.dtype.kind not in "iu" or given.ndim != 1):
        raise ValueError(f"{name} has shape {list(given.shape)} and {given.dtype}: expected positions, a list of ints")
    if given.size and given.min() < 0:
        raise ValueError(f"{name} position {given.min()} is negative: positions are absolute, from 0")
    return torch.isin(position_BT, torch.from_numpy(given.astype(np.int64)))


def whole_numbers(name: str, value: Any) -> list[int]:
    """One whole number, or a list, set, range, array or tensor of them, as a list; refused by `name` otherwise."""
    given = None if isinstance(value, bool | float | Mapping) else _array(name, value)
    if given is None or (given.size and given.dtype.kind not in "iu") or given.ndim > 1:
        raise ValueError(f"{name}={value!r}: expected whole numbers, one or a list of them")
    numbers = given.reshape(-1).tolist()
    for number in numbers:
        if number < 0:
            raise ValueError(f"token id {number} is negative: expected {name} from 0 up")
    return numbers


def tokens(input_ids: Ids, mask: Mask, rows: int | None, vocabulary: int) -> tuple[Tensor, Tensor | None]:
    """(ids [B, T] int64, mask [B, T] bool or None), both on the CPU.

    Args:
        input_ids: [B, T] or [T]: a tensor on any device, an array, lists, tuples or arrays in a list, or what a
            tokenizer returned (`input_ids` and, unless a mask is given, `attention_mask` are taken from it). Rows of
            different lengths are padded on the right.
        mask: [B, T] or [T] of 0 and 1, of any type; 0 = padding, whose ids do not matter.
        rows: the batch that is wanted; None = any.

    Raises:
        ValueError: wrong shapes or types, no token at all, an id outside the vocabulary.
    """
    if isinstance(input_ids, Mapping):
        if "input_ids" not in input_ids:
            raise ValueError(f"input_ids is a mapping of {sorted(input_ids)} without 'input_ids': expected {WANTED}")
        mask = input_ids.get("attention_mask") if mask is None else mask
        input_ids = input_ids["input_ids"]
    elif isinstance(input_ids, Encoding):
        mask = input_ids.attention_mask if mask is None else mask
        input_ids = input_ids.ids
    ids_BT, real_BT = _rows("input_ids", input_ids, WANTED)
    if ids_BT.ndim != 2 or ids_BT.size == 0:
        raise ValueError(f"input_ids has shape {list(ids_BT.shape)}: expected [B, T] with at least one token")
    if ids_BT.dtype.kind not in "iu":
        raise ValueError(f"input_ids is {_torch_name(ids_BT)}: expected whole numbers")
    if rows is not None and len(ids_BT) != rows:
        raise ValueError(f"input_ids has batch {len(ids_BT)}, but this episode has batch {rows}")
    if mask is not None:
        real_BT = _mask(mask, ids_BT, real_BT)
    outside_BT = (ids_BT < 0) | (ids_BT >= vocabulary)
    if real_BT is not None:
        ids_BT, outside_BT = np.where(outside_BT & ~real_BT, 0, ids_BT), outside_BT & real_BT
    for row, column in np.argwhere(outside_BT):
        raise ValueError(
            f"token id {ids_BT[row, column]} is outside the vocabulary of {vocabulary}: row {row}, token {column}"
        )
    whole = real_BT is None or real_BT.all()
    return torch.from_numpy(ids_BT.astype(np.int64)), None if whole else torch.from_numpy(real_BT)


def _rows(name: str, given: Any, wanted: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(rows [B, T], which entries are there [B, T] or None: all): one row or many, padded with 0 on the right."""
    if isinstance(given, str | bytes) or not (isinstance(given, Iterable) or hasattr(given, "__array__")):
        raise ValueError(f"{name} is a {type(given).__name__}: expected {wanted}")
    if isinstance(given, Tensor) or hasattr(given, "__array__"):
        whole = _array(name, given)
        assert whole is not None
        return (whole[None] if whole.ndim == 1 else whole), None
    items = [item.ids if isinstance(item, Encoding) else item for item in given]
    if any(isinstance(item, str | bytes) for item in items):
        raise ValueError(f"{name} holds text: expected {wanted}")
    arrays = [_array(name, item) for item in items]
    rows = [row for row in arrays if row is not None]
    shapes = {row.ndim for row in rows}
    if len(rows) < len(items) or len(shapes) > 1 or max(shapes, default=0) > 1:
        kinds = " and ".join(sorted({type(item).__name__ for item in items}))
        raise ValueError(f"{name} is a list of {kinds} that are no rows of the same kind: expected {wanted}")
    if shapes <= {0}:
        return np.array([row.item() for row in rows], None if rows else int)[None], None
    lengths = np.array([len(row) for row in rows])
    width = lengths.max()
    ends = [np.zeros(width - length, int) for length in lengths]
    padded = np.stack([np.concatenate((row, end)) if len(row) else end for row, end in zip(rows, ends, strict=True)])
    return padded, None if (lengths == width).all() else np.arange(width) < lengths[:, None]


def _mask(mask: Any, ids_BT: np.ndarray, there_BT: np.ndarray | None) -> np.ndarray:
    """An attention mask as bool [B, T]; 1 = a token."""
    mask_BT, _ = _rows("attention_mask", mask, "1 for a token and 0 for padding, [B, T] or [T]")
    if mask_BT.shape != ids_BT.shape:
        raise ValueError(f"attention_mask has shape {list(mask_BT.shape)}, but input_ids has {list(ids_BT.shape)}")
    real_BT = mask_BT != 0
    if (wrong := mask_BT[real_BT & (mask_BT != 1)]).size:
        raise ValueError(f"attention_mask holds {wrong[0]}: expected 1 for a token and 0 for padding")
    if there_BT is not None and (real_BT & ~there_BT).any():
        row = int(np.argwhere(real_BT & ~there_BT)[0, 0])
        raise ValueError(f"attention_mask has more tokens in row {row} than input_ids")
    if not real_BT.any():
        raise ValueError("attention_mask is all padding: expected at least one token")
    return real_BT


def _array(name: str, value: Any) -> np.ndarray | None:
    """Numbers in any form as an array on the CPU; None for what holds no numbers."""
    if isinstance(value, Tensor):
        try:
            value = value.detach().cpu()
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        except (RuntimeError, TypeError):
            raise ValueError(f"{name} is a tensor of another kind (nested, sparse, meta): expected numbers") from None
    if isinstance(value, str | bytes) or not (isinstance(value, Iterable | int | float) or hasattr(value, "__array__")):
        return None
    if isinstance(value, Iterable) and not hasattr(value, "__array__"):
        value = [each.item() if isinstance(each, Tensor) and each.dim() == 0 else each for each in value]
    try:
        given = np.asarray(value)
    except (ValueError, TypeError):
        raise ValueError(f"{name} holds rows of different lengths or what is no number") from None
    if given.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {'text' if given.dtype.kind in 'US' else given.dtype}: expected numbers")
    return given.astype(np.int64) if given.dtype.kind == "u" else given


def _torch_name(given: np.ndarray) -> str:
    """The dtype as torch names it; Python's floats are float32 there."""
    return "torch.float32" if given.dtype == np.float64 else str(torch.from_numpy(given[:0]).dtype)
