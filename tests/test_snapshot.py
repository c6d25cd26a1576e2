"""Moving through time: undo, forks into other rows, and episodes on disk."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from test_episode import BITS, CLOSE, RULES, rules, same_state
from tiny import prompt, tiny

import fastweights as fw
from fastweights import snapshot as on_disk

MIXED = {**RULES, "evicting": fw.Hebbian(rate=0.2), "compressing": fw.Hebbian(rate=0.2, decay=0.1)}


def plastic(rule, overflow="grow", seed=0, **options):
    model = tiny(seed=seed)
    fw.attach(model, [1, 2], rule, rank=4, overflow=overflow, **options)
    return model


@rules
def test_undo_equals_never_having_written_up_to_the_kv_cache(rule):
    model, ids = plastic(rule), prompt(2, 9)
    episode, twin = fw.Episode(model, 2), fw.Episode(model, 2)
    episode.feed(ids)
    written = episode.events
    episode.undo(4)
    twin.feed(ids, update=list(range(written - 4)))
    assert episode.event_counts == twin.event_counts
    for site in episode.logs:
        for row in range(2):
            torch.testing.assert_close(episode.delta_weight(*site, row), twin.delta_weight(*site, row), **CLOSE)
    with pytest.raises(ValueError, match=rf"undo\(99\): layers.1.mlp.gate_proj has {written - 4} events in row 0"):
        episode.undo(99)
    with pytest.raises(ValueError, match="expected a whole number"):
        episode.undo(-1)


def test_undo_behind_a_fold_needs_an_archive():
    ids = prompt(1, 20)
    episode = fw.Episode(plastic(RULES["hebbian"], "compress"))
    episode.feed(ids)
    with pytest.raises(ValueError, match=r"cannot go back behind event 20 of 20 .*attach with archive=True"):
        episode.undo(1)
    archived, twin = (fw.Episode(plastic(RULES["hebbian"], "compress", archive=True)) for _ in range(2))
    archived.feed(ids)
    archived.undo(8)
    twin.feed(ids[:, :12])
    for site in archived.logs:
        torch.testing.assert_close(archived.delta_weight(*site), twin.delta_weight(*site), **CLOSE)


@rules
def test_one_row_forks_into_a_tree_of_continuations(rule):
    model = plastic(rule)
    episode = fw.Episode(model, 2)
    episode.feed([[3, 4, 5, 6, 7], [8, 9, 10]])
    tree = episode.fork(rows=[1, 0, 1])
    assert tree.lengths == [3, 5, 3]
    more = torch.tensor([[11, 12], [13, 14], [15, 16]])
    logits = tree.feed(more)
    for row, past in enumerate(([8, 9, 10], [3, 4, 5, 6, 7], [8, 9, 10])):
        alone = fw.Episode(model)
        alone.feed(past)
        torch.testing.assert_close(logits[row], alone.feed(more[row])[0], **CLOSE)
        for site in alone.logs:
            torch.testing.assert_close(tree.delta_weight(*site, row), alone.delta_weight(*site), **CLOSE)
    assert episode.lengths == [5, 3]
    with pytest.raises(ValueError, match=r"fork\(rows=\[2\]\): this episode has rows 0 to 1"):
        episode.fork(rows=[2])


@pytest.mark.parametrize("name", MIXED)
def test_a_saved_episode_goes_on_with_the_same_bits(name, tmp_path):
    overflow = {"evicting": "evict", "compressing": "compress"}.get(name, "grow")
    model = plastic(MIXED[name], overflow)
    episode = fw.Episode(model, 2)
    episode.feed([[3, 4, 5, 6, 7, 8, 9], [8, 9, 10]])
    list(episode.generate(None, 4, temperature=1.0, seed=5, stop_token_ids=()))
    episode.save(tmp_path / "deep" / "episode.safetensors")
    twin = fw.Episode.load(plastic(MIXED[name], overflow), tmp_path / "deep" / "episode.safetensors")
    same_state(twin, episode, **BITS)
    options = {"max_new_tokens": 6, "temperature": 1.0, "update": "all", "stop_token_ids": ()}
    pairs = zip(twin.generate(**options), episode.generate(**options), strict=True)
    for ours, theirs in pairs:
        assert torch.equal(ours.token_ids, theirs.token_ids)
        torch.testing.assert_close(ours.logits, theirs.logits, **(BITS if name != "gradient" else CLOSE))
    assert os.listdir(tmp_path / "deep") == ["episode.safetensors"]


def test_rules_of_both_kinds_wait_again_after_loading(tmp_path):
    def model():
        model = tiny()
        fw.attach(model, [1], fw.Hebbian(rate=0.2), overflow="grow")
        fw.attach(model, [2], fw.GradientAscent(rate=0.3), overflow="grow")
        return model

    episode = fw.Episode(model())
    episode.feed(prompt(1, 7))
    episode.save(tmp_path / "e")
    twin = fw.Episode.load(episode.model, tmp_path / "e")
    torch.testing.assert_close(twin.feed([5, 6]), episode.feed([5, 6]), **CLOSE)
    same_state(twin, episode, **CLOSE)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: plastic(RULES["hebbian"], seed=1), "belongs to another model"),
        (lambda: plastic(RULES["slow"]), "was saved with 1.down_proj: Hebbian, .*but this model has .*LocalLeast"),
        (lambda: tiny(), "but this model has no plastic linears"),
        (lambda: plastic(RULES["hebbian"], "evict"), "the saved log has overflow 'grow', expected 'evict'"),
    ],
)
def test_a_file_of_another_model_or_rule_is_refused(other, message, tmp_path):
    episode = fw.Episode(plastic(RULES["hebbian"]))
    episode.feed([3, 4])
    episode.save(tmp_path / "e")
    with pytest.raises(ValueError, match=message):
        fw.Episode.load(other(), tmp_path / "e")


def test_broken_and_missing_files_are_refused_by_name(tmp_path):
    model = plastic(RULES["hebbian"])
    episode = fw.Episode(model)
    episode.feed([3, 4])
    episode.save(tmp_path / "e")
    whole = (tmp_path / "e").read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="half is not a whole safetensors file"):
        fw.Episode.load(model, tmp_path / "half")
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        fw.Episode.load(model, tmp_path / "none")
    fw.save(tiny(), tmp_path / "model")
    with pytest.raises(ValueError, match="has format None, expected 'fastweights episode 2'"):
        fw.Episode.load(model, tmp_path / "model" / "model.safetensors")


def test_a_save_that_is_killed_half_way_leaves_the_old_file_whole(tmp_path):
    episode = fw.Episode(plastic(RULES["hebbian"]))
    episode.feed([3, 4])
    episode.save(tmp_path / "e")
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(os.path.dirname(__file__))!r})
import fastweights as fw
from safetensors import torch as files
from test_snapshot import RULES, plastic
episode = fw.Episode(plastic(RULES["hebbian"]))
episode.feed([3, 4, 5])
write = files.save_file
def half(tensors, path, metadata):
    write(tensors, path, metadata)
    os.truncate(path, 1000)
    os.kill(os.getpid(), signal.SIGKILL)
files.save_file = half
episode.save({str(tmp_path / "e")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    same_state(fw.Episode.load(episode.model, tmp_path / "e"), episode, **BITS)


def test_the_fingerprint_tells_models_apart_and_not_runs():
    assert on_disk.fingerprint(tiny()) == on_disk.fingerprint(tiny())
    assert on_disk.fingerprint(tiny()) != on_disk.fingerprint(tiny(seed=1))
    assert on_disk.fingerprint(tiny()) != on_disk.fingerprint(tiny(rope_theta=20000.0))
