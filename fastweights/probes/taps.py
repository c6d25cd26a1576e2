"""Taps: edits act, and captures look, while a pass runs in their own thread.

A pass asks for its tap (`Taps.over`), which hooks the modules where the named sites lie, for that pass alone: so a
module may be swapped between two passes, and no hook outlives one. What lies inside a module, that module shows its
tap itself, see `Binding.tap`.

Shape suffixes: B rows of the reading, R rows of this pass (or those that an edit acts in), T tokens of this pass, H
heads, K key/value heads, E head width, S keys, D model width, O out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..cache import Positions
from ..model import Llama
from ..watch import ThreadHook
from .changes import At
from .edits import Edit
from .places import Reading
from .sites import TABLE, Site


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a pass, and what it reads of the reading.

    row_R: [R] int64 on the CPU, the row of the reading. column: the only one that it reads; None: all.
    alternative_R: the alternative of a sweep that each row belongs to, −1 = none; None: there is no sweep.
    """

    reading: Reading
    row_R: Tensor
    device: torch.device
    column: int | None = None
    alternative_R: Tensor | None = None

    @property
    def columns(self) -> slice:
        """The columns of the reading that the pass reads."""
        return slice(None) if self.column is None else slice(self.column, self.column + 1)


class Acting:
    """An edit in one pass: the rows in which it acts, and the tokens that it may change."""

    def __init__(self, chosen_BT: Tensor, rows: Rows, alternative: int | None):
        chosen_RT = chosen_BT[rows.row_R][:, rows.columns]
        acts_R = chosen_RT.any(1)
        if alternative is not None:
            assert rows.alternative_R is not None
            acts_R = acts_R & (rows.alternative_R == alternative)
        self.any = bool(acts_R.any())
        self.every = bool(acts_R.all())
        if not self.any:
            return
        row_R = rows.row_R[acts_R]
        self.chosen_RT = chosen_RT[acts_R]
        self.all_chosen = bool(self.chosen_RT.all())
        position_RT = rows.reading.position_BT[row_R][:, rows.columns]
        ids_RT = rows.reading.ids_BT[row_R][:, rows.columns]
        pairs = zip(row_R.tolist(), position_RT, self.chosen_RT, strict=True)
        self.fired = [(row, set(position_T[chosen_T].tolist())) for row, position_T, chosen_T in pairs]
        device = rows.device
        self.index_R = acts_R.nonzero()[:, 0].to(device)
        self.chosen_RT = self.chosen_RT.to(device)
        self.row_R, self.position_RT, self.ids_RT = row_R.to(device), position_RT.to(device), ids_RT.to(device)


