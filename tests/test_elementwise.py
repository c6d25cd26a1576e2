"""The kernels of norm, rope with the KV append, and SiLU·up: against float64 written out here, and inside the model.

Without a GPU they run in Triton's interpreter, in a process of their own, as in test_kernels.
"""

import os
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl  # noqa: F401  the interpreter looks for it in the module of every kernel
from interpreted import nan_filled_outputs, run_interpreted  # noqa: F401
from tiny import prompt, tiny
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fastweights as fw
from fastweights import model as model_module
from fastweights.kernels import attention, elementwise, rope
from fastweights.kernels.rope import Into

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
EPSILON = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# the interpreter does not round to bfloat16 but cuts off
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")
triton_test = pytest.mark.skipif(not INTERPRETED and not ON_GPU, reason="run by test_triton_interpreted")

warnings.filterwarnings("ignore", module="triton.runtime.interpreter")


def as_on_gpu(monkeypatch):
    for module in (elementwise, attention, model_module):
        monkeypatch.setattr(module, "on_gpu", lambda x: True)
    monkeypatch.setattr(model_module.Llama, "fast_step", None)  # the step in C


# ---- rms_norm and silu_mul


def norm_written_out(x, weight, eps):
    """In float64, with the rounding before the weight that half precision has."""
    x = x.double()
    normal = x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()
    return normal, normal.to(weight.dtype).double() * weight.double()


@triton_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 576), (2, 17, 24), (3, 5, 33), (2, 3, 4096), (130, 7), (9, 1)])
def test_triton_rms_norm(shape, dtype):
    x, weight = 3 * torch.randn(shape), 1 + torch.randn(shape[-1]) / 2
    x, weight = x.to(DEVICE, dtype), weight.to(DEVICE, dtype)
    found = elementwise.launch_rms_norm(x, weight, 1e-5)
    normal, wanted = norm_written_out(x, weight, 1e-5)
    assert found.dtype == dtype
    assert found.shape == x.shape
    wide = wanted.abs().clamp(1e-3)
    error = ((found.double() - wanted).abs() / wide).max() / EPSILON[dtype]
    assert error < (8 if dtype == torch.float32 else 4.1)  # half: the norm may lie next to a tie, then twice an epsilon
    if dtype != torch.float32 and x.numel() > 200:
        same = (found == wanted.to(dtype)).double().mean()
        once = (found == (normal * weight.double()).to(dtype)).double().mean()
        assert same > 0.995
        assert once < 0.95  # rounding only once is another number


@triton_test
def test_triton_rms_norm_of_rows_that_lie_apart():
    x, weight = torch.randn(3, 7, 40, device=DEVICE), torch.randn(20, device=DEVICE)
    odd = x[:, 0, :20].contiguous().as_strided((3, 1, 20), (20, 999, 1))  # contiguous all the same
    for part in (x[:, -1:, :20], x[:, 2:5, 10:30], x.transpose(0, 1)[..., ::2], x[:, :, :20], odd, x[0, 0, :20]):
        wanted = norm_written_out(part, weight, 1e-6)[1]
        torch.testing.assert_close(elementwise.launch_rms_norm(part, weight, 1e-6).double(), wanted, rtol=0, atol=1e-5)


@triton_test
def test_triton_rms_norm_keeps_nan_and_infinity_in_their_row():
    x = torch.randn(3, 50, device=DEVICE)
    x[0, 7], x[2, 9] = NAN, float("inf")
    y = elementwise.launch_rms_norm(x, torch.ones(50, device=DEVICE), 1e-5)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()
    assert y[2, 9].isnan()


@triton_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1536), (2, 17, 52), (3, 1023), (1, 2049), (7,)])
def test_triton_silu_mul(shape, dtype):
    gate, up = (4 * torch.randn(2, *shape)).to(DEVICE, dtype)
    found = elementwise.launch_silu_mul(gate, up)
    silu = (gate.double() / (1 + (-gate.double()).exp())).to(dtype).double()
    wanted = silu * up.double()
    assert found.dtype == dtype
    error = ((found.double() - wanted).abs() / wanted.abs().clamp(1e-3)).max() / EPSILON[dtype]
    assert error < (8 if dtype == torch.float32 else 4.1)


