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

from fastweights.kernels import adjoint_triton, elementwise, place, products, query, read, rope, scan, step, values

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


def scan_constants(rule, precision, activation="silu"):
    known = values.KERNELS[rule]
    return {
        "RULE": known.value,
        "PHI": activation,
        "FROZEN": known.reads_frozen,
        "TARGET": known.reads_target,
        "CLIP": True,
        "ALL": False,
        **{size: scan.BLOCK[size] for size in ("BN", "BK", "C")},
        "PRECISION": precision,
    }


WORD, HALF = "*fp32", "*bf16"


def step_linear(plastic, made=False, bias=False):
    """The types of a bfloat16 linear without bias, in a rule without a target."""
    frozen = step._Linear(HALF, None, WORD if made else None, "i32" if made else None)
    if not plastic:
        return frozen
    factors = {"U": WORD, "K": WORD, "bias": WORD if bias else None, "birth": "*i64"}
    token = {"event": "*i64", "slot": "*i64", "w": WORD, "write": "*u8", "bad": "*i32", "c": WORD, "norm": WORD}
    strides = dict.fromkeys(("U_sb", "K_sb", "birth_sb"), "i32") | {"bias_sb": "i32" if bias else None}
    return frozen._replace(**factors, **token, rate=WORD, gamma=WORD, R="i32", mu="fp32", clip="fp32", **strides)


ODD = ("T", "t1", "R", "B", "H", "KH", "per", "rows", "bias_sb", "birth_sb", "w_sb", "w_st")
ODD += ("rate_sb", "rate_so", "gamma_sb", "gamma_so", "write_sb", "norm_sb")


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


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_scan_by_other_activations(activation, target, tmp_path):
    constants = scan_constants("slow_derivative", "tf32", activation)
    binary = compiled(scan._block, constants, target, 1, {"written_ptr": "*u8", "y_ptr": "*bf16"}, ODD)
    check_resources(binary, target, tmp_path)


@pytest.mark.parametrize("rule", ["ones", "derivative"])
def test_an_activation_that_no_kernel_knows_does_not_compile(rule):
    with pytest.raises(triton.CompilationError) as error:
        compiled(scan._block, scan_constants(rule, "tf32", "relu"), "sm_90", 1, {"written_ptr": "*u8"}, ODD)
    assert "no kernel knows this activation" in str(error.getrepr(chain=True))


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
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_adjoint(precision, target, tmp_path):
    """Of all blocks after one, and of the block itself."""
    later = adjoint_triton.LATER[precision]
    tile, warps = {size: later[size] for size in ("BM", "BN", "BK")} | {"PRECISION": precision}, later["num_warps"]
    check_resources(compiled(adjoint_triton._later, tile, target, warps, odd=("T", "t0", "t1")), target, tmp_path)
    tile = {size: scan.BLOCK[size] for size in ("BN", "BK", "C")} | {"PRECISION": precision}
    check_resources(compiled(adjoint_triton._back, tile, target, 1, odd=("T", "t0", "t1")), target, tmp_path)


def wide_loads(listing, target):
    """The most 128-bit loads that an innermost loop has."""
    wide = r"(?:global|buffer)_load_dwordx4" if target == "gfx942" else r"LDG\.E\S*\.128"
    return max(len(re.findall(wide, loop)) for loop in innermost_loops(listing))


def precision(target):
    return "ieee" if target == "gfx942" else "tf32x3"


def dependent(target):
    return {"PDL": target == "sm_90"}  # announced and waited for by the kernel itself: nothing else changes


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("role", "matrices", "tile"), [("qkv", 3, (2, 2048, 8)), ("o", 1, (2, 2048, 8)), ("down", 1, (1, 2048, 4))]
)
def test_products_of_one_row(role, matrices, tile, target, tmp_path):
    BN, BK, warps = tile
    norm = role == "qkv"
    types = {"x_ptr": WORD if norm else HALF, "g_ptr": HALF if norm else None, "y_ptr": HALF if norm else WORD}
    for n in range(3):
        there = n < matrices
        types |= {f"W{n}": HALF if there else None, f"b{n}": None, f"O{n}": "i32" if there else None}
    types["eps"] = "fp32"
    constants = {"ADD": not norm, "BN": BN, "BK": BK, **dependent(target)}
    warps = min(warps, 4) if target == "gfx942" else warps
    binary = compiled(products._row, constants, target, warps, types, ODD)
    listing = check_resources(binary, target, tmp_path)
    assert wide_loads(listing, target) >= 1
    if target == "sm_90":  # the first tile of W is on its way before the wait
        before, _ = listing.split("ACQBULK", 1)
        assert re.search(r"LDG\.E\S*\.128", before)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("BM", [16, 64])
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
def test_products_of_rows(dtype, BM, target, tmp_path):
    types = {"h_ptr": dtype, "W0": dtype, "b0": None, "O0": "i32", "y_ptr": WORD}
    types |= dict.fromkeys(("W1", "b1", "O1", "W2", "b2", "O2"))
    constants = {"ADD": True, "BM": BM, "BN": 32, "BK": 128 if dtype == HALF else 32, "PRECISION": precision(target)}
    binary = compiled(products._rows, constants | dependent(target), target, 4, types, ODD)
    check_resources(binary, target, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("E", "dtype"), [(64, "*bf16"), (96, "*bf16"), (128, "*bf16"), (64, "*fp32")])
