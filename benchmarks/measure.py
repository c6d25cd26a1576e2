"""Checking, timing in alternation, the ceilings of a device, and what a pass reads and computes by count."""

from __future__ import annotations

import ctypes
import math
import os
import statistics
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastweights.config import LlamaConfig
from fastweights.kernels.linear import product

QUIET = 0.1  # share of the CPU that other processes may take during a sample that counts


class Wrong(Exception):
    """What was to be timed does not compute what its reference computes."""


class Unavailable(Exception):
    """This case cannot run here, and why."""


@dataclass(frozen=True)
class Check:
    """got() and want() agree to `tolerance`, relative to the largest entry of want(), or nothing is timed."""

    name: str
    got: Callable[[], torch.Tensor]
    want: Callable[[], torch.Tensor]
    tolerance: float

    def error(self) -> float:
        got, want = self.got().detach().double().cpu(), self.want().detach().double().cpu()
        if got.shape != want.shape:
            raise Wrong(f"{self.name}: shape {list(got.shape)}, the reference has {list(want.shape)}")
        error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
        if not error <= self.tolerance:  # NaN is wrong too
            raise Wrong(f"{self.name}: relative error {error:.2g} against its reference, at most {self.tolerance:.2g}")
        return error


@dataclass(frozen=True)
class Trial:
    """One thing to time. `prepare` runs before each `run`, outside the clock.

    units: what one run does so many of (tokens, runs), and the time is divided by; bytes and flops are per unit.
    """

    name: str
    run: Callable[[], Any]
    units: int = 1
    prepare: Callable[[], Any] = lambda: None
    bytes: int = 0
    flops: int = 0
    memory: bool = False  # whether to say what one run holds at most


@dataclass(frozen=True)
class Experiment:
    """What a case builds: checks first, then trials in alternation, then ratios of their times.

    ratios: (over, under), or (over, under, n): over ÷ under ÷ n.
    times: from the seconds per unit of every round, other times in seconds → their spread.
    """

    trials: list[Trial]
    checks: list[Check]
    ratios: Sequence[tuple[str, str] | tuple[str, str, int]]
    context: dict[str, Any] = field(default_factory=dict)  # what the numbers hold for
    ceiling: str = "stream"  # or "matmul": which ceiling runs in alternation with the trials
    bars: dict[str, str] = field(default_factory=dict)  # "a ÷ b" → "≤ 1.05"
    times: Callable[[list[dict[str, float]]], dict[str, dict[str, float]]] = lambda rounds: {}


# ---- timing


def _cpu_seconds() -> tuple[float, float]:
    """(seconds all CPUs of this machine were busy, or nan where that is not told; seconds of this process)."""
    own = os.times()
    try:
        with open("/proc/stat") as file:
            user, nice, system, _idle, _wait, irq, soft, steal = map(int, file.readline().split()[1:9])
    except OSError:
        return float("nan"), sum(own[:4])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK"), sum(own[:4])


@dataclass(frozen=True)
class Sample:
    seconds: float  # per unit
    others: float  # share of this machine's CPU time that went to other processes meanwhile


def sample(trial: Trial, device: torch.device, seconds: float = 0.25) -> Sample:
    """Runs a trial for at least `seconds` on the clock; preparation is off it."""
    timed, runs = 0.0, 0
    busy, own = _cpu_seconds()
    begin = time.perf_counter()
    while runs == 0 or timed < seconds:
        trial.prepare()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        trial.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        timed += time.perf_counter() - start
        runs += 1
    wall = time.perf_counter() - begin
    busy_after, own_after = _cpu_seconds()
    others = (busy_after - busy - (own_after - own)) / (wall * (os.cpu_count() or 1))
    return Sample(timed / runs / trial.units, max(others, 0.0) if others == others else 0.0)


