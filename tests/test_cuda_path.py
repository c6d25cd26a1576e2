"""The path "cuda" against the modules: on a GPU as a CUDA graph, else through torch.compile(fullgraph=True)."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from test_memory import Allocated
from tiny import prompt, tiny

import fastweights as fw
from fastweights.engine import fused
from fastweights.engine.cuda import Cuda, graphed
from fastweights.state import factors
from fastweights.state.compress import fold_

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# in float64 rounding is far below any mistake; the kernels compute in float32
DTYPE, BACKEND, TOLERANCE = (torch.float32, "triton", 2e-4) if ON_GPU else (torch.float64, "torch", 1e-11)
ALL = ("gate_proj", "up_proj", "down_proj")

HEBBIAN = fw.Hebbian(rate=0.2, mu=0.1, gate="derivative", decay=0.05, clip=0.1, bias=True)
RULES = {
    "hebbian": HEBBIAN,
    "self": fw.LocalLeastSquares(gamma=0.3, mu=0.1, gate="positive"),
    "slow": fw.LocalLeastSquares(gamma=0.4, mu=0.05, target="slow", decay=0.05),
    "delta": fw.Delta(beta=0.3, target=torch.linspace(-1, 1, 120 * 24).reshape(120, 24), mu=0.1),
}


def as_it_stands(run):
    return run


def compiled(run, backend="eager"):
    return torch.compile(run, fullgraph=True, backend=backend)


RECORD = graphed if ON_GPU else as_it_stands


def captured(rule=None, rows=1, record=RECORD, overflow="grow", depth=4, rank=4, backend=BACKEND, **options):
    """An episode whose single tokens take the captured step."""
    model, layers = tiny(DTYPE, num_hidden_layers=depth).to(DEVICE), [1, 2][: depth - 1]
    if rule is not None:
        linears = ["down_proj"] if isinstance(rule, fw.Delta) else ALL
        fw.attach(model, layers, rule, linears, rank=rank, overflow=overflow, backend=backend, **options)
    episode = fw.Episode(model, rows)
    episode.engine.paths[0] = Cuda(model, episode.engine.linears, episode.state, record, backend)
    return episode


def ordinary(*args, **options):
    """The same without it: torch throughout."""
    episode = captured(*args, record=None, backend="torch", **options)
    episode.engine.paths[0].unable = "not wanted"
    return episode


def decode(episode, steps=12, seed=5):
    """Logits of a ragged prompt and of single tokens, some of them padding, some of them written."""
    random = torch.Generator().manual_seed(seed)
    rows = episode.batch_size
    mask = torch.ones(rows, 5, dtype=torch.bool)
    mask[-1, 3:] = rows == 1
    logits = [episode.feed(prompt(rows, 5, seed), attention_mask=mask)[mask]]
    for _ in range(steps):
        real = torch.rand(rows, 1, generator=random) < (0.8 if rows > 1 else 1.1)
        real[0] = True
        write = torch.rand(rows, 1, generator=random) < 0.7
        ids = torch.randint(61, (rows, 1), generator=random)
        logits.append(episode.feed(ids, update=write, attention_mask=real)[real])
    return torch.cat(logits)


@pytest.fixture(autouse=True)
def compile_anew():
    """torch.compile keeps code by function, and one `_run` serves all episodes."""
    torch._dynamo.reset()


def close(ours, theirs, tolerance=TOLERANCE):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("overflow", ["grow", "evict", "compress"])
@pytest.mark.parametrize("name", RULES)
def test_the_captured_step_is_the_ordinary_pass(name, overflow, rows):
    ours, theirs = captured(RULES[name], rows, overflow=overflow), ordinary(RULES[name], rows, overflow=overflow)
    close(decode(ours), decode(theirs))
    assert ours.engine.paths[0].replayed
    assert not theirs.engine.paths[0].replayed
    assert ours.event_counts == theirs.event_counts
    assert ours.lengths == theirs.lengths
    for site in ours.logs:
        for row in range(rows):
            close(ours.delta_weight(*site, row), theirs.delta_weight(*site, row))
            close(torch.tensor(ours.logs[site].certificate(row)), torch.tensor(theirs.logs[site].certificate(row)))


@pytest.mark.parametrize("linears", [("gate_proj",), ("up_proj",), ("gate_proj", "down_proj"), ALL])
def test_each_linear_has_a_rule_of_its_own_or_none(linears):
    def made(backend, able):
        model = tiny(DTYPE, num_hidden_layers=3).to(DEVICE)
        for rank, name in enumerate(linears, 3):
            rule = {"gate_proj": replace(RULES["self"], rate=0.5), "up_proj": RULES["slow"], "down_proj": HEBBIAN}[name]
            fw.attach(model, [1], rule, [name], rank=rank, overflow="compress", backend=backend)
        episode = fw.Episode(model, 2)
        episode.engine.paths[0] = Cuda(model, episode.engine.linears, episode.state, as_it_stands, backend)
        episode.engine.paths[0].unable = None if able else "not wanted"
        return episode

    ours, theirs = made(BACKEND, True), made("torch", False)
    close(decode(ours), decode(theirs))
    assert (ours.path, theirs.path) == ("cuda", "modules")
    for site in ours.logs:
        close(ours.delta_weight(*site), theirs.delta_weight(*site))


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_key_value_heads=1),
        dict(num_key_value_heads=4, head_dim=10),
        dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        dict(hidden_size=20, intermediate_size=37, head_dim=6, vocab_size=67),
        dict(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                           "original_max_position_embeddings": 64}),
    ],
    ids=["one KV head", "as many KV heads", "biases and tied", "odd widths", "llama3 rope"],
)  # fmt: skip
def test_models_of_every_form(changes):
    out = []
    for able in (True, False):
        model = tiny(DTYPE, num_hidden_layers=2, **changes).to(DEVICE)
        fw.attach(model, [1], HEBBIAN, rank=4, overflow="evict", backend=BACKEND if able else "torch")
        episode = fw.Episode(model, 2)
        episode.engine.paths[0] = Cuda(model, episode.engine.linears, episode.state, RECORD, BACKEND)
        episode.engine.paths[0].unable = None if able else "not wanted"
        out.append(decode(episode))
        assert episode.path == ("cuda" if able else "modules")
    close(*out)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_loop_of_ones_own_over_the_model_has_the_bits_of_a_frozen_episode(rows):
    model = tiny(DTYPE).to(DEVICE)
    episode = fw.Episode(model, rows)
    episode.engine.paths[0] = Cuda(model, {}, episode.state, RECORD, BACKEND)
    episode.engine.paths[0].unable = None
    cache, ids = model.new_cache(rows), prompt(rows, 6).to(DEVICE)
    for t in range(6):
        positions = cache.positions((rows, 1), None, model.device)
        cache.reserve(positions.end)
        logits = fused.fast_step(model, ids[:, t : t + 1], positions, cache, BACKEND)
        cache.advance(positions)
        assert torch.equal(logits, episode.feed(ids[:, t : t + 1]))
        close(logits[:, 0], model(ids[:, : t + 1])[:, -1])
    assert episode.path == "cuda"
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    assert fused.fast_step(model, ids[:, :1], positions, cache, BACKEND) is None
    handle.remove()
    with fw.edited(model, fw.ablate("z", layers=0)):
        assert fused.fast_step(model, ids[:, :1], positions, cache, BACKEND) is None


def test_decoding_goes_on_over_the_border_of_a_kv_bucket():
    ours, theirs = captured(HEBBIAN, 2, depth=2), ordinary(HEBBIAN, 2, depth=2)
    for episode in (ours, theirs):
        episode.cache.limit = episode.cache.longest = 600
        episode.feed(prompt(2, 253), "none")
    for n in range(6):
        close(ours.feed(prompt(2, 1, n)), theirs.feed(prompt(2, 1, n)))
    assert ours.engine.paths[0].recordings == 2


def test_more_rows_than_the_fused_step_takes_run_on_the_modules():
    episode = captured(rows=65)
    episode.feed(prompt(65, 1))
    assert episode.path == "modules"
    assert episode.why["cuda"] == "the fused step takes up to 64 rows"


def test_a_module_of_ones_own_runs_and_is_named():
    class Half(torch.nn.Module):
        def __init__(self, of):
            super().__init__()
            self.of = of

        def forward(self, x):
            return self.of(x) / 2

    episode = captured()
    episode.feed([3])
    assert episode.path == "cuda"
    episode.model.model.layers[0].mlp = Half(episode.model.model.layers[0].mlp)
    episode.feed([3])
    assert episode.path == "modules"
    assert episode.why["cuda"] == "the model holds a module that the fused step does not know: Half"


def test_a_frozen_model_and_one_that_never_writes_give_the_same_bits():
    frozen, silent, theirs = captured(), captured(HEBBIAN), ordinary()
    tokens = prompt(1, 12)
    for episode in (frozen, silent, theirs):
        episode.feed(tokens[:, :4], update="none")
    for t in range(4, 12):
        logits = [e.feed(tokens[:, t : t + 1], update="none") for e in (frozen, silent, theirs)]
        assert torch.equal(logits[0], logits[1])
        close(logits[0], logits[2])
    assert frozen.engine.paths[0].replayed
    assert silent.engine.paths[0].replayed


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "eager") for name in RULES), ("frozen", "aot_eager"), ("hebbian", "aot_eager")]
)
def test_the_step_compiles_whole_and_never_again(name, backend):
    """100 tokens with changing event counts, rates and masks, and folds on the way."""
    rule = RULES.get(name)
    record = graphed if ON_GPU else lambda run: compiled(run, backend)
    options = dict(overflow="compress", depth=2)
    ours, theirs = captured(rule, 2, record, **options), ordinary(rule, 2, **options)
    random = torch.Generator().manual_seed(3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in range(100):
            ids, write = torch.randint(61, (2, 1), generator=random), torch.rand(2, 1, generator=random) < 0.5
            write[:, 0] |= n == 0
            mask = torch.ones(2, 1, dtype=torch.bool)
            mask[1] = n % 7 != 3
            logits = []
            for episode in (ours, theirs):
                if name in ("hebbian", "slow"):
                    for linear in episode.engine.linears.values():
                        linear.rule = replace(linear.rule, rate=0.1 + 0.001 * n)
                logits.append(episode.feed(ids, write, mask)[mask])
            if n < 20:
                close(*logits)
            if n >= 1:
                assert ours.engine.paths[0].replayed
    assert ours.engine.paths[0].recordings == 1
    assert ours.event_counts == theirs.event_counts


def test_restore_then_the_same_steps_give_the_same_bits():
    episode = captured(HEBBIAN, 2, overflow="compress")
    decode(episode)
    before = episode.snapshot()
    first = decode(episode, seed=8)
    after = {site: episode.delta_weight(*site) for site in episode.logs}
    for _ in range(2):
        episode.restore(before)
        assert torch.equal(decode(episode, seed=8), first)
        assert all(torch.equal(episode.delta_weight(*site), weight) for site, weight in after.items())
    assert episode.engine.paths[0].replayed
    other = episode.fork()  # on CUDA it has a graph of its own
    episode.restore(before)
    assert torch.equal(decode(episode, seed=8), first)
    assert other.lengths != before.lengths


def test_a_new_life_goes_on_with_the_recording_and_is_as_new():
    episode = captured(HEBBIAN, 2, overflow="compress", archive=True)
    first = decode(episode)
    made = episode.engine.paths[0].recordings
    episode.reset()
    assert (episode.length, episode.events, episode.engine.paths[0].recordings) == (0, 0, made)
    assert torch.equal(decode(episode), first)
    assert episode.engine.paths[0].replayed


def tokens_one_by_one(episode, count, seed=2):
    return torch.cat([episode.feed(prompt(1, 1, seed + n)) for n in range(count)])


def test_hooks_run_at_every_token_on_the_modules():
    plain, hooked = captured(HEBBIAN), captured(HEBBIAN)
    seen = []
    handle = hooked.model.model.layers[3].mlp.register_forward_hook(lambda *_: seen.append(1))
    close(tokens_one_by_one(hooked, 4), tokens_one_by_one(plain, 4))
    assert (plain.path, hooked.path, len(seen)) == ("cuda", "modules", 4)
    assert hooked.why["cuda"] == "there are hooks on the model, or a forward of its user's"
    handle.remove()
    close(tokens_one_by_one(hooked, 3, 9), tokens_one_by_one(plain, 3, 9))
    assert (hooked.path, len(seen)) == ("cuda", 4)


def test_a_callback_between_tokens_sees_what_was_written():
    """Between two replays everything has landed: probes and other passes neither disturb nor are disturbed."""
    episode, theirs = captured(HEBBIAN), ordinary(HEBBIAN)
    for n, (step, other) in enumerate(
        zip(*(e.generate([3, 4], 8, update="all", stop_token_ids=()) for e in (episode, theirs)), strict=True)
    ):
        close(step.logits, other.logits)
        close(episode.probe([5, 6, 7]).logits, theirs.probe([5, 6, 7]).logits)
        assert episode.events == 3 + n
        kept = step.logits.clone()
        episode.probe([7])
        assert torch.equal(step.logits, kept)
    assert episode.engine.paths[0].replayed


def test_what_the_step_relies_on_is_recorded_again_when_it_changes():
    episode = captured(HEBBIAN, rank=32)
    made = episode.engine.paths[0]

    def recordings(change):
        change()
        before = made.recordings
        tokens_one_by_one(episode, 2)
        assert made.replayed
        return made.recordings - before

    layer, rule = episode.model.model.layers[0], HEBBIAN
    assert recordings(lambda: None) == 1
    assert recordings(lambda: None) == 0
    assert recordings(lambda: episode.feed(prompt(1, 3), "none")) == 0
    weight = layer.mlp.up_proj.weight
    assert recordings(lambda: weight.mul_(2)) == 0  # in place: a graph reads it there
    assert recordings(lambda: setattr(layer.mlp.up_proj, "weight", torch.nn.Parameter(weight / 2, False))) == 1
    assert recordings(lambda: setattr(layer.mlp.up_proj.weight, "data", weight.clone())) == 1
    assert recordings(lambda: setattr(layer, "self_attn", deepcopy(layer.self_attn))) == 1
    plastic = episode.engine.linears[1, "up_proj"]
    assert recordings(lambda: setattr(plastic, "rule", replace(rule, rate=0.3))) == 0
    assert recordings(lambda: setattr(plastic, "rule", replace(rule, mu=0.3))) == 1
    assert recordings(lambda: episode.feed(prompt(1, 20))) == 1  # the logs grow
    assert recordings(lambda: episode.undo(2)) == 0
    assert recordings(lambda: episode.logs[1, "up_proj"].rewind([episode.events - 1])) == 1  # no longer alike
    episode.cache.limit = 1000
    assert recordings(lambda: episode.feed(prompt(1, 250), "none")) == 1  # the bucket, and the KV cache


def test_a_target_that_changes_in_place_is_used_at_once():
    rules = [replace(RULES["delta"], target=RULES["delta"].target.clone()) for _ in range(2)]
    episode, theirs = captured(rules[0]), ordinary(rules[1])
    close(tokens_one_by_one(episode, 3), tokens_one_by_one(theirs, 3))
    for rule in rules:
        rule.target.mul_(3)
    close(tokens_one_by_one(episode, 3), tokens_one_by_one(theirs, 3))
    assert episode.engine.paths[0].replayed


def test_a_forward_of_ones_own_runs_at_every_token():
    episode, calls = captured(), []
    norm = episode.model.model.norm
    tokens_one_by_one(episode, 2)
    assert episode.engine.paths[0].replayed
    norm.forward = lambda x: calls.append(1) or type(norm).forward(norm, x)
    tokens_one_by_one(episode, 2)
    assert (episode.path, len(calls)) == ("modules", 2)


def test_rules_that_need_more_than_one_pass_take_the_ordinary_one():
    model = tiny(DTYPE).to(DEVICE)
    fw.attach(model, [1], fw.GradientAscent(rate=0.1))
    episode = fw.Episode(model)
    episode.engine.paths[0] = Cuda(model, episode.engine.linears, episode.state, RECORD, "torch")
    tokens_one_by_one(episode, 3)
    assert not episode.engine.paths[0].replayed


@pytest.mark.parametrize("number", [2, 5])
def test_a_non_finite_event_is_named_and_taken_back(number):
    """Also when it is the event that fills the log: nothing is folded before the look."""
    episode, theirs = captured(HEBBIAN, 2, overflow="compress"), ordinary(HEBBIAN, 2, overflow="compress")
    for e in (episode, theirs):
        e.feed(prompt(2, 12 - number))
        for n in range(number - 1):
            e.feed(prompt(2, 1, n))
    embedding = episode.model.model.embed_tokens.weight
    kept = embedding[7].clone()
    embedding[7] = float("nan")
    with pytest.raises(ValueError, match=r"event 12 of layers.1.mlp.gate_proj \(row 1\) has a non-finite factor"):
        episode.feed([[5], [7]])
    with pytest.raises(ValueError, match=r"\(row 0\) has a non-finite factor"):
        episode.feed([[5, 7, 7, 5], [7, 7, 5, 7]])
    embedding[7] = kept
    assert episode.lengths == [11, 11]
    assert set(map(tuple, episode.event_counts.values())) == {(11, 11)}
    for ids in ([[5], [6]], [[6], [5]]):  # the slots behind these tokens held NaN
        close(episode.feed(ids), theirs.feed(ids))
    assert episode.engine.paths[0].replayed


def test_a_fold_that_fails_half_way_leaves_every_log_as_it_was(monkeypatch):
    episode, calls = captured(HEBBIAN, overflow="compress"), []
    episode.feed(prompt(1, 10))
    tokens_one_by_one(episode, 1)
    before = {site: episode.delta_weight(*site) for site in episode.logs}

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("no convergence")
        return fold_(*args)

    with monkeypatch.context() as patch:
        patch.setattr(factors, "fold_", failing)
        with pytest.raises(ValueError, match="no convergence"):
            episode.feed([[5]])
    assert (len(calls), episode.length, episode.events) == (3, 11, 11)
    assert all(torch.equal(episode.delta_weight(*site), weight) for site, weight in before.items())


def test_an_archive_and_undo_go_on_as_ever():
    episode, theirs = (make(HEBBIAN, overflow="evict", archive=True) for make in (captured, ordinary))
    for e in (episode, theirs):
        for n in range(9):
            e.feed(prompt(1, 1, n))
        e.undo(6)
        e.feed(prompt(1, 1, 20))
    for site in episode.logs:
        close(episode.delta_weight(*site), theirs.delta_weight(*site))


def test_rows_that_have_ended_stay_as_they_are():
    episode, theirs = captured(HEBBIAN, 3), ordinary(HEBBIAN, 3)
    out = []
    for e in (episode, theirs):
        steps = list(e.generate(prompt(3, 4), 12, stop_token_ids=list(range(0, 61, 4))))
        out.append((torch.stack([s.token_ids for s in steps]), [s.ended for s in steps], e.lengths, e.event_counts))
    assert torch.equal(out[0][0], out[1][0])
    assert out[0][1:] == out[1][1:]
    assert len(set(episode.lengths)) > 1


def test_a_captured_step_needs_the_same_memory_after_200_steps():
    episode = captured(HEBBIAN, overflow="compress", rank=2)
    episode.feed([3, 4, 5])
    held, peaks = [], []
    with Allocated() as bytes_:
        for _ in episode.generate(None, 200, update="all", stop_token_ids=()):
            held.append(bytes_.now)
            peaks.append(bytes_.peak)
            bytes_.peak = bytes_.now
    early, late = slice(40, 80), slice(160, 200)  # each has whole cycles of folds
    assert max(held[late]) == max(held[early])
    assert max(peaks[late]) == max(peaks[early])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_read_lives_inside_torch_compile(backend):
    random = torch.Generator().manual_seed(0)
    h, W, U, K = (torch.randn(s, generator=random).to(DEVICE) for s in ((2, 8), (6, 8), (2, 4, 6), (2, 4, 8)))
    w = torch.ones(2, 4, device=DEVICE)

    def read(h, U, K):
        return h @ W.T + torch.ops.fastweights.read(h[:, None], U, K, None, w)[:, 0]

    whole = torch.compile(read, fullgraph=True, backend=backend)
    torch.testing.assert_close(read(h, U, K), whole(h, U, K))


@pytest.mark.parametrize("rule", [None, HEBBIAN], ids=["frozen", "plastic"])
def test_bfloat16_does_not_drift_over_512_tokens(rule):
    """Greedy tokens of a bfloat16 model, against the same weights in float64."""
    half = tiny(torch.bfloat16, max_position_embeddings=600)
    exact = tiny(torch.float64, max_position_embeddings=600)
    exact.load_state_dict(half.state_dict())
    episodes = []
    for model in (half.to(DEVICE), exact.to(DEVICE)):
        if rule is not None:
            backend = BACKEND if model is half else "torch"
            fw.attach(model, [1, 2], replace(rule, rate=0.02), rank=16, overflow="evict", backend=backend)
        episodes.append(fw.Episode(model))
    ours, theirs = episodes
    ours.engine.paths[0] = Cuda(half, ours.engine.linears, ours.state, RECORD, BACKEND)
    errors = []
    for ids in prompt(1, 512)[0].split(1):
        a, b = ours.feed(ids).double(), theirs.feed(ids)
        errors.append(float((a - b).norm() / b.norm()))
    assert ours.engine.paths[0].replayed
    early, late = max(errors[:64]), max(errors[-64:])
    assert max(errors) < 0.1
    assert late < 2 * early