def test_attention_of_one_query(E, dtype, target, tmp_path):
    types = dict.fromkeys(("qkv_ptr", "cos_ptr", "sin_ptr", "K_ptr", "V_ptr", "z_ptr"), dtype)
    types |= {"position_ptr": "*i64", "place_ptr": "*i64", "arrived_ptr": "*i32", "scale": "fp32"}
    constants = {"G": 4, "BG": 16, "E": E, "BE": triton.next_power_of_2(E), "PRECISION": precision(target)}
    constants["BP"] = 32
    constants["BS"] = 64 if dtype == HALF and target != "gfx942" else 32
    binary = compiled(query._attend, constants | dependent(target), target, 4, types, (*ODD, "places", "window"))
    check_resources(binary, target, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("plastic", [True, False])
def test_gate_and_up(plastic, made, target, tmp_path):
    rule = values.KERNELS["derivative"].value if plastic else None
    constants = {"MADE": made, "GATE": rule, "UP": rule, "BR": 32, "BN": 64 if made else 2, "BK": 16 if made else 1024}
    linear = step_linear(plastic, made)
    types = {"x_ptr": HALF if made else WORD, "g_ptr": None if made else HALF, "gate": linear, "up": linear}
    types |= {"y_ptr": HALF, "eps": "fp32"}
    binary = compiled(step._gate_up, constants | dependent(target), target, 4, types, ODD)
    listing = check_resources(binary, target, tmp_path)
    assert made or wide_loads(listing, target) >= 2


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("made", [True, False])
def test_down(made, target, tmp_path):
    constants = {"MADE": made, "RULE": values.KERNELS["ones"].value, "BR": 32}
    constants |= {"BN": 64 if made else 1, "BK": 16 if made else 2048}
    types = {"h_ptr": HALF, "down": step_linear(True, made)}
    binary = compiled(step._down, constants | dependent(target), target, 4, types, ODD)
    listing = check_resources(binary, target, tmp_path)
    assert made or wide_loads(listing, target) >= 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pair", [False, True])
def test_step_coefficients(pair, target, tmp_path):
    linear = step_linear(True, bias=True)
    constants = {"BI": 1024, "PAIR": pair, **dependent(target)}
    types = {
        "x_ptr": WORD if pair else HALF,
        "g_ptr": HALF if pair else None,
        "first": linear,
        "second": linear,
        "eps": "fp32",
    }
    binary = compiled(step._coefficients, constants, target, 4, types, ODD)
    listing = check_resources(binary, target, tmp_path)
    assert re.search(r"dwordx4" if target == "gfx942" else r"LDG\.E\S*\.128", listing)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("decay", [0.0, -0.5])
def test_where_the_next_event_goes(decay, target, tmp_path):
    types = {"event_ptr": "*i64", "birth_ptr": "*i64", "slot_ptr": "*i64"}
    types |= dict.fromkeys(("first", "free", "kept", "window"), "i64")
    constants = {"LOG2_KEEP": decay, "BR": 128, **dependent(target)}
    check_resources(
        compiled(place._place, constants, target, 4, types, (*ODD, "first", "free", "kept", "window")), target, tmp_path
    )


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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_norm_rope_and_silu_mul(dtype, target, tmp_path):
    word = f"*{dtype}"
    types = dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr", "gate_ptr", "up_ptr"), word) | {"eps": "fp32"}
    wide = r"(?:global|buffer)_load_dwordx4" if target == "gfx942" else r"LDG\.E\S*\.128"
    for width in (2048, elementwise.WIDEST):
        block, warps = elementwise._norm_tile(width)
        binary = compiled(elementwise._rms_norm, {"BD": block}, target, warps, types)
        assert len(re.findall(wide, check_resources(binary, target, tmp_path))) >= 2  # x and the weight
    binary = compiled(elementwise._silu_mul, {"BLOCK": elementwise.BLOCK}, target, 4, types)
    assert len(re.findall(wide, check_resources(binary, target, tmp_path))) >= 2  # gate and up
    arguments = [name for name in rope._rope.arg_names if name.endswith("_ptr")]
    for E, where in ((64, "start"), (80, "place"), (128, "start"), (128, "alone")):
        types = dict.fromkeys(arguments, word) | {"place_ptr": "*i64" if where == "place" else None}
        types |= {"v_ptr": None} if where == "alone" else {}
        constants = {"E": E, "BH": rope.HEADS, "BE": rope._parts(32, 8, E)[2]}
        odd = ("start", "places", "H", "K")
        check_resources(compiled(rope._rope, constants, target, 4, types, odd), target, tmp_path)
