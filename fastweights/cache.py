"""Where the tokens of a pass stand, and the keys and values of the tokens before them.

Shape suffixes: B batch, T tokens of this pass, S places of the cache, K key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .config import LlamaConfig
from .kernels.rope import Into, Rope, rotate, rotate_into


@dataclass(frozen=True)
class Positions:
    """Where the tokens of one forward pass stand: worked out once per pass, read by every layer."""

    position_BT: Tensor  # absolute position of each token in its row (int64); 0 for padding
    real_BT: Tensor | None  # False = padding; None = no padding
    start: int | None  # the place of the first token if all rows agree on it; None if they differ
    end: int  # places in use after this pass, longest row
    visible: Tensor | None  # [B or 1, 1, T, S] True where a query may look; None: at itself and all before it
    # the same under each sliding window that ends within the text, [B or 1, 1, T, S]
    windowed: Mapping[int, Tensor] = field(default_factory=dict)
    place_BT: Tensor | None = field(init=False, default=None)  # in the cache, −1 for padding; None: `start` onwards

    def __post_init__(self) -> None:
        if self.real_BT is not None:
            place_BT = torch.where(self.real_BT, self.position_BT, -1).contiguous()
            object.__setattr__(self, "place_BT", place_BT)

    @staticmethod
    def alone(shape: tuple[int, int], attention_mask: Tensor | None, device: torch.device) -> Positions:
        """Tokens by themselves, from position 0, without a cache."""
        rows, tokens = shape
        if attention_mask is None or bool(attention_mask.all()):
            return Positions(torch.arange(tokens, device=device).expand(rows, tokens), None, 0, tokens, None)
        real_BT = attention_mask.to(device=device, dtype=torch.bool)
        position_BT = (real_BT.cumsum(1) - 1) * real_BT
        causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        itself_TT = torch.eye(tokens, dtype=torch.bool, device=device)  # padding must look somewhere
        visible = (causal_TT & real_BT[:, None, None]) | itself_TT
        return Positions(position_BT, real_BT, None, tokens, visible)

    @property
    def real_or_all_BT(self) -> Tensor:
        """Which tokens are not padding, [B, T], also where there is no padding."""
        return torch.ones_like(self.position_BT, dtype=torch.bool) if self.real_BT is None else self.real_BT

    def to(self, device: torch.device) -> Positions:
        """The same on another device, without the masks of windows."""
        if self.position_BT.device == device:
            return self
        moved = (None if t is None else t.to(device) for t in (self.position_BT, self.real_BT, self.visible))
        position_BT, real_BT, visible = moved
        assert position_BT is not None
        return replace(self, position_BT=position_BT, real_BT=real_BT, visible=visible, windowed={})

    def with_visible(self, windows: Iterable[int] = (), cached: bool = True) -> Positions:
        """The same, with a mask wherever torch's causal attention, which starts at place 0, would not do.

        windows: of the layers. cached: whether the keys stand in a KV cache, at the places that are their positions,
        or are those of the tokens themselves.
        """
        tokens, start = self.position_BT.shape[1], self.start
        if cut := [window for window in windows if window < self.end]:
            query_BT = self.position_BT if start is None else self.position_BT[:1]
            key_BS = torch.arange(self.end, device=query_BT.device)[None] if cached else query_BT
            query_B1T1, key_B11S = query_BT[:, None, :, None], key_BS[:, None, None]
            causal = key_B11S <= query_B1T1 if self.visible is None else self.visible
            masks = {window: causal & (key_B11S > query_B1T1 - window) for window in cut}
            return replace(self.with_visible(), windowed=masks)
        if self.visible is not None or not start or tokens == 1:
            return self
        everything_TS = torch.ones(tokens, self.end, dtype=torch.bool, device=self.position_BT.device)
        return replace(self, visible=everything_TS.tril(start)[None, None])

    def seen(self, window: int | None) -> tuple[Tensor | None, int | None]:
        """`visible` and `start` of a layer with this window, as `kernels.attention` takes them."""
        if window is None or window not in self.windowed:
            return self.visible, self.start
        return self.windowed[window], None

    def repeat(self, times: int) -> Positions:
        """The same rows over and over: row r stands at r + n · B for every n; without the masks of windows."""
        tile = [times, *[1] * 3]
        return replace(
            self,
            position_BT=self.position_BT.repeat(times, 1),
            real_BT=None if self.real_BT is None else self.real_BT.repeat(times, 1),
            visible=None if self.visible is None or len(self.visible) == 1 else self.visible.repeat(tile),
            windowed={},
        )

    def last(self, x_BTD: Tensor) -> Tensor:
        """The last real token of each row, [B, 1, D]."""
        if self.real_BT is None:
            return x_BTD[:, -1:]
        column_T = torch.arange(x_BTD.shape[1], device=self.real_BT.device)
        last_B = (self.real_BT * column_T).amax(dim=1).to(x_BTD.device)
        return x_BTD[torch.arange(x_BTD.shape[0], device=x_BTD.device), last_B][:, None]


class KVCache:
    """Keys and values of every layer, and the one owner of position.

    A token's place is its absolute position in its own row. Padding is not stored, so a ragged batch needs no mask
    beyond causality. The last place, −1, is scratch: padding is written there and never read.

    Args:
        max_length: places to allocate once. None: start small and double up to `max_position_embeddings`.

    Attributes:
        lengths: places in use, per row.
        first: the first place of each row that its tokens see; 0 but for rows that begin at a later position.
    """

    def __init__(self, config: LlamaConfig, batch_size: int, max_length: int | None, dtype, device):
        self.longest = config.max_position_embeddings
        self.limit = self.longest if max_length is None else max_length
        self.lengths, self.first = [0] * batch_size, [0] * batch_size
        places = min(256, self.limit) if max_length is None else max_length
        shape = (batch_size, config.num_key_value_heads, places + 1, config.head_dim)
        # zeros, not empty: padding queries may look at a place that nothing has been written to
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros_like(k) for k in self.keys]
        # with a graph that goes over passes: ("keys" or "values", layer) → [B, K, places, E]; None: no graph does
        self.graphs: dict[tuple[str, int], Tensor] | None = None

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2] - 1

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    def reserve(self, length: int) -> None:
        """Makes room for rows of `length` tokens.

        Raises:
            ValueError: it is more than `limit`; nothing changes then.
        """
        if length > self.limit:
            advice = f"make the episode with max_length={length} or more, up to {self.longest}"
            if length > self.longest:
                advice = f"this model has {self.longest} positions, so the text must be shorter"
            raise ValueError(
                f"{length} tokens do not fit: the KV cache holds {self.limit} per row ({self.length} are in use); "
                f"{advice}"
            )
        if length > self.capacity:
            keys, values = ([_longer(old, self.bucket(length)) for old in each] for each in (self.keys, self.values))
            self.keys, self.values = keys, values  # at once: an interrupt must not leave layers of two sizes

    def bucket(self, length: int) -> int:
        """Places to look at, or to have, for rows of `length` tokens: a power of two, so that they seldom change."""
        return min(self.limit, max(256, 1 << (length - 1).bit_length()))

    def positions(self, shape: tuple[int, int], attention_mask: Tensor | None, device: torch.device) -> Positions:
        """Where the next `shape` = (B, T) tokens stand; padding (mask 0) takes no position."""
        rows, tokens = shape
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        start = self.lengths[0] if len(set(self.lengths)) == 1 and not any(self.first) else None
        if attention_mask is None and start is not None:
            end = start + tokens
            position_BT = torch.arange(start, end, device=device).expand(rows, tokens)
            return Positions(position_BT, None, start, end, None)
        lengths_B1 = torch.tensor(self.lengths, device=device)[:, None]
        if attention_mask is None:
            real_BT = torch.ones(shape, dtype=torch.bool, device=device)
        else:
            real_BT = attention_mask.to(device=device, dtype=torch.bool)
        position_BT = (lengths_B1 + real_BT.cumsum(1) - 1) * real_BT
        end = int(max(int(position_BT.max()) + 1, *self.lengths))
        place_S = torch.arange(end, device=device)
        visible = place_S <= position_BT[:, None, :, None]
        if any(self.first):
            visible = visible & (place_S >= torch.tensor(self.first, device=device)[:, None, None, None])
        return Positions(position_BT, real_BT, None, end, visible)

    def append(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Stores this pass's keys and values; returns all of the layer's, [B, K, end, E]."""
        return self._store("keys", layer, k_BKTE, positions), self._store("values", layer, v_BKTE, positions)

    def rotate_append(
        self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, rope: Rope | None, positions: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries turned by rope, then `append` of the keys turned as well: by one kernel where it can."""
        if rope is None:
            return q_BHTE, *self.append(layer, k_BKTE, v_BKTE, positions)
        into = Into(self.keys[layer], self.values[layer], positions.start, positions.place_BT)
        turned_BHTE = rotate_into(q_BHTE, k_BKTE, v_BKTE, rope, into)
        if turned_BHTE is None:
            turned_BHTE, k_BKTE = rotate(q_BHTE, k_BKTE, rope)
            return turned_BHTE, *self.append(layer, k_BKTE, v_BKTE, positions)
        return turned_BHTE, into.keys_BKSE[:, :, : positions.end], into.values_BKSE[:, :, : positions.end]

    def _store(self, part: str, layer: int, new_BKTE: Tensor, positions: Positions) -> Tensor:
        buffer = getattr(self, part)[layer]
        stored = buffer[:, :, : positions.end]
        if not new_BKTE.requires_grad and self.graphs is None:
            self._write(buffer, new_BKTE, positions)
            return stored
        # The graph, which may be that of the queries alone, must not see a buffer that later tokens overwrite: the
        # gradient flows through a copy.
        earlier = None if self.graphs is None else self.graphs.get((part, layer))
        with torch.no_grad():
            self._write(buffer, new_BKTE.detach(), positions)
        copy = [stored, stored.new_zeros(*stored.shape[:2], 1, stored.shape[3])]
        if earlier is not None:
            copy[:1] = [earlier[:, :, : positions.end], stored[:, :, earlier.shape[2] :]]
        whole = torch.cat(copy, dim=2)
        self._write(whole, new_BKTE, positions)
        if self.graphs is not None and whole.requires_grad:
            self.graphs[part, layer] = whole[:, :, :-1]
        return whole[:, :, :-1]

    @staticmethod
    def _write(buffer: Tensor, new_BKTE: Tensor, positions: Positions) -> None:
        if positions.start is not None:
            buffer[:, :, positions.start : positions.end] = new_BKTE
        else:
            row_B1 = torch.arange(buffer.shape[0], device=buffer.device)[:, None]
            buffer[row_B1, :, positions.place_BT] = new_BKTE.transpose(1, 2)

    def advance(self, positions: Positions) -> None:
        """Counts the tokens of a pass whose keys and values are stored."""
        if positions.real_BT is None:
            self.lengths = [positions.end] * len(self.lengths)
        else:
            counts = positions.real_BT.sum(1).tolist()
            self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]

    def begin_at(self, position: int) -> None:
        """Lets the empty rows begin at a later position; nobody ever sees the places before it.

        Raises:
            ValueError: there is no such place; nothing changes then.
        """
        assert not any(self.lengths), "the rows are empty"
        self.reserve(position)
        self.lengths, self.first = ([position] * len(self.lengths) for _ in range(2))

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forgets the tokens after `lengths`. Their places become zero: not even NaN may shine through a mask."""
        for buffer in (*self.keys, *self.values):
            for row, length in enumerate(lengths):
                buffer[row, :, length:] = 0
        self.lengths = list(lengths)
        self.first = [min(pair) for pair in zip(self.first, lengths, strict=True)]

    # ---- copies

    def clone(self) -> KVCache:
        """A copy of the places in use."""
        return self.rows(range(len(self.lengths)))

    def rows(self, chosen: Sequence[int]) -> KVCache:
        """A copy, of the places in use, whose row n is row `chosen[n]` of this one."""
        other = object.__new__(KVCache)
        other.longest, other.limit = self.longest, self.limit
        other.lengths, other.first = ([each[row] for row in chosen] for each in (self.lengths, self.first))
        other.graphs = None
        end, every = max(other.lengths), list(chosen) == list(range(len(self.lengths)))
        index = torch.tensor(list(chosen), device=self.keys[0].device)

        def copied(buffer: Tensor) -> Tensor:
            new = buffer.new_zeros(len(index), buffer.shape[1], end + 1, buffer.shape[3])
            new[:, :, :end] = buffer[:, :, :end] if every else buffer[index, :, :end]
            return new

        other.keys, other.values = [copied(k) for k in self.keys], [copied(v) for v in self.values]
        return other

    def copy_from(self, other: KVCache) -> None:
        """Takes over what another cache of as many rows holds; the buffers keep their addresses if they can."""
        end = other.length
        self.reserve(end)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for buffer, copy in zip(mine, theirs, strict=True):
                buffer[:, :, :end], buffer[:, :, end:] = copy[:, :, :end], 0
        self.lengths, self.first = list(other.lengths), list(other.first)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that moves: tensors (the places in use), and values that JSON holds exactly."""
        end, tensors = self.length, dict[str, Tensor]()
        for layer, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            tensors |= {f"keys.{layer}": k[:, :, :end], f"values.{layer}": v[:, :, :end]}
        return tensors, {"lengths": list(self.lengths)} | ({"first": list(self.first)} if any(self.first) else {})

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Takes over, bit for bit, what `state_dict` gave."""
        end = max(meta["lengths"])
        self.reserve(end)
        for name, buffers in (("keys", self.keys), ("values", self.values)):
            for layer, buffer in enumerate(buffers):
                buffer[:, :, :end], buffer[:, :, end:] = tensors[f"{name}.{layer}"], 0
        self.lengths = list(meta["lengths"])
        self.first = list(meta.get("first", [0] * len(self.lengths)))


def _longer(buffer: Tensor, places: int) -> Tensor:
    """A copy with room for so many places, and scratch behind them."""
    new = buffer.new_zeros(*buffer.shape[:2], places + 1, buffer.shape[3])
    new[:, :, : buffer.shape[2] - 1] = buffer[:, :, :-1]
    return new
