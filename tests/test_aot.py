"""Every Triton kernel compiled ahead of time, without a GPU, and what its machine code must look like.

No spills and no local memory; 128-bit weight loads in step; no barrier in the scan's row loop.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastweights.kernels import read, scan, step, values

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
REGISTERS = 168  # 128-thread programs: at least 3 of them, 384 threads, on every SM

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel cannot be compiled"
)


def compiled(kernel, constants, target, num_warps, types=None, odd=()):
    """Machine code as text, and its resources. Pointers and whole numbers divide by 16 unless in `odd`.

    `types` of an argument may be a named tuple of types, None for a field that is None.
    """
    constants, aligned = {(kernel.arg_names.index(k),): v for k, v in constants.items()}, {}

    def signed(name, kind, place):
        if place in constants:
            return "constexpr"
        if hasattr(kind, "_fields"):
            return type(kind)(
                *(signed(f, k, (*place, n)) for n, (f, k) in enumerate(zip(kind._fields, kind, strict=True)))
            )
        if kind is None:
            constants[place] = None
            return "constexpr"
        if kind != "fp32" and name not in odd:
            aligned[place] = [["tt.divisibility", 16]]
        return kind

    def guess(name):
        return "*fp32" if name.endswith("_ptr") else "fp32" if name in ("clip", "mu") else "i32"

    names = kernel.arg_names
    signature = {name: signed(name, (types or {}).get(name, guess(name)), (n,)) for n, name in enumerate(names)}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": num_warps, **values.FUSED})


def cuda_listing(binary, tmp_path):
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump*"))
    (tmp_path / "kernel.cubin").write_bytes(binary.asm["cubin"])

    def run(flag):
        command = [tool, flag, tmp_path / "kernel.cubin"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return run("-res-usage"), run("--dump-sass")


def check_resources(binary, target, tmp_path):
    """Fails on spills, local memory or too many registers; returns the listing."""
    if target == "gfx942":
        listing = binary.asm["amdgcn"]
        used = {k: int(v) for k, v in re.findall(r"\.(\w+(?:_count|_size)):\s+(\d+)", listing)}
        assert used["vgpr_spill_count"] == used["sgpr_spill_count"] == used["private_segment_fixed_size"] == 0
        registers = used["vgpr_count"]
    else:
        usage, listing = cuda_listing(binary, tmp_path)
        assert "STACK:0" in usage, usage
        assert not re.search(r"\b(LDL|STL)\b", listing)
        registers = int(re.search(r"REG:(\d+)", usage).group(1))
    print(f"\n{binary.metadata.name} {target}: {registers} registers, {binary.metadata.shared} bytes shared")
    assert registers <= REGISTERS
    return listing


def innermost_loops(listing):
    """The instructions of every innermost loop, found by its backward branch."""
    lines, at, spans = listing.splitlines(), {}, []
    label = r"\s*(\.?LBB\w+):" if "s_endpgm" in listing else r"\s*/\*([0-9a-f]{4,})\*/\s+\S"
    branch = r"s_c?branch\w*\s+(\.?LBB\w+)" if "s_endpgm" in listing else r"\bBRA\b.*?0x([0-9a-f]+)"
    key = str if "s_endpgm" in listing else lambda text: int(text, 16)
    for i, line in enumerate(lines):
        if found := re.match(label, line):
            at[key(found.group(1))] = i
    for i, line in enumerate(lines):
        if (found := re.search(branch, line)) and at.get(key(found.group(1)), i) < i:
            spans.append((at[key(found.group(1))], i))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return ["\n".join(lines[start : end + 1]) for start, end in inner]


def scan_constants(rule, precision):
    known = values.KERNELS[rule]
    return {
        "RULE": known.value,
        "PHI": "silu",
        "FROZEN": known.reads_frozen,
        "TARGET": known.reads_target,
        "CLIP": True,
        "ALL": False,
        **{size: scan.BLOCK[size] for size in ("BN", "BK", "C")},
        "PRECISION": precision,
    }


WORD = "*fp32"
TOKEN = step._Token(event="*i64", slot="*i64", w=WORD, write="*u8", norm=WORD)


def step_linear(gemv, bias):
    """The types of a bfloat16 linear without bias, in a rule without a target."""
    factors = {"U": WORD, "K": WORD, "bias": WORD if bias else None, "birth": "*i64"}
    strides = dict.fromkeys(("U_sb", "K_sb", "bias_sb", "birth_sb", "target_sb"), "i32")
    frozen = {"W": "*bf16", "b": None, "product": None if gemv else "*bf16"}
    return step._Linear(**frozen, **factors, rate=WORD, gamma=WORD, target=None, bad="*i32", c=WORD, **strides)


ODD = ("T", "t1", "R", "rows", "write_sb", "norm_sb", "rate_sb", "gamma_sb", "bias_sb", "birth_sb", "w_sb", "w_st")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("rule", ["ones", "slow_derivative"])
def test_scan(rule, precision, target, tmp_path):
    """A thread goes through the tokens of a chunk by itself: between its exponentials no thread waits for another."""
    constants = scan_constants(rule, precision)
    types = {"written_ptr": "*u8", "y_ptr": "*bf16", "frozen_ptr": "*bf16"}
    binary = compiled(scan._block, constants, target, 1, types, ODD)
    lines = check_resources(binary, target, tmp_path).splitlines()
    exponentials = [n for n, line in enumerate(lines) if re.search(r"MUFU\.EX2|v_exp_f32", line)]
    assert len(exponentials) == constants["C"]
    tokens = "\n".join(lines[exponentials[0] : exponentials[-1] + 1])
    assert not re.search(r"BAR\.SYNC|s_barrier|SHFL|_dpp|ds_bpermute|\bSTS\b|\bLDS\b|ds_write|ds_read", tokens)


@pytest.mark.parametrize("target", TARGETS)
def test_scan_by_a_target(target, tmp_path):
    binary = compiled(scan._block, scan_constants("delta", "tf32"), target, 1, {"written_ptr": "*u8"}, ODD)
    check_resources(binary, target, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_scan_of_earlier_blocks(precision, target, tmp_path):
    tile = {size: scan.PRODUCT[precision][size] for size in ("BM", "BN", "BK")} | {"PRECISION": precision}
    types = {"start_ptr": "*bf16"}
    binary = compiled(scan._earlier, tile, target, scan.PRODUCT[precision]["num_warps"], types, ("T", "t1"))
    listing = check_resources(binary, target, tmp_path)
    if precision == "tf32":  # on the tensor cores
        assert re.search(r"\bH[G]?MMA\b.*TF32|v_mfma_f32_\w+xf32", listing)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("gemv", [True, False])
@pytest.mark.parametrize("kernel", ["single", "gated"])
def test_step(kernel, gemv, target, tmp_path):
    constants = {"RULE": values.KERNELS["derivative"].value, "BR": 32}
    constants |= {"BN": 2, "BK": 2048} if gemv else {"BN": 64, "BK": 16}
    linear = step_linear(gemv, bias=False)
    types = {"h_ptr": "*bf16", "token": TOKEN, "out_ptr": "*bf16"}
    if kernel == "single":
        jitted, constants, types = step._single, constants | {"PHI": "silu"}, types | {"linear": linear}
    else:
        jitted, types = step._gated, types | {"gate": linear, "up": linear}
    binary = compiled(jitted, constants, target, 4 if gemv else 2, types, ODD)
    listing = check_resources(binary, target, tmp_path)
    if gemv:
        wide = r"global_load_dwordx4" if target == "gfx942" else r"LDG\.E\S*\.128"
        enough = 2 if target == "gfx942" else 4  # 64 bytes a thread in flight, at 64 and 32 threads a warp
        assert max(len(re.findall(wide, loop)) for loop in innermost_loops(listing)) >= enough


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pair", [False, True])
def test_step_coefficients(pair, target, tmp_path):
    linear = step_linear(True, bias=True)
    constants, types = {"BI": 1024, "PAIR": pair}, {"h_ptr": "*bf16", "linear": linear, "other": linear, "token": TOKEN}
    binary = compiled(step._coefficients, constants, target, 4, types, ODD)
    listing = check_resources(binary, target, tmp_path)
    assert re.search(r"dwordx4" if target == "gfx942" else r"LDG\.E\S*\.128", listing)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("per_token", [True, False])
def test_read(per_token, target, tmp_path):
    tile = {"BT": 32 if per_token else 16, "PRECISION": "ieee"}
    types = {"x_ptr": "*bf16"}
    for kernel, constants in (
        (read._coefficients, tile | {"BIAS": per_token, "BR": 32, "BI": 32}),
        (read._combine, tile | {"BO": 64, "BR": 16}),
    ):
        check_resources(compiled(kernel, constants, target, 4, types, ODD), target, tmp_path)


def test_the_gates_can_fail(tmp_path):
    """A row loop with [tokens, neurons] reduced across warps has barriers; the gate must see them."""
    binary = compiled(_crossing, {"N": 256}, "sm_90", 4)
    loops = innermost_loops(cuda_listing(binary, tmp_path)[1])
    assert any("BAR.SYNC" in loop and "MUFU.EX2" in loop for loop in loops)


if "triton" in sys.modules:
    import triton.language as tl

    @triton.jit
    def _crossing(a_ptr, n, N: tl.constexpr):
        a = tl.load(a_ptr + tl.arange(0, N))
        for j in range(n):
            a += tl.exp(tl.sum(a, 0)) * j
        tl.store(a_ptr + tl.arange(0, N), a)
