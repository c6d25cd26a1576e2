"""Random programs over an episode: after every step it equals one naive oracle per row.

A program is a list of operations: feed, generate, snapshot, restore, fork, undo, probe, save and load, reset. The
oracle keeps a dense ΔW and its whole past; a bounded log is said densely as well, as the sum over the last events
("evict") or as a truncated SVD at the events where a fold is due ("compress").
"""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import LINEARS, FastLinear
from tiny import CONFIG, oracle_of, tiny

import fastweights as fw

LAYERS = 3
MODEL = tiny(num_hidden_layers=LAYERS)
WIDTH = {"gate_proj": 52, "up_proj": 52, "down_proj": 24}
TOLERANCE = 1e-8  # of the largest number in a tensor, or of 1

program_settings = settings(deadline=None, derandomize=True, database=None, print_blob=False)


# ---- the oracle's side


class Remembered(FastLinear):
    """The oracle's linear with the past of its ΔW, and with the policy of a bounded log."""

    def __init__(self, plain, linear):
        super().__init__(plain.W, plain.b, plain.plastic, plain.has_silu)
        self.overflow, self.rank, self.archive = linear.overflow, linear.rank, linear.archive
        self.scales = []  # the bias key of every event
        self.held = [(self.dW, self.db)]  # as it was read after 0, 1, … events
        self.folds = [0]  # event counts at which it was folded

    @property
    def count(self):
        return len(self.values)

    def write(self, h, u):
        super().write(h, u)
        self.scales = [*self.scales, 1.0 if self.plastic.mu is None else 1 / (float(h @ h) + self.plastic.mu)]
        if self.overflow == "evict":
            self.dW, self.db = self.total(self.count)
        if self.overflow == "compress":
            self.fold()
        self.held = [*self.held, (self.dW, self.db)]

    def fold(self):
        block, kept = max(8, self.rank // 2), min(self.rank, len(self.W), self.W.shape[1] + 1)
        due = self.rank + block if len(self.folds) == 1 else self.folds[-1] + self.rank + block - kept
        if self.count != due:
            return
        U, S, Vh = torch.linalg.svd(torch.cat([self.dW, self.db[:, None]], dim=1), full_matrices=False)
        # two singular values that agree make the best approximation arbitrary
        assume(float(S[kept - 1] - S[kept]) > 1e-5 * float(S[0]) or float(S[kept - 1]) < 1e-13 * float(S[0]))
        best = (U[:, :kept] * S[:kept]) @ Vh[:kept]
        self.dW, self.db = best[:, :-1], best[:, -1]
        self.folds = [*self.folds, due]

    def event(self, j, n):
        """What event j (from 1) is after n events: (ΔW, Δb)."""
        weight = (1 - self.plastic.decay) ** (n - j)
        bias = weight * self.scales[j - 1] * self.values[j - 1] if self.plastic.bias else torch.zeros_like(self.db)
        return weight * torch.outer(self.values[j - 1], self.keys[j - 1]), bias

    def total(self, n):
        """The sum of the first n events, or of the last `rank` of them."""
        first = max(0, n - self.rank) if self.overflow == "evict" else 0
        parts = [self.event(j, n) for j in range(first + 1, n + 1)]
        dW, db = (sum(part) for part in zip(*parts, strict=True)) if parts else (0, 0)
        return dW + torch.zeros_like(self.W), db + torch.zeros_like(self.b)

    def moment(self, n, without=None):
        """(ΔW, Δb) as a probe sees it after n events; an archive knows nothing of folds."""
        dW, db = self.held[n] if self.overflow == "compress" and not self.archive else self.total(n)
        gone = self.overflow == "evict" and without is not None and without <= n - self.rank
        if without is not None and without <= n and not gone:
            lost = self.event(without, n)
            dW, db = dW - lost[0], db - lost[1]
        return dW, db

    def oldest_moment(self):
        if self.archive or self.overflow in ("grow", "error"):
            return 0
        return (self.count if self.count > self.rank else 0) if self.overflow == "evict" else self.folds[-1]

    def oldest_event(self):
        if self.archive or self.overflow in ("grow", "error"):
            return 0
        return max(0, self.count - self.rank) if self.overflow == "evict" else self.folds[-1]

    def undo(self, events):
        n = self.count - events
        self.held, self.folds = self.held[: n + 1], [fold for fold in self.folds if fold <= n]
        self.keys, self.values, self.scales = self.keys[:n], self.values[:n], self.scales[:n]
        self.dW, self.db = self.held[-1]


def oracle_row(handles):
    row = oracle_of(MODEL, handles, {**CONFIG, "num_hidden_layers": LAYERS})
    linears = {site: linear for handle in handles for site, linear in handle.linears.items()}
    row.fast = {site: Remembered(plain, linears[site]) for site, plain in row.fast.items()}
    row.logits = None  # of the last token
    row.undone = False  # since the last token
    return row


def close(ours, theirs):
    theirs = theirs.to(ours.dtype)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * (1 + float(theirs.abs().max())))


