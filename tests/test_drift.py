"""The drift report against dense matrices, and what it prints."""

import json
import math

import pytest
import torch
from tiny import oracle_of, prompt, tiny

import fastweights as fw

RULE = fw.Hebbian(rate=0.2, mu=0.1, decay=0.02)


def fed(tokens=20, rows=1, rule=RULE, **options):
    model = tiny()
    fast = fw.attach(model, [1, 2], rule, **options)
    episode = fw.Episode(model, rows)
    episode.feed(prompt(rows, tokens))
    return model, fast, episode


def test_every_number_equals_the_dense_one():
    model, fast, episode = fed(rows=2, overflow="grow")
    drift = episode.drift()
    sites = [(layer, name) for layer in (1, 2) for name in ("gate_proj", "up_proj", "down_proj")]
    assert [(each.layer, each.linear, each.row) for each in drift.rows] == [(*s, row) for s in sites for row in (0, 1)]
    for row in range(2):
        oracle = oracle_of(model, fast)
        oracle.feed(prompt(2, 20)[row].tolist())
        for each in drift.rows[row::2]:
            plain = oracle.fast[each.layer, each.linear]
            sigma = torch.linalg.svdvals(plain.dW)
            p = (sigma / sigma.sum()).clamp(min=1e-300)
            assert each.name == f"layers.{each.layer}.mlp.{each.linear}"
            assert each.norm == pytest.approx(float(plain.dW.norm()), rel=1e-9)
            assert each.relative == pytest.approx(float(plain.dW.norm() / plain.W.norm()), rel=1e-9)
            assert each.norm_2 == pytest.approx(float(sigma[0]), rel=1e-9)
            assert each.effective_rank == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-6)
            sizes = [float(u.norm() * k.norm()) for u, k in zip(plain.values, plain.keys, strict=True)]
            assert each.event_norms == pytest.approx(sizes, rel=1e-9)
            assert each.largest_event == 1 + sizes.index(max(sizes))
            assert (each.events, each.forgotten, each.slots, each.capacity, each.scaled) == (20, 0, 20, 64, 0)
            assert (each.error_2, each.error_F, each.lost) == (0, 0, 0)
            # float64 factors, bias keys and births
            assert each.bytes == 64 * (sum(plain.W.shape) + 2) * 8


def test_a_folded_log_says_what_it_lost_and_that_bounds_what_it_lost():
    _, fast, episode = fed(30, overflow="compress", rank=4, archive=True)
    for each in episode.drift().rows:
        log = episode.logs[each.layer, each.linear]
        U_RO, K_RI, _, _ = (factor[0] for factor in log.moment_factors())
        exact = (log.weights_at([30])[0, :, None] * U_RO).T @ K_RI
        assert 0 < float((exact - log.delta_weight(0)).norm()) <= each.error_F
        assert (each.error_2, each.error_F) == fast.error(each.layer, each.linear)
        assert each.lost == pytest.approx(each.error_F / float(log.delta_weight(0).norm()))
        assert (each.slots, each.capacity, each.events) == (6, 12, 30)
        assert not any(map(math.isnan, each.event_norms))  # the archive has them
    for each in fed(30, overflow="compress", rank=4)[2].drift().rows:
        assert [math.isnan(norm) for norm in each.event_norms] == [True] * 28 + [False] * 2
        assert each.largest_event in (29, 30)


def test_scaled_and_forgotten_events_are_counted():
    _, fast, episode = fed(overflow="evict", rank=5, budget=0.04)
    rows = episode.drift().rows
    assert all(each.forgotten == 15 and each.slots == 6 for each in rows)
    assert all(0 < each.scaled <= 20 and each.relative <= 0.04 * (1 + 1e-9) for each in rows)
    assert fast.delta_norm(1, "up_proj") == rows[1].norm
    assert "up to 15 of 20 events are forgotten" in str(episode.drift())


def test_the_table_has_the_worst_first_and_a_verdict():
    _, _, episode = fed(30, overflow="compress", rank=4)
    lines = str(episode.drift()).splitlines()
    assert len(lines) == 1 + 6 + 2
    assert lines[0].split()[:7] == ["linear", "events", "‖ΔW‖/‖W‖", "‖ΔW‖", "‖ΔW‖₂", "rank", "slots"]
    assert lines[0].endswith("  lost ≤  scaled  largest event")
    shares = [float(line.split()[2].rstrip("%")) for line in lines[1:-2]]
    assert shares == sorted(shares, reverse=True)
    worst = max(episode.drift().rows, key=lambda each: each.relative)
    assert lines[1].startswith(worst.name)
    assert lines[-2] == f"{worst.name} changed most, by {worst.relative:.3%} of ‖W‖;"
    loser = max(episode.drift().rows, key=lambda each: each.lost)
    assert lines[-1].startswith(f"the capacity lost at most {loser.lost:.2%} of ‖ΔW‖ ({loser.name}). ")
    mebibytes = sum(log.bytes for log in episode.logs.values()) / 2**20
    assert lines[-1].endswith(f"The logs take {mebibytes:.1f} MiB.")
    assert str(fed(3, rows=2)[2].drift()).splitlines()[0].split()[:2] == ["linear", "row"]


def test_nothing_written_and_nothing_plastic_are_said():
    model = tiny()
    assert str(fw.Episode(model).drift()) == "no plastic linears: nothing can drift"
    fw.attach(model, [1], RULE)
    drift = fw.Episode(model).drift()
    assert str(drift).splitlines()[-1].startswith("Nothing has changed. The logs take ")
    assert all(each.largest_event is None and each.norm == each.relative == each.lost == 0 for each in drift.rows)


def test_the_dict_is_json_with_none_where_an_event_is_folded():
    _, _, episode = fed(30, overflow="compress", rank=4)
    drift = json.loads(json.dumps(episode.drift().to_list(), allow_nan=False))
    assert len(drift) == 6
    assert drift[0]["name"] == "layers.1.mlp.gate_proj"
    assert drift[0]["event_norms"][:28] == [None] * 28
    assert drift[0]["largest_event"] in (29, 30)
    assert drift[0]["norm"] == episode.drift().rows[0].norm
