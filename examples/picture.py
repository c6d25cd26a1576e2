"""Draws docs/events.png: how far each plastic linear has moved after every event, and what the question gives then.

    pip install -e ".[demo,report]" && python examples/picture.py

The run is the first half of `fastweights demo`: gradient ascent after every token of the context, layers 11 to 13.
"""

from pathlib import Path

import matplotlib.pyplot as plt

import fastweights as fw

HERE = Path(__file__).resolve().parent
COLOURS = {"gate_proj": "#2f6db5", "up_proj": "#d1495b", "down_proj": "#3a8f5c"}
STYLES = {11: "-", 12: "--", 13: ":"}


def experiment():
    """The record of the run, and the drift of every plastic linear after each event."""
    drifts = []
    model, tokenizer = fw.load(dtype="float32")
    record = fw.surgery(
        model,
        tokenizer,
        context=(HERE / "context.txt").read_text(),
        question=(HERE / "question.txt").read_text(),
        answers=["A", "B"],
        layers=[11, 12, 13],
        rule=fw.GradientAscent(rate=0.3, clip=0.005),
        on_event=lambda episode, event: drifts.append(episode.drift()),
    )
    return record, drifts


def draw(record, drifts, path: Path) -> None:
    """The picture, as a PNG with a white background of its own: it reads the same on white and on dark pages."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(9.6, 5.2), height_ratios=[1.3, 1], layout="tight")
    events = range(len(drifts) + 1)
    for n, linear in enumerate(drifts[-1].rows):
        moved = [0.0, *(100 * drift.rows[n].relative for drift in drifts)]
        label = f"layer {linear.layer} {linear.linear}"
        above.plot(events, moved, STYLES[linear.layer], color=COLOURS[linear.linear], label=label, lw=1.5)
    for answer, colour in ((0, "#222222"), (1, "#b8860b")):
        name, target = record.answers[answer], float(record.target_logprob[answer])
        below.plot(events, record.logprob[:, answer], color=colour, lw=1.5, label=f"log p({name})")
        below.axhline(target, color=colour, lw=1, ls=(0, (1, 3)), label=f"log p({name}) when the\ncontext is in front")
    title = {"loc": "left", "fontsize": 10, "weight": "bold"}
    above.set_title("A context is read: how far each plastic linear has moved, after every event", **title)
    above.set_ylabel("‖ΔW‖ / ‖W‖, %")
    below.set_title("Its question, asked after every event without the context", **title)
    below.set_ylabel("nats")
    below.set_xlabel("event: the token that wrote it")
    tokens = [event.token.strip() or "␣" for event in record.events]
    below.set_xticks(list(events), ["untouched", *tokens], rotation=90, fontsize=7)
    below.set_xlim(-0.5, len(drifts) + 0.5)
    for axes in (above, below):
        axes.grid(axis="y", color="#dddddd", lw=0.6)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(*experiment(), HERE.parent / "docs" / "events.png")
