"""Linear probes against what must be readable and what must not, weights on raw x, and slerp against its formula."""

import math
import sys

import numpy as np
import pytest
import torch

import fastweights as fw


def blobs(classes=3, each=20, width=6, apart=6.0, seed=0):
    """x [2, N, D] whose layer 0 holds the class and layer 1 nothing, far from standardised; y [N]."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat(each)
    means = torch.randn(classes, width, generator=generator) * apart
    noise = torch.randn(2, len(y), width, generator=generator)
    x = torch.stack([means[y] + noise[0], noise[1]])
    return x * torch.logspace(-2, 2, width) + torch.linspace(-50, 50, width), y


def test_a_class_that_is_there_is_found_and_one_that_is_not_stays_at_chance():
    x, y = blobs()
    probe = fw.linear_probe(x, y)
    assert probe.score.shape == probe.control.shape == (2, 5)
    assert probe.score[0].tolist() == [1.0] * 5
    assert float(probe.score[1].mean()) < 0.55
    assert float(probe.control[0].mean()) < 0.55
    assert probe.classes == [0, 1, 2]
    assert repr(probe).startswith(
        "LinearProbe of 3 classes, layers 2, folds 5: best at index 0, score 1.000, control 0."
    )


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_act_on_raw_x_and_give_scikit_learns_probabilities(classes, dtype):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, y = blobs(classes, apart=0.5)
    x = x.to(dtype)
    probe = fw.linear_probe(x, y)
    assert probe.weights.shape == (2, classes, 6)
    assert probe.weights.dtype == probe.bias.dtype == dtype
    for layer in range(2):
        z = StandardScaler().fit_transform(x[layer].double().numpy())
        expected = LogisticRegression(max_iter=1000).fit(z, y.numpy()).predict_proba(z)
        found = (x[layer] @ probe.weights[layer].T + probe.bias[layer]).softmax(-1)
        np.testing.assert_allclose(found.double().numpy(), expected, atol=1e-3 if dtype == torch.float32 else 1e-9)


def test_held_out_accuracy_equals_a_loop_over_the_folds():
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    x, y = blobs(apart=0.4)
    probe = fw.linear_probe(x, y, folds=4, seed=3)
    for layer in range(2):
        folds = StratifiedKFold(4, shuffle=True, random_state=3).split(x[layer], y)
        for fold, (train, test) in enumerate(folds):
            mean, spread = x[layer, train].mean(0), x[layer, train].std(0, correction=0)
            fit = LogisticRegression(max_iter=1000).fit((x[layer, train] - mean) / spread, y[train])
            right = fit.predict((x[layer, test] - mean) / spread) == y[test].numpy()
            assert float(probe.score[layer, fold]) == pytest.approx(right.mean())


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(["no", "yes"], ["no", "yes"]), ([False, True], [False, True]), ([7, 3], [3, 7])],
)
def test_labels_may_be_texts_bools_or_numbers_in_any_container(labels, classes):
    x, y = blobs(2)
    named = [labels[i] for i in y.tolist()]
    found = fw.linear_probe(x[0], named)
    assert found.classes == classes
    assert found.score.shape == (1, 5)
    assert torch.equal(found.score, fw.linear_probe(x[0].numpy(), np.array(named)).score)
    predicted = (x[0] @ found.weights[0].T + found.bias[0]).argmax(-1).tolist()
    assert [found.classes[i] for i in predicted] == named


def test_floats_are_regressed_on_raw_x():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 60, 4, generator=generator, dtype=torch.float64) * torch.tensor([0.01, 1, 10, 100.0]) + 7
    y = x[0] @ torch.tensor([100.0, 1, 0.1, 0.01], dtype=torch.float64) + 3
    probe = fw.linear_probe(x, y)
    assert (probe.classes, probe.weights.shape, probe.bias.shape) == ([], (2, 1, 4), (2, 1))
    assert float(probe.score[0].min()) > 0.99
    assert float(probe.score[1].max()) < 0.3
    assert float(probe.control.max()) < 0.3
    predicted = (x[0] @ probe.weights[0].T + probe.bias[0])[:, 0]
    assert float((predicted - y).norm() / (y - y.mean()).norm()) < 0.03


def test_a_seed_gives_the_same_numbers_again_and_another_seed_others():
    x, y = blobs(apart=0.4)
    one, same, other = fw.linear_probe(x, y, seed=1), fw.linear_probe(x, y, seed=1), fw.linear_probe(x, y, seed=2)
    for name in ("score", "control", "weights", "bias"):
        assert torch.equal(getattr(one, name), getattr(same, name))
    assert not torch.equal(one.control, other.control)
    assert torch.equal(one.weights, other.weights)


X = torch.randn(2, 10, 3)


@pytest.mark.parametrize(
    ("x", "y", "folds", "message"),
    [
        (X, [0, 1] * 4, 5, "got 8 labels for 10 examples"),
        (X, [0] * 10, 5, "got a single class, 0: expected two or more"),
        (X, [0] * 6 + [1] * 4, 5, r"linear_probe\(folds=5\) got 4 of the class 1: every class needs 5"),
        (X, ["a"] * 7 + ["b"] * 3, 4, "got 3 of the class 'b'"),
        (X, [0, 1] * 5, 1, r"linear_probe\(folds=1\): expected a whole number, 2 or more"),
        (X[0, 0], [0, 1], 2, r"got x \[3\] of torch.float32: expected floats \[L, N, D\] or \[N, D\]"),
        (X.long(), [0, 1] * 5, 5, "of torch.int64: expected floats"),
        (X.log(), [0, 1] * 5, 5, "got x with numbers that are not finite"),
        (X, [0.5, math.nan] * 5, 5, "got y with numbers that are not finite"),
        (X, [0.5] * 10, 5, "got y of one value, 0.5"),
        (X, torch.linspace(0, 1, 10), 6, "got 10 examples: a regression needs 12"),
        (X, ["a", 1] * 5, 5, "got y of texts and other things"),
        (X, [[0, 1]] * 5, 5, r"got y \[5, 2\] of int64: expected \[N\]"),
        (X, [None, 1] * 5, 5, r"got y \[10\] of object: expected \[N\]"),
        (X, [[0], [1, 2]], 5, "got y that is no list of labels"),
    ],
)
def test_what_cannot_be_probed_is_refused(x, y, folds, message):
    with pytest.raises(ValueError, match=message):
        fw.linear_probe(x, y, folds)


def test_without_scikit_learn_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r'pip install "fastweights\[probes\]"'):
        fw.linear_probe(*blobs())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_slerp_turns_at_a_constant_angle_and_its_norm_grows_linearly(dtype):
    a, b = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    b = 3 * b
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for share in (0.0, 0.25, 0.7, 1.0):
        c = fw.slerp(a, b, share)
        assert c.dtype == dtype
        for i in range(3):
            for j in range(5):
                u, v, w = (x[i, j].double() for x in (a, b, c))
                whole, part = (
                    (math.acos(float(u @ x / u.norm() / x.norm().clip(1e-9))) for x in (v, w)) if share else (1, 0)
                )
                assert part == pytest.approx(share * whole, abs=5 * tolerance)
                norm = (1 - share) * float(u.norm()) + share * float(v.norm())
                assert float(w.norm()) == pytest.approx(norm, rel=tolerance)


def test_slerp_of_a_quarter_turn_and_of_shares_in_a_tensor():
    a, b = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    half = fw.slerp(a, b, 0.5)
    torch.testing.assert_close(half, torch.tensor([0.5, 0.5], dtype=torch.float64).sqrt())
    way = fw.slerp(a, b, torch.tensor([0.0, 1 / 3, 1.0], dtype=torch.float64))
    expected = [[1, 0], [math.cos(math.pi / 6), math.sin(math.pi / 6)], [0, 1]]
    torch.testing.assert_close(way, torch.tensor(expected, dtype=torch.float64))


def test_slerp_of_nearly_parallel_vectors_is_linear():
    a = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(fw.slerp(a, 3 * a, 0.5), 2 * a)
    torch.testing.assert_close(fw.slerp(a, a, 0.3), a)
    b = a + torch.tensor([1e-5, 0, 0])
    torch.testing.assert_close(fw.slerp(a, b, 0.5), (a + b) / 2)


@pytest.mark.parametrize(
    ("a", "b", "share", "message"),
    [
        (torch.ones(3), -2 * torch.ones(3), 0.5, "got opposite vectors"),
        (torch.ones(3), torch.zeros(3), 0.5, "a vector without a direction"),
        (torch.ones(3), torch.ones(4), 0.5, "got widths 3 and 4"),
        (torch.ones(3), torch.tensor([1.0, 0, 0]), 1.5, r"slerp\(share=1.5\): expected a share from 0 to 1"),
        (torch.ones(3), torch.ones(3).long(), 0.5, r"got torch.float32 \[3\] and torch.int64 \[3\]"),
    ],
)
def test_what_slerp_cannot_turn_is_refused(a, b, share, message):
    with pytest.raises(ValueError, match=message):
        fw.slerp(a, b, share)