@triton_test
def test_triton_silu_mul_at_the_ends():
    gate = torch.tensor([-1e4, 1e4, NAN, float("inf"), float("-inf"), -0.0], device=DEVICE)
    found = elementwise.launch_silu_mul(gate, torch.full_like(gate, 2.0))
    assert torch.equal(found.isnan(), F.silu(gate).isnan())
    torch.testing.assert_close(found, 2 * F.silu(gate), rtol=1e-6, atol=0, equal_nan=True)


# ---- rope


def angles(position_BT, E, dtype):
    """cos and sin [B, 1, T, E] in the dtype, of a usual theta."""
    frequency = 1e4 ** -(torch.arange(0, E, 2) / E)
    angle = position_BT[:, None, :, None].float() * frequency
    return [torch.cat((f(angle), f(angle)), -1).to(DEVICE, dtype) for f in (torch.cos, torch.sin)]


def turned(x_BHTE, table):
    """x turned as complex numbers in float64, by the rounded angles."""
    half = x_BHTE.shape[-1] // 2
    cos, sin = (part[..., :half].double() for part in table)
    z = torch.complex(*x_BHTE.double().split(half, -1)) * torch.complex(cos, sin)
    return torch.cat((z.real, z.imag), -1)


def projections(B, T, H, K, E, dtype, fused=False):
    """q, k and v as views of [B, T, heads · E]; fused: of one product."""
    whole = torch.randn(B, T, (H + 2 * K) * E).to(DEVICE, dtype)
    parts = whole.split((H * E, K * E, K * E), -1)
    return [(x if fused else x.contiguous()).unflatten(-1, (-1, E)).transpose(1, 2) for x in parts]


def near(found, wanted, dtype):
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error <= (4 if dtype == torch.float32 else 1.01) * EPSILON[dtype]  # half: rounded once


HEADS = [(4, 4, 64), (9, 3, 96), (17, 1, 128), (8, 2, 80), (3, 3, 10), (2, 1, 2)]


@triton_test
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "K", "E"), HEADS)
def test_triton_rope(H, K, E, dtype, fused):
    for T in (1, 17):
        q, k, _ = projections(2, T, H, K, E, dtype, fused)
        table = angles(torch.randint(100_000, (2, T)), E, dtype)
        before = q.clone(), k.clone()
        out = rope.launch(q, k, table)
        for found, x in zip(out, (q, k), strict=True):
            near(found, turned(x, table), dtype)
            assert found.transpose(1, 2).is_contiguous()  # so that attention's output needs no copy
            assert rope.reference(x, table).shape == found.shape
        assert torch.equal(q, before[0])
        assert torch.equal(k, before[1])


@triton_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("T", "start", "H", "K", "E"),
    [(1, 0, *HEADS[0]), (1, 33, *HEADS[2]), (17, 5, *HEADS[3]), (17, 1, *HEADS[2]), (130, 0, *HEADS[1])],
)
def test_triton_rope_puts_keys_and_values_after_those_of_before(T, start, H, K, E, dtype):
    B, S = (1 if T == 130 else 2), start + T + 3
    q, k, v = projections(B, T, H, K, E, dtype)
    table = angles(torch.arange(start, start + T).expand(B, T), E, dtype)
    keys, values = torch.full((2, B, K, S, E), -7.0, device=DEVICE, dtype=dtype)
    found = rope.launch(q, k, table, v, Into(keys, values, start, None))[0]
    near(found, turned(q, table), dtype)
    near(keys[:, :, start : start + T], turned(k, table), dtype)
    assert torch.equal(values[:, :, start : start + T], v)
    for buffer in (keys, values):
        assert (buffer[:, :, :start] == -7).all()
        assert (buffer[:, :, start + T :] == -7).all()