# ---- the program


def random(seed):
    return torch.Generator().manual_seed(seed)


def draw_tokens(seed, rows, width, repeated):
    """Ids [B, T]; `repeated`: of three tokens only, so that keys come back."""
    return torch.randint(20, 23, (rows, width), generator=random(seed)) if repeated else torch.randint(
        CONFIG["vocab_size"], (rows, width), generator=random(seed)
    )  # fmt: skip


def draw_mask(seed, kind, rows, width):
    """Bool [B, T] with at least one token; a row may be all padding."""
    mask = torch.ones(rows, width, dtype=torch.bool)
    if kind == "random":
        mask = torch.rand(rows, width, generator=random(seed)) < 0.6
    else:
        for row, cut in enumerate(torch.randint(0, width + 1, (rows,), generator=random(seed)).tolist()):
            if kind == "left":
                mask[row, :cut] = False
            elif kind == "right":
                mask[row, cut:] = False
            elif kind == "inside":
                mask[row, cut // 2 : cut] = False
    if not mask.any():
        mask[seed % rows, seed % width] = True
    return mask


def draw_update(kind, seed, rows, width, length):
    """(what `update=` is given, what it means: (row, column or None if generated, position, token) → bool)."""
    if kind == "positions":
        upto = length + width + 4
        chosen = (torch.rand(upto, generator=random(seed)) < 0.5).nonzero()[:, 0].tolist()
        return chosen, lambda b, t, position, token: position in chosen
    if kind == "mask":
        mask = torch.rand(rows, width, generator=random(seed)) < 0.6
        return mask, lambda b, t, position, token: t is not None and bool(mask[b, t])
    if kind == "callable":
        return (lambda position, token: (position + token) % 3 > 0), lambda b, t, p, token: (p + token) % 3 > 0
    if kind == "token_ids":
        return fw.token_ids(range(15, 45)), lambda b, t, position, token: 15 <= token < 45
    means = {"all": (True, True), "none": (False, False), "prompt": (True, False), "generated": (False, True)}[kind]
    return kind, lambda b, t, position, token: means[t is None]


class Machine:
    """The episode, its oracles, and what was put aside on the way."""

    def __init__(self, handles, rows, max_length):
        self.episode, self.max_length = fw.Episode(MODEL, rows, max_length), max_length
        self.fresh = oracle_row(handles)
        self.rows = [self.fresh.fork() for _ in range(rows)]
        self.snapshots, self.others = [], []

    def run(self, program):
        for name, arguments in program:
            getattr(self, name)(**arguments)
            self.check(self.episode, self.rows)
        for episode, rows in self.others:
            self.check(episode, rows)
        for snapshot, rows in self.snapshots:
            episode = fw.Episode(MODEL, len(rows))
            episode.restore(snapshot)
            self.check(episode, rows)

    def check(self, episode, rows):
        assert episode.lengths == [row.length for row in rows]
        assert episode.event_counts == {site: [row.fast[site].count for row in rows] for site in episode.logs}
        assert episode.length == max(row.length for row in rows)
        assert episode.events == max(fast.count for row in rows for fast in row.fast.values())
        for b, row in enumerate(rows):
            for site, fast in row.fast.items():
                log = episode.logs[site]
                close(episode.delta_weight(*site, b), fast.dW)
                close(log.delta_bias(b), fast.db)
                error_2, error_F = log.certificate(b)
                lost = torch.cat([fast.total(fast.count)[0] - log.delta_weight(b)], dim=1)
                slack = 1e-12 * (1 + float(fast.dW.abs().max())) if fast.folds == [0] else 0
                if log.archive is not None:
                    archived = log.archive.U_BRO[b].T * log.archive._weigh(log.archive.birth_BR[b], fast.count, F64)
                    close((archived @ log.archive.K_BRI[b]) if log.overflow == "compress" else lost * 0, lost * 0 + (fast.total(fast.count)[0] if log.overflow == "compress" else 0))
            for layer in range(LAYERS if row.length else 0):
                for buffers, kept in ((episode.cache.keys, row.cache_k), (episode.cache.values, row.cache_v)):
                    close(buffers[layer][b, :, : row.length].transpose(0, 1), torch.stack(kept[layer]))
