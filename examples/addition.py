"""How a small model adds three-digit numbers: when the answer appears, where operands go, what can be read off.

    pip install "fastweights[probes]" && python examples/addition.py

One solved sum stands in front of each question. Digits are tokens of their own, so the model says its answer digit by
digit, and the first digit it has to say is the one of the hundreds.
"""

import random

import fastweights as fw

SHOT = "122 + 125 = 247; "
PAIRS = [(161, 224), (161, 395), (353, 214), (499, 412), (121, 540)]

SUMMARY = """
A probe finds the operand at the end from early on, and patches say that the answer depends on it there only
behind layer 20: what can be read off is not yet what is used. The units of the sum are nowhere at the end, to
a linear probe, while the first digit is chosen; that the model often gets them right comes later, when they
are the next token. A 135M model knows the form of a sum, and most of its sums are wrong."""


def question(a, b):
    return f"{SHOT}{a} + {b} = "


def answers(model, tokenizer, pairs):
    """What the model says to each sum, three digits."""
    ids = [tokenizer.encode(question(a, b)) for a, b in pairs]
    said = [""] * len(pairs)
    episode = fw.Episode(model, len(pairs), max_length=max(map(len, ids)) + 3)  # as much KV cache as is needed
    for step in episode.generate(ids, 3, tokenizer=tokenizer):
        said = [text + new for text, new in zip(said, step.text, strict=True)]
    return said


def arrival(episode, tokenizer):
    """The stream of 353 + 214, put into the run of 153 + 214: where does the answer turn from 3 to 5? [L, positions]"""
    clean, corrupt = (tokenizer.encode(question(a, 214)) for a in (353, 153))
    (operand,) = (column for column in range(len(clean)) if clean[column] != corrupt[column])
    source = episode.probe(clean, sites="resid_pre")
    exam = fw.Exam(tokenizer, [question(153, 214)], [["5", "3"]])
    columns, depth = range(operand, len(clean)), episode.model.config.num_hidden_layers
    sweep = [fw.patch("resid_pre", source, layers=l, positions=p) for l in range(depth) for p in columns]
    moved = episode.probe(exam, sweep=sweep).scores.difference.reshape(depth, len(columns))
    low = episode.probe(exam).scores.difference
    high = episode.probe(fw.Exam(tokenizer, [question(353, 214)], [["5", "3"]])).scores.difference
    return (moved - low) / (high - low)


def main(sums=200, layers=(4, 14, 21, 29)):
    model, tokenizer = fw.load()
    episode = fw.Episode(model)
    rng = random.Random(0)
    pairs = [(rng.randrange(100, 500), rng.randrange(100, 500)) for _ in range(sums)]

    known = answers(model, tokenizer, PAIRS)
    print("  ".join(f"{a} + {b} = {text} ({a + b})" for (a, b), text in zip(PAIRS, known, strict=True)))
    said = answers(model, tokenizer, pairs)
    true = [str(a + b) for a, b in pairs]
    whole = sum(s == t for s, t in zip(said, true, strict=True)) / sums
    digits = [sum(s[n : n + 1] == t[n] for s, t in zip(said, true, strict=True)) / sums for n in range(3)]
    print(
        f"of {sums} sums {whole:.0%} are right; hundreds {digits[0]:.0%}, tens {digits[1]:.0%}, units {digits[2]:.0%}"
    )

    ids = tokenizer.encode(question(353, 214))
    hidden = episode.probe(ids, sites="resid_post", positions="last").hidden_states[:, 0, -1]
    five = tokenizer.encode("5")[0]
    rank = fw.rank(fw.lens(model, hidden), five)
    right_from = int((rank > 0).nonzero()[-1]) + 1
    print(
        f"\n353 + 214, the lens at the last position: the 5 is the first choice after {right_from} layers and stays it"
    )
    print("  rank of the 5 after n layers:", {n: int(rank[n]) for n in (0, 10, 20, 22, 24, 25, 26, 28, 30)})

    moved = arrival(episode, tokenizer)
    arrives = int((moved[:, -1] > 0.5).nonzero()[0])
    print(f"\nthe operand's first digit reaches the last position in layer {arrives - 1}, before and after:")
    for layer in range(arrives - 2, arrives + 2):
        print(
            f"  stream before layer {layer}: at the operand {moved[layer, 0]:5.2f}, at the end {moved[layer, -1]:5.2f}"
        )

    rows = [tokenizer.encode(question(a, b)) for a, b in pairs]
    x_LND = episode.probe(rows, sites="resid_post", layers=layers, positions="last")["resid_post"][:, :, 0]
    labels = {
        "first operand, hundreds": [a // 100 for a, _ in pairs],
        "second operand, hundreds": [b // 100 for _, b in pairs],
        "first operand, units": [a % 10 for a, _ in pairs],
        "sum, units": [(a + b) % 10 for a, b in pairs],
    }
    print(f"\nlinear probes on the stream at the last position: share of {sums} held-out sums (with shuffled labels)")
    print(f"{'after block':26}" + "".join(f"{layer:>14}" for layer in layers) + "   by chance")
    probes = {}
    for name, y in labels.items():
        probes[name] = found = fw.linear_probe(x_LND, y, folds=4)
        cells = [f"{s:.2f} ({c:.2f})" for s, c in zip(found.score.mean(1), found.control.mean(1), strict=True)]
        print(f"{name:26}" + "".join(f"{cell:>14}" for cell in cells) + f"{1 / len(found.classes):12.2f}")
    print(SUMMARY)
    return {
        "whole": whole,
        "digits": digits,
        "right_from": right_from,
        "arrives": arrives,
        "moved": moved,
        "probes": probes,
    }


if __name__ == "__main__":
    main()