@triton_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("H", "K", "E"), HEADS[1:4])
@pytest.mark.parametrize("T", [1, 17])
def test_triton_rope_puts_ragged_rows_where_each_token_belongs(T, H, K, E, dtype):
    B, S = 3, 40
    q, k, v = projections(B, T, H, K, E, dtype)
    position = torch.tensor([0, 12, 20])[:, None] + torch.arange(T)
    real = torch.rand(B, T) < 0.7
    real[0, 0], real[1] = True, T > 1
    place = torch.where(real, position, -1)
    table = angles(position * real, E, dtype)
    keys, values = torch.full((2, B, K, S, E), -7.0, device=DEVICE, dtype=dtype)
    rope.launch(q, k, table, v, Into(keys, values, None, place.to(DEVICE)))
    wanted_k = turned(k, table)
    for b in range(B):
        untouched = torch.ones(S, dtype=torch.bool)
        for t in range(T):
            if real[b, t]:
                near(keys[b, :, place[b, t]], wanted_k[b, :, t], dtype)
                assert torch.equal(values[b, :, place[b, t]], v[b, :, t])
                untouched[place[b, t]] = False
            else:
                untouched[-1] = False
        assert (keys[b][:, untouched] == -7).all()
        assert (values[b][:, untouched] == -7).all()


@triton_test
def test_triton_rope_beyond_two_billion_elements():
    """Rows of the cache that lie 2³¹ elements apart: only what is written is ever touched."""
    B, K, E, apart = 2, 1, 4, 2**31 + 64
    storage = torch.UntypedStorage((apart + 64) * 2, device=DEVICE)  # memory that nobody touches is not used
    empty = torch.empty(0, dtype=torch.float16, device=DEVICE)
    buffers = [empty.new_empty(0).set_(storage, at, (B, K, 8, E), (apart, 8 * E, E, 1)) for at in (0, 8 * E)]
    q, k, v = projections(B, 1, 1, K, E, torch.float16)
    table = angles(torch.tensor([[3], [5]]), E, torch.float16)
    rope.launch(q, k, table, v, Into(*buffers, None, torch.tensor([[3], [5]], device=DEVICE)))
    for b, place in ((0, 3), (1, 5)):
        near(buffers[0][b, :, place], turned(k, table)[b, :, 0], torch.float16)
        assert torch.equal(buffers[1][b, :, place], v[b, :, 0])


# ---- inside the model


MODELS = {
    "grouped": {},
    "multi-query, biases": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "full, heads of 10": {"num_key_value_heads": 4, "head_dim": 10},
}


def passes(model):
    """Logits of a prompt, of ragged rows, and of what follows both in a cache."""
    ids, mask = prompt(2, 12).to(DEVICE), torch.ones(2, 12, dtype=torch.long, device=DEVICE)
    mask[1, 3:5] = mask[0, :2] = 0
    found = [model(ids), model(ids, attention_mask=mask)[mask.bool()]]
    for first in (None, mask):
        cache = model.new_cache(2)
        found.append(model(ids, attention_mask=first, cache=cache)[mask.bool()])
        for a, b in ((0, 1), (1, 4)):
            found.append(model(ids[:, a:b], cache=cache))
        found.append(model(ids[:, :4], attention_mask=mask[:, :4], cache=cache, logits="last"))
        found += [buffer[:, :, : cache.length] for buffer in (*cache.keys, *cache.values)]
    return found


