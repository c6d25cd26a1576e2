"""What every layer would say, and a mood put into the stream.

    python examples/lens_and_steering.py

First the logit lens: the residual stream after each layer, read as if the model ended there. Then steering: the
difference between happy and unhappy sentences, added to the stream of layer 12 while the model reads and writes.
"""

import fastweights as fw

QUESTIONS = [
    ("The capital of France is", " Paris"),
    ("IPhone was developed by", " Apple"),
    ("In this text the word IPhone means Windows operating system. IPhone was developed by", " Microsoft"),
]
THINGS = ("film", "food", "music", "book", "trip", "hotel")
PROMPT = "In my opinion, this restaurant is"
GOOD = [" great", " good", " wonderful", " excellent", " amazing"]
BAD = [" bad", " terrible", " awful", " horrible", " boring"]

SUMMARY = """
The mood turns the words that come next, on both sides, but not evenly: the model starts out friendly. A
direction is good for about the length of the stream. Beyond that the text breaks, and the size does not show
in the direction's name: print its norm beside the stream's. A 135M model wanders off in its own words after a
sentence at the best of times. No sparse autoencoder for it is at hand; with one, `fw.load_sae` and its `set`
give an edit of a single feature, which goes where `fw.steer` stands here."""


def lens_table(model, tokenizer, episode):
    """Rank of the answer after every layer, for each question."""
    ranks, after = {}, (0, 5, 10, 15, 20, 24, 26, 28, 29, 30)
    print("rank of the answer after n layers (0 = first choice)\n" + " " * 13 + "".join(f"{n:>6}" for n in after))
    for text, answer in QUESTIONS:
        trace = episode.probe(tokenizer.encode(text), sites="resid_post", positions="last")
        logits = fw.lens(model, trace.hidden_states[:, 0, -1])
        ranks[answer] = fw.rank(logits, tokenizer.encode(answer)[0]).tolist()
        said = tokenizer.tokens(logits[-1].topk(4).indices.tolist())
        print(f"{answer!r:13}" + "".join(f"{ranks[answer][n]:>6}" for n in after) + f"   {text!r} → {said}")
    return ranks


def direction(tokenizer, episode, good, bad):
    """The mean stream after the last token of some texts, minus that of others, after each layer: [L, D]."""
    sides = [[tokenizer.encode(text) for text in texts] for texts in (good, bad)]
    means = [
        episode.probe(ids, sites="resid_post", positions="last")["resid_post"].flatten(1, 2).mean(1) for ids in sides
    ]
    return means[0] - means[1]


def main(layer=12, new_tokens=16):
    model, tokenizer = fw.load()
    print(fw.anatomy(model), "\n")
    episode = fw.Episode(model)
    ranks = lens_table(model, tokenizer, episode)

    ids = tokenizer.encode(PROMPT)
    good, bad = ([tokenizer.encode(word)[0] for word in words] for words in (GOOD, BAD))
    mood = direction(tokenizer, episode, *([f"The {n} was {w}" for n in THINGS] for w in ("wonderful", "terrible")))
    stream = episode.probe(ids, sites="resid_post", layers=layer)["resid_post", layer][0].norm(dim=-1)
    size, usual = float(mood[layer].norm()), [round(float(x)) for x in (stream[1:].min(), stream[1:].max())]
    print(f"\nsteering after block {layer}: ‖wonderful − terrible‖ = {size:.0f}, the stream {usual[0]} to {usual[1]},")
    print(f"or {float(stream[0]):.0f} at the first token, where attention is parked")
    print(f"\n{PROMPT!r}: mean logit of five good words minus that of five bad ones")
    strengths, lean = (-4, -2, -1, 0, 1, 2, 4), {}
    print(f"{'strength':16}" + "".join(f"{strength:>7}" for strength in strengths))
    for name, positions in (("last position", "last"), ("every position", None)):
        sweep = [fw.steer("resid_post", mood[layer], s, layers=layer, positions=positions) for s in strengths]
        logits = episode.probe(ids, sweep=sweep, logits="last").logits[:, 0, -1]
        lean[name] = (logits[:, good].mean(-1) - logits[:, bad].mean(-1)).tolist()
        print(f"{name:16}" + "".join(f"{x:7.2f}" for x in lean[name]))

    # The same contrast of two texts of one token is the difference of two first tokens, whose stream is far longer.
    single = direction(tokenizer, episode, [" wonderful"], [" terrible"])[layer]
    print("\nwhat it writes, steered at every token that chooses the next one")
    written = {}
    for name, way, strength in (
        ("unhappy", mood[layer], -1),
        ("as it is", mood[layer], 0),
        ("happy", mood[layer], 1),
        ("too happy", mood[layer], 10),
        ("from one-token texts", single, 1),
    ):
        edit = fw.steer("resid_post", way, strength, layers=layer, positions="last")
        steps = episode.fork().generate(ids, new_tokens, tokenizer=tokenizer, edits=[edit])
        written[name] = "".join(step.text[0] for step in steps)
        print(f"  {name:21} + {strength * float(way.norm()):6.0f}  {written[name]!r}")
    print(SUMMARY)
    return {
        "ranks": ranks,
        "lean": lean,
        "norm": size,
        "single": float(single.norm()),
        "stream": stream.tolist(),
        "written": written,
    }


if __name__ == "__main__":
    main()