class Patience:
    """Takes samples again while others disturb them, until `seconds` have gone into that in all."""

    def __init__(self, seconds: float, progress: Callable[[str], None] = lambda text: None):
        self.seconds, self.progress = seconds, progress

    def sample(self, trial: Trial, device: torch.device, seconds: float) -> Sample:
        """The first quiet sample, or the least disturbed one."""
        best = sample(trial, device, seconds)
        while best.others > QUIET and self.seconds > 0:
            self.progress(f"{trial.name}: disturbed, again ({self.seconds:.0f} s left for that)")
            begin = time.perf_counter()
            time.sleep(0.2)
            best = min(best, sample(trial, device, seconds), key=lambda taken: taken.others)
            self.seconds -= time.perf_counter() - begin
        return best


def alternate(
    trials: Sequence[Trial], device: torch.device, repeats: int, seconds: float, patience: Patience
) -> tuple[list[dict[str, float]], float]:
    """`repeats` rounds of all trials, A B A B, every other round backwards; (seconds per unit by name, noise).

    Rounds that stay disturbed are dropped where there are quiet ones. Noise is the largest share of the CPU that
    others had in a round that counts.
    """
    for trial in trials:
        trial.prepare()
        trial.run()  # warm
    rounds: list[tuple[float, dict[str, float]]] = []
    for number in range(repeats):
        taken: dict[str, Sample] = {}
        for trial in trials if number % 2 == 0 else trials[::-1]:
            patience.progress(f"{trial.name}: round {number + 1} of {repeats}")
            taken[trial.name] = patience.sample(trial, device, seconds)
        rounds.append((max(s.others for s in taken.values()), {name: s.seconds for name, s in taken.items()}))
    calm = [r for r in rounds if r[0] <= QUIET] or rounds
    return [seconds for _, seconds in calm], max(noise for noise, _ in calm)


def ratio(rounds: list[dict[str, float]], over: str, under: str, *parts: int) -> dict[str, float]:
    return spread([r[over] / r[under] / math.prod(parts) for r in rounds])


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# ---- memory


def peak_bytes(trial: Trial, device: torch.device) -> int | None:
    """Memory above the resting level at the highest point of one run; None where the system does not tell."""
    trial.prepare()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        rest = torch.cuda.memory_allocated(device)
        trial.run()
        return torch.cuda.max_memory_allocated(device) - rest
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc holds back would hide as much of the peak
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
        rest = _resident("VmRSS")
    except (OSError, AttributeError):
        return None
    trial.run()
    return max(_resident("VmHWM") - rest, 0)