@triton_test
@pytest.mark.parametrize("name", MODELS)
def test_triton_in_a_model_equals_torch(name, monkeypatch):
    model = tiny(torch.float32, num_hidden_layers=2, **MODELS[name]).to(DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(elementwise, "on_gpu", lambda x: False)
        wanted = passes(model)
    as_on_gpu(monkeypatch)
    launches = counted(monkeypatch)
    for found, exact in zip(passes(model), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
    assert launches == {"_rms_norm": 10 * 5, "_rope": 10 * 2, "_silu_mul": 10 * 2}


@triton_test
def test_triton_in_a_plastic_episode_and_its_probes_equals_torch(monkeypatch):
    found = []
    for fused in (False, True):
        if fused:
            as_on_gpu(monkeypatch)
        else:
            monkeypatch.setattr(elementwise, "on_gpu", lambda x: False)
        model = tiny(torch.float32, num_hidden_layers=3).to(DEVICE)
        fw.attach(model, [1], fw.Hebbian(rate=0.2, mu=0.1), rank=32, backend="torch")
        episode = fw.Episode(model, 2)
        parts = [episode.feed(prompt(2, n, seed=n)) for n in (5, 1, 3)]
        sites = ["q_rot", "k_rot", "z", "mlp_norm", "resid_mid", "pattern"]
        trace = episode.probe(prompt(2, 6), sites)
        edited = episode.probe(prompt(2, 6), edits=[fw.ablate("q_rot", layers=2)]).logits
        every = episode.probe(prompt(2, 4), at="every").logits
        found.append([*parts, trace.logits, *(trace[site] for site in sites), edited, every])
        if fused:  # looking changes nothing: rope is the same kernel with and without
            seen = episode.probe(prompt(2, 6), ["q_rot", "z"]).logits
            assert torch.equal(episode.probe(prompt(2, 6)).logits, seen)
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@triton_test
def test_triton_half_precision_is_as_near_to_float64_as_torch(monkeypatch):
    model, ids = tiny(torch.float16).to(DEVICE), prompt(1, 20).to(DEVICE)
    exact = tiny().to(DEVICE)
    exact.load_state_dict(model.state_dict())
    wanted = exact(ids)
    errors = []
    for fused in (False, True):
        monkeypatch.setattr(elementwise, "on_gpu", lambda x, fused=fused: fused)
        errors.append(float((model(ids).double() - wanted).norm()))
    assert errors[1] < 1.1 * errors[0]


# ---- who may run, and how much


def counted(monkeypatch, run=True):
    """Counts the launches of each kernel; run=False: they do nothing."""
    launches = Counter()

    class Counting:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launches[self.name] += 1
            return self.kernel[grid] if run else lambda *args, **options: None

    for module, name in ((elementwise, "_rms_norm"), (elementwise, "_silu_mul"), (rope, "_rope")):
        monkeypatch.setattr(module, name, Counting(name, getattr(module, name)))
    return launches


# operators that launch nothing
VIEWS = {"view", "_unsafe_view", "t", "transpose", "slice", "select", "unsqueeze", "expand", "detach", "alias"}
VIEWS |= {"empty", "empty_like", "new_empty"}


class Operators(TorchDispatchMode):
    """Counts the operators that launch something."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.found[name] += name not in VIEWS
        return func(*args, **(kwargs or {}))


def launched(monkeypatch, depth, run):
    """How many kernels a pass launches, by name."""
    model = tiny(torch.float16, num_hidden_layers=depth)
    with monkeypatch.context() as patch:
        as_on_gpu(patch)
        given = run(model)
        launches = counted(patch, run=False)
        with Operators() as operators:
            model(**given)
    return operators.found + launches


def a_cached_pass(first, then, mask=None):
    def prepared(model):
        cache = model.new_cache(2)
        if first:
            cache.lengths = [first, first]
        return {"input_ids": prompt(2, then), "attention_mask": mask, "cache": cache}

    return prepared


RAGGED = torch.arange(9) < torch.tensor([[9], [7]])
PASSES = {
    "alone": (lambda model: {"input_ids": prompt(2, 9)}, 14),
    "one token": (a_cached_pass(5, 1), 14),
    "a prompt": (a_cached_pass(0, 9), 14),
    "a prompt after another": (a_cached_pass(5, 9), 14),
    "ragged": (
        a_cached_pass(0, 9, RAGGED),
        19,
    ),  # keys and values copied for their groups, and torch's work on the mask
}


@pytest.mark.parametrize("name", PASSES)
def test_a_layer_launches_no_more_than(name, monkeypatch):
    run, most = PASSES[name]
    monkeypatch.setattr(attention, "_takes_flash", lambda *given: True)
    monkeypatch.setattr(attention, "_flash", lambda q, k, v, scale: q + 0)
    two, three = (launched(monkeypatch, depth, run) for depth in (2, 3))
    layer = three - two
    assert layer.total() <= most, layer
    assert (layer["_rms_norm"], layer["_rope"], layer["_silu_mul"], layer["mm"]) == (2, 1, 1, 7)


def test_gradients_go_through_torch(monkeypatch):
    ids, found = prompt(1, 7), []
    for fused in (False, True):
        model = tiny(torch.float32).requires_grad_()
        with monkeypatch.context() as patch:
            if fused:
                as_on_gpu(patch)
            launches = counted(patch, run=False)
            cache = model.new_cache(1)
            model(ids, cache=cache).logsumexp(-1).sum().backward()
            assert not launches
        found.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    model = tiny(torch.float32)
    as_on_gpu(monkeypatch)
    launches = counted(monkeypatch, run=False)
    model.model.layers[1].register_forward_hook(lambda module, args, out: out.requires_grad_())
    with torch.enable_grad():
        model(ids)
    assert launches == {"_rms_norm": 4, "_rope": 2, "_silu_mul": 2}  # below the hook nobody differentiates
    launches.clear()
    with torch.no_grad():
        model(ids)
    assert launches == {"_rms_norm": 9, "_rope": 4, "_silu_mul": 4}


class Marked(torch.Tensor):
    pass


def test_triton_takes_plain_tensors_of_its_dtypes_on_one_gpu_only(monkeypatch):
    x = torch.randn(2, 8)
    assert not elementwise.takes(x)  # it lies on the CPU
    monkeypatch.setattr(elementwise, "on_gpu", lambda x: True)
    assert elementwise.takes(x)
    assert elementwise.takes(x, torch.nn.Parameter(x, requires_grad=False))
    assert all(elementwise.takes(x.to(dtype)) for dtype in DTYPES)
    assert not elementwise.takes(x.double())
    assert not elementwise.takes(x[:0])
    assert not elementwise.takes(x, x.half())
    assert not elementwise.takes(x.as_subclass(Marked))
    assert not elementwise.takes(x, x.as_subclass(Marked))
    weight = x.clone().requires_grad_()
    assert not elementwise.takes(x, weight)
    with torch.no_grad():
        assert elementwise.takes(x, weight)
    with forward_ad.dual_level():
        assert not elementwise.takes(x)
    seen = []
    torch.func.vmap(lambda row: seen.append(elementwise.takes(row)) or row)(x)
    assert seen == [False]
    assert torch.equal(torch.compile(lambda x: x + elementwise.takes(x), backend="eager", fullgraph=True)(x), x)
    monkeypatch.setattr(elementwise, "triton", None)
    assert not elementwise.takes(x)


def test_shapes_that_do_not_agree_are_left_to_torch(monkeypatch):
    as_on_gpu(monkeypatch)
    launches = counted(monkeypatch, run=False)
    q, k, v = projections(2, 3, 4, 2, 8, torch.float32)
    table = angles(torch.arange(3).expand(2, 3), 8, torch.float32)
    keys, values = torch.zeros(2, 2, 2, 5, 8)
    assert rope.rotate_into(q, k, v, table, Into(keys, values, 3, None)) is None  # beyond the last place
    assert rope.rotate_into(q, k, v, table, Into(keys, values, None, None)) is None
    assert rope.rotate_into(q, k, v, table, Into(keys[:1], values[:1], 0, None)) is None
    assert rope.rotate_into(q, k, v, table, Into(keys.double(), values, 0, None)) is None
    assert rope.rotate_into(q, k, v, table, Into(keys, values.mT.contiguous().mT, 0, None)) is None
    assert rope.rotate_into(q, k[:, :, :2], v, table, Into(keys, values, 0, None)) is None
    with pytest.raises(RuntimeError):
        rope.rotate(q, k, [part[:, :, :2] for part in table])
    x, weight = torch.randn(3, 8), torch.randn(8)
    with pytest.raises(RuntimeError):
        elementwise.rms_norm(x, weight[:4], 1e-5)
    torch.testing.assert_close(elementwise.silu_mul(x, x[:1]), F.silu(x) * x[:1])
    torch.testing.assert_close(elementwise.silu_mul(x.T, x.T), F.silu(x.T) * x.T)
    assert not launches
    assert rope.rotate_into(q, k, v, table, Into(keys, values, 2, None)) is not None
    assert launches == {"_rope": 1}


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="the Triton kernels run in this very process")
def test_triton_interpreted():
    run_interpreted(__file__, "-k", "triton")