class Bound:
    """An edit of one model, checked against it; `fired` tells where it has acted: {row: positions}."""

    def __init__(self, edit: Edit, alternative: int | None = None):
        self.edit, self.alternative = edit, alternative
        self.fired: dict[int, set[int]] = {}
        self.reading: Reading | None = None
        self.chosen_BT = torch.zeros(0, 0, dtype=torch.bool, device="cpu")
        self.rows: Rows | None = None
        self.acting: Acting | None = None

    @property
    def site(self) -> Site:
        """The site that it changes."""
        return self.edit.places.site

    def lies_in(self, layer: int | None) -> bool:
        """Whether it changes its site in this layer."""
        return self.edit.places.layers is None or layer in self.edit.places.layers

    def begin(self, reading: Reading) -> None:
        """Refuses tokens that the edit cannot be made on, and works out which of them it changes."""
        if reading is not self.reading:
            self.edit.check_reading(reading)
            self.chosen_BT, self.reading = self.edit.places.chosen(reading), reading

    def in_rows(self, rows: Rows) -> Acting:
        """Where it acts in this pass."""
        if rows is not self.rows or self.acting is None:
            self.begin(rows.reading)
            self.rows, self.acting = rows, Acting(self.chosen_BT, rows, self.alternative)
        return self.acting

    def apply(self, own: Tensor, layer: int | None, rows: Rows, column_RT: Tensor | None) -> Tensor:
        """The site after this edit: `own`, changed in place.

        column_RT: [R, T′], which tokens of the pass `own` holds; None: all.
        """
        acting = self.in_rows(rows)
        if not acting.any:
            return own
        chosen_RT, position_RT, ids_RT = acting.chosen_RT, acting.position_RT, acting.ids_RT
        all_chosen = acting.all_chosen
        if column_RT is not None:
            kept_RT = column_RT[acting.index_R]
            chosen_RT, position_RT, ids_RT = (t.gather(1, kept_RT) for t in (chosen_RT, position_RT, ids_RT))
            all_chosen = bool(chosen_RT.all())
        x = own.clone() if acting.every else own[acting.index_R]
        at = At(self.site.name, layer, acting.row_R, position_RT, ids_RT)
        y = self.edit.change(x if acting.every else x.clone(), at)
        kept = own if acting.every else x
        y = self._merged(kept, y, chosen_RT, all_chosen)
        for row, positions in acting.fired:
            self.fired.setdefault(row, set()).update(positions)
        if acting.every:
            return own.copy_(y)  # y may be the caller's own tensor, or a row that is repeated
        own[acting.index_R] = y
        return own

    def _merged(self, x: Tensor, y: Any, chosen_RT: Tensor, all_chosen: bool) -> Tensor:
        """The chosen places of y, the rest of x."""
        places = self.edit.places
        if not isinstance(y, Tensor) or y.shape != x.shape:
            found = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"the change of {self.site.name!r} got shape {list(x.shape)} and returned {found}")
        y = y.to(x)
        if all_chosen and places.heads is None and places.units is None:
            return y
        head_axis = 1 if self.site.square else 2
        shape = [len(x), *[1] * (x.dim() - 1)]
        shape[2 if self.site.square else 1] = chosen_RT.shape[1]
        mask = chosen_RT.view(shape)
        for numbers, axis in ((places.heads, head_axis), (places.units, x.dim() - 1)):
            if numbers is not None:
                there = torch.zeros(x.shape[axis], dtype=torch.bool, device=x.device)
                there[list(numbers)] = True
                mask = mask & there.view([-1 if n == axis else 1 for n in range(x.dim())])
        return torch.where(mask, y, x)


class Look(Protocol):
    """What looks at sites, after the edits."""

    gradient: bool  # whether what it sees must be part of a graph

    def points(self, model: Llama) -> Iterable[tuple[Site, int | None]]:
        """The sites that it looks at, and their layers."""

    def see(self, site: Site, layer: int | None, x: Tensor, rows: Rows, column_RT: Tensor | None) -> None:
        """Looks at [R, T′, …]; column_RT [R, T′] tells which tokens of the pass these are, None: all. It copies."""

    def passes_seen(self) -> int:
        """How many passes it has seen."""
        return 0

    def forget(self, after: int) -> None:
        """Forgets the passes after so many: they failed, or are run again."""
        return None