def _resident(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


# ---- ceilings


class Ceiling:
    """The measured limits of a device: a read-only stream and a large matmul. As trials, to run beside others."""

    def __init__(self, device: torch.device, dtype: torch.dtype, megabytes: int | None = None, size: int | None = None):
        cuda = device.type == "cuda"
        self.device, self.dtype = device, dtype
        # far larger than any last-level cache that CPUs of today share, and than an H100's 50 MB
        megabytes = megabytes or (4096 if cuda else 512)
        # torch's float16 product on a CPU without AMX runs at 0.4 GFLOP/s: 2048³ would take a minute
        size = size or (8192 if cuda else 256 if dtype == torch.float16 else 2048)
        self._buffer = torch.randn(megabytes * 250_000, device=device)
        self._a = torch.randn(size, size, device=device).to(dtype)
        self._stream: Callable[[], Any] = self._buffer.sum
        if cuda:  # reads faster than torch's sum
            from .stream import read

            partial_sums = read(self._buffer)
            if not torch.allclose(partial_sums.sum(), self._buffer.sum(), rtol=1e-3, atol=1e-3 * megabytes**0.5 * 500):
                raise Wrong("the read-only kernel does not add up what it reads")
            self._stream = lambda: read(self._buffer, partial_sums)
        # the best product there is: on some processors torch's own has half the speed of another
        ways = (lambda: self._a @ self._a, lambda: product(self._a, self._a))
        self._matmul = ways[0] if cuda else min(ways, key=lambda way: min(timeit.repeat(way, number=1, repeat=3)))

    def trial(self, kind: str) -> Trial:
        if kind == "stream":
            return Trial("stream", self._stream, bytes=self._buffer.nbytes)
        size = self._a.shape[0]
        return Trial("matmul", self._matmul, flops=2 * size**3)

    def measure(self, repeats: int, patience: Patience) -> dict[str, Any]:
        """GB/s with 1..n threads and GFLOP/s; the best of `repeats` samples each: a ceiling is a maximum."""
        found: dict[str, Any] = {
            "stream_buffer_MB": self._buffer.nbytes // 10**6,
            "matmul_size": self._a.shape[0],
        }
        threads = torch.get_num_threads()
        counts = [threads] if self.device.type == "cuda" else sorted({1, *_powers(threads), threads})
        stream: dict[str, float] = {}
        for count in counts:
            torch.set_num_threads(count)
            best = min(patience.sample(self.trial("stream"), self.device, 0.1).seconds for _ in range(repeats))
            stream[str(count)] = self._buffer.nbytes / best / 1e9
        torch.set_num_threads(threads)
        found["stream_GBps"] = max(stream.values())
        if self.device.type == "cuda":
            torch_sum = Trial("torch.sum", self._buffer.sum)
            best = min(patience.sample(torch_sum, self.device, 0.1).seconds for _ in range(repeats))
            found["sum_GBps"] = self._buffer.nbytes / best / 1e9
        found["stream_GBps_by_threads"] = stream if self.device.type == "cpu" else {}
        best = min(patience.sample(self.trial("matmul"), self.device, 0.1).seconds for _ in range(repeats))
        found["matmul_GFLOPs"] = self.trial("matmul").flops / best / 1e9
        return found


def _powers(limit: int) -> list[int]:
    return [2**n for n in range(limit.bit_length()) if 2**n <= limit]


# ---- counts


def linear_parameters(config: LlamaConfig, layer_only: bool = False) -> int:
    """Weights that take part in a matrix product: the linears of every layer, and the head."""
    D, E, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    layer = D * E * (H + 2 * K) + H * E * D + sum(I * O for I, O in _widths(config, tuple(config.family.linears)))
    return config.num_hidden_layers * layer + (0 if layer_only else config.vocab_size * D)


def decode_bytes(config: LlamaConfig, itemsize: int, context: int) -> int:
    """Bytes one token must read: every weight once (one row of the embedding), and the keys and values."""
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    seen = sum(context if window is None else min(window, context) for window in config.windows)
    kv = 2 * config.num_key_value_heads * config.head_dim * seen
    return itemsize * (linear_parameters(config) + norms + config.hidden_size + kv)


def forward_flops(config: LlamaConfig, tokens: int, context: int = 0, heads: int = 1) -> int:
    """Multiplications and additions of `tokens` new tokens after `context`; `heads` of them need logits.

    Attention is counted over what is visible (causal), 2 products of E per head and visible token.
    """
    visible = tokens * context + tokens * (tokens + 1) // 2
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * visible
    logits = 2 * heads * config.vocab_size * config.hidden_size
    return 2 * tokens * linear_parameters(config, layer_only=True) + attention + logits


def _widths(config: LlamaConfig, linears: Sequence[str]) -> list[tuple[int, int]]:
    """(I, O) of each linear."""
    D, F, roles = config.hidden_size, config.intermediate_size, config.family.linears
    shapes = {"gate_up_proj": (D, 2 * F), "down_proj": (F, D)}
    return [shapes.get(roles[name], (D, F)) for name in linears]


def plastic_decode_bytes(config: LlamaConfig, layers: int, linears: Sequence[str], events: int) -> int:
    """Bytes that fast weights of `events` events add to one token: both float32 factors read, one row written."""
    return 4 * layers * sum((events + 1) * (I + O) for I, O in _widths(config, linears))


def plastic_prefill_flops(config: LlamaConfig, layers: int, linears: Sequence[str], tokens: int) -> int:
    """Work that writing every token of a prompt adds: half a Gram per input, half a T × T product per linear."""
    pairs = tokens * (tokens - 1) // 2
    inputs = {
        "down" if config.family.linears[name] == "down_proj" else "mlp": I
        for name, (I, _) in zip(linears, _widths(config, linears), strict=True)
    }
    return layers * 2 * pairs * (sum(inputs.values()) + sum(O for _, O in _widths(config, linears)))