class Taps:
    """The edits and looks of one `with` block, or of several together, in the order in which they began.

    reading: the tokens that a feed or probe has begun to read; None: each call of the model is a reading of its own.
    column: which of them the pass reads that runs now; None: all.
    """

    def __init__(self, edits: Sequence[Bound] = (), looks: Sequence[Look] = (), reading: Reading | None = None):
        self.edits, self.looks, self.reading = list(edits), list(looks), reading
        self.column: int | None = None

    @staticmethod
    def together(parts: Sequence[Taps]) -> Taps:
        """All of them; the reading is that of the one that began last."""
        whole = Taps([edit for part in parts for edit in part.edits], [look for part in parts for look in part.looks])
        for part in parts:
            if part.reading is not None:
                whole.reading, whole.column = part.reading, part.column
        return whole

    def plastic(self, model: Llama) -> bool:
        """Whether one of them names what a plastic linear reads or writes."""
        seen = (site for look in self.looks for site, _ in look.points(model))
        return any(site.side == "plastic" for site in (*(bound.site for bound in self.edits), *seen))

    def begin(self, reading: Reading) -> None:
        """Refuses tokens that one of the edits cannot be made on."""
        for bound in self.edits:
            bound.begin(reading)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Forgets what was seen inside if that fails."""
        seen = [(look, look.passes_seen()) for look in self.looks]
        try:
            yield
        except BaseException:
            for look, number in seen:
                look.forget(number)
            raise

    @staticmethod
    @contextlib.contextmanager
    def over(parts: Sequence[Taps], model: Llama, ids_BT: Tensor, positions: Positions, last: bool) -> Iterator[None]:
        """Lets all these taps edit, and look at, the one pass that runs inside.

        last: the model's head gets the last real token of each row alone.
        """
        whole = Taps.together(parts)
        reading = whole.reading or Reading.of(ids_BT, positions)
        whole.begin(reading)
        tap = Tap(model, whole, Rows(reading, torch.arange(len(ids_BT), device="cpu"), model.device, whole.column))
        if last and whole.column is None:
            tap.columns["logits"] = reading.last_B[:, None].to(model.device)
        with whole.attempt(), tap.hooked():
            yield


class Tap:
    """The taps of one pass.

    rows: which rows run now; a sweep changes them as its alternatives join.
    columns: of a site that holds some tokens of the pass alone, which: [R, T′].
    """

    def __init__(self, model: Llama, taps: Taps, rows: Rows):
        self.model, self.rows = model, rows
        self.columns: dict[str, Tensor] = {}
        self.edits: dict[tuple[str, int | None], list[Bound]] = {}
        self.looks: dict[tuple[str, int | None], list[Look]] = {}
        depth = range(len(model.model.layers))
        for bound in taps.edits:
            for layer in depth if bound.site.layered else (None,):
                if layer is None or bound.lies_in(layer):
                    self.edits.setdefault((bound.site.name, layer), []).append(bound)
        for look in taps.looks:
            for site, layer in look.points(model):
                self.looks.setdefault((site.name, layer), []).append(look)

    def wants(self, *sites: str, layer: int) -> bool:
        """Whether one of these sites is named in this layer."""
        return any((site, layer) in self.edits or (site, layer) in self.looks for site in sites)

    def __call__(
        self, site: str, layer: int | None, x: Tensor, visible: Tensor | None = None, fill: float = 0.0
    ) -> Tensor:
        """The site as it flows on: x itself where nothing changes it; what is not visible holds `fill` again."""
        column_RT = self.columns.get(site)
        acting = [bound for bound in self.edits.get((site, layer), ()) if bound.in_rows(self.rows).any]
        if acting:
            own = x.clone()
            with self.model.binding.untapped():
                for bound in acting:
                    own = bound.apply(own, layer, self.rows, column_RT)
            x = own if visible is None else own.masked_fill(~visible, fill)
        for look in self.looks.get((site, layer), ()):
            if look.gradient and not x.requires_grad:
                x.requires_grad_()
            look.see(TABLE[site], layer, x, self.rows, column_RT)
        return x

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks the modules at which sites lie, in this thread alone; the hooks go whatever happens."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.model.binding.tapping(self))
            # inner sites first: a module's output comes after what is made of it inside
            named = {*self.edits, *self.looks}
            for site in TABLE.values():
                for layer in (layer for name, layer in named if name == site.name):
                    hook = self._hook(site, layer)
                    if hook is not None:
                        stack.callback(hook.remove)
            yield

    def _hook(self, site: Site, layer: int | None) -> RemovableHandle | None:
        path, side = site.place(self.model.config.family)
        if side in ("inside", "plastic"):
            return None  # the modules show it themselves
        home = self.model if layer is None else self.model.model.layers[layer]
        module = functools.reduce(getattr, filter(None, path.split(".")), home)
        heads = site.axes[-1] == "E"
        split = self.model.config.head_dim

        def through(x: Tensor) -> Tensor:
            if not heads:
                return self(site.name, layer, x)
            x_BTHE = x.unflatten(-1, (-1, split))
            y_BTHE = self(site.name, layer, x_BTHE)
            return x if y_BTHE is x_BTHE and not y_BTHE.requires_grad else y_BTHE.flatten(2)

        def before(_module: nn.Module, args: tuple) -> tuple | None:
            y = through(args[0])
            return (y, *args[1:])

        def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return self._result(layer, module, args[0], output) if site.name == "result" else through(output)

        binding = self.model.binding
        if side == "input":
            return module.register_forward_pre_hook(ThreadHook(before, lambda: binding.tap is self))
        return module.register_forward_hook(ThreadHook(after, lambda: binding.tap is self))

    def _result(self, layer: int | None, o_proj: Any, z_BTM: Tensor, output_BTD: Tensor) -> Tensor:
        """What o_proj gives, with what each head adds to it edited."""
        z_BTHE = z_BTM.unflatten(-1, (-1, self.model.config.head_dim))
        if not isinstance(getattr(o_proj, "weight", None), Tensor):
            raise ValueError(
                f"site 'result' needs the weight of o_proj, but layer {layer} has a {type(o_proj).__name__}"
            )
        W_DHE = o_proj.weight.unflatten(1, z_BTHE.shape[2:])
        result_BTHD = torch.einsum("bthe,dhe->bthd", z_BTHE, W_DHE)
        edited_BTHD = self("result", layer, result_BTHD)
        if any(look.gradient for look in self.looks.get(("result", layer), ())):  # its gradient is that of the sum
            return output_BTD.detach() + (edited_BTHD - result_BTHD.detach()).sum(2)
        if edited_BTHD is result_BTHD:
            return output_BTD
        return output_BTD + (edited_BTHD - result_BTHD).sum(2)

    # ---- inside attention

    def projected(self, layer: int, every: list[Tensor]) -> list[Tensor]:
        """q, k and v [B, T, heads E] that one linear gives together, edited."""
        E = self.model.config.head_dim
        return [
            self(site, layer, x.unflatten(-1, (-1, E))).flatten(2) if self.wants(site, layer=layer) else x
            for site, x in zip("qkv", every, strict=True)
        ]

    def rotated(self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys after rope, edited."""
        q, k = (
            self(site, layer, x.transpose(1, 2)).transpose(1, 2) if self.wants(site, layer=layer) else x
            for site, x in (("q_rot", q_BHTE), ("k_rot", k_BKTE))
        )
        return q, k

    def attention(
        self,
        layer: int,
        q_BHTE: Tensor,
        k_BKSE: Tensor,
        v_BKSE: Tensor,
        visible: Tensor | None,
        scale: float,
        cap: float | None,
    ) -> Tensor | None:
        """z [B, T, H, E] by way of scores and pattern; None where nobody named them in this layer."""
        if not self.wants("scores", "pattern", layer=layer):
            return None
        times = q_BHTE.shape[1] // k_BKSE.shape[1]
        k_BHSE, v_BHSE = (x.repeat_interleave(times, 1) for x in (k_BKSE, v_BKSE))
        T, S = q_BHTE.shape[2], k_BHSE.shape[2]
        if visible is None:
            visible = torch.ones(T, S, dtype=torch.bool, device=q_BHTE.device).tril(S - T)
        scores = q_BHTE @ k_BHSE.transpose(2, 3) * scale
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(~visible, -torch.inf)
        # masked again: an edit must not let a token look at what it may not see
        scores = self("scores", layer, scores, visible, -torch.inf)
        wide = torch.promote_types(scores.dtype, torch.float32)
        pattern = self("pattern", layer, scores.softmax(-1, dtype=wide).to(scores.dtype), visible)
        return (pattern @ v_BHSE).transpose(1, 2)
