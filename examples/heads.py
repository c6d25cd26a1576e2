"""What single attention heads do: names, sequences, successors, copies.

    python examples/heads.py

Three tasks on the default model: whom a sentence names next (indirect object identification), the number after a
sequence, and what every head writes about a token. All of it is edits of sites and sweeps of such edits.
"""

import torch

import fastweights as fw

PAIRS = [("John", "Mary"), ("Tom", "James"), ("Mark", "Sarah"), ("David", "Paul")]
NAMES = [" " + name for pair in PAIRS for name in pair]
STORY = "When {a} and {b} went to the store, {s} gave a drink to"
DAYS = [" Monday", " Tuesday", " Wednesday", " Thursday", " Friday", " Saturday", " Sunday"]

SUMMARY = """
A model of 135M parameters does these tasks, and few heads carry them. Head 23.3 carries two at once, and not by
copying: it attends to the name or number that is not to come again, and pushes it down. The heads that write
successors by their weights are not the ones that the sequences need most: ask for both. The shares of single heads
need not sum to the whole, as heads behind may make up for an ablated one."""


def best(scores_LH, k=4, first=0):
    """The k heads with the largest score above 0: {"layer.head": score}; row 0 is layer `first`."""
    pairs = zip(*scores_LH.flatten().topk(k), strict=True)
    heads = scores_LH.shape[1]
    return {f"{first + int(i) // heads}.{int(i) % heads}": round(float(v), 2) for v, i in pairs if v > 0}


def direct(episode, exam, part):
    """What one part of the stream adds to the logits of each answer by itself: mean over the prompts, [A]."""
    sites = ["embedding", "result", "mlp_out"]
    names, parts = fw.decompose(episode.model, episode.probe(exam.rows, sites=sites, positions="last"))
    answers = torch.tensor(exam.answer_ids)[..., 0]  # [P, A]
    wrote = parts[names.index(part), :, -1]  # [P, D]
    return torch.einsum("pd,pad->pa", wrote, episode.model.lm_head.weight[answers]).mean(0).tolist()


def names(episode, tokenizer, pairs, layers):
    """Which positions and heads carry the answer of "When A and B went …, A gave a drink to" → B."""
    rows = [(a, b, s) for a, b in pairs for s in (a, b)]
    answers = [[" " + (b if s == a else a), " " + s] for a, b, s in rows]
    clean = fw.Exam(tokenizer, [STORY.format(a=a, b=b, s=s) for a, b, s in rows], answers)
    other = [STORY.format(a=a, b=b, s=b if s == a else a) for a, b, s in rows]  # the second subject swapped
    corrupt = fw.Exam(tokenizer, other, answers)
    source = episode.probe(clean.rows, sites=["resid_pre", "z", "pattern"])
    right, wrong = episode.probe(clean).scores, episode.probe(corrupt).scores
    high, low = right.difference.mean(), wrong.difference.mean()

    def restored(sweep):
        """The share of the answer that comes back, one per edit: 0 = as corrupt, 1 = as clean."""
        return (episode.probe(corrupt, sweep=sweep).scores.difference.mean(-1) - low) / (high - low)

    depth, heads = episode.model.config.num_hidden_layers, episode.model.config.num_attention_heads
    last = len(clean.rows[0]) - 1
    (second,) = (p for p in range(last) if clean.rows[0][p] != corrupt.rows[0][p])  # the same in all rows
    places = [(layer, p) for layer in range(depth) for p in (second, last)]
    stream = restored([fw.patch("resid_pre", source, layers=l, positions=p) for l, p in places]).reshape(depth, 2)
    sweep = [fw.patch("z", source, layers=l, heads=h, positions=last) for l in layers for h in range(heads)]
    single = restored(sweep).reshape(len(layers), heads)
    looks = float(source["pattern", 23][:, 3, last, second].mean())
    first, adds = int((right.rank[:, 0] == 0).sum()), direct(episode, clean, "L23 H3")
    print(f"names: the other name is the first choice in {first} of {len(rows)}, ahead by {float(high):.2f} nats")
    print("the clean stream in the corrupt run brings back of the answer, layer by layer (at A again, at the end)")
    print("   ", "  ".join(f"{l}: {stream[l, 0]:.2f} {stream[l, 1]:.2f}" for l in (0, 10, 18, 20, 21, 23, 24, 26)))
    print("one head at the end:", best(single, first=min(layers)))
    print(f"head 23.3 looks from the end at the subject that came twice, with {looks:.2f} of its attention,")
    print(f"and adds {adds[1]:+.1f} to the logit of that name and {adds[0]:+.1f} to the other's")
    return {"first": first, "mean": float(high), "stream": stream, "heads": single, "looks": looks, "adds": adds}


def sequence(episode, tokenizer):
    """Which heads the next number needs: all of them mean-ablated, one at a time, and the best ones while it writes."""
    depth, heads = episode.model.config.num_hidden_layers, episode.model.config.num_attention_heads
    starts = range(1, 6)
    answers = [[str(s + 4), str(s + 3)] for s in starts]  # the next number, or the last one again
    exam = fw.Exam(tokenizer, [", ".join(map(str, range(s, s + 4))) + ", " for s in starts], answers)
    shuffled = ["7, 2, 9, 4, ", "3, 8, 1, 6, ", "5, 1, 7, 2, ", "9, 6, 3, 8, ", "2, 4, 8, 5, ", "6, 9, 4, 1, "]
    reference = episode.probe([tokenizer.encode(text) for text in shuffled], sites="z")
    places = [(layer, head) for layer in range(depth) for head in range(heads)]
    edits = [fw.ablate("z", "mean", reference, layers=l, heads=h) for l, h in places]
    before = episode.probe(exam).scores.difference
    change = (episode.probe(exam, sweep=edits).scores.difference - before).mean(-1)
    adds = direct(episode, exam, "L23 H3")
    print(f"\nsequences: the next number is ahead of the last one by {float(before.mean()):.2f} nats")
    print("a head mean-ablated changes that by:", {name: -v for name, v in best(-change.reshape(depth, heads)).items()})
    print(f"head 23.3 adds {adds[1]:+.1f} to the logit of the last number and {adds[0]:+.1f} to the next one's")
    worst, written = change.argsort().tolist(), {}
    for text in ("1, 2, 3, 4,", "one, two, three, four,"):
        for n in (0, 1, 4, 6):
            chosen = [edits[i] for i in worst[:n]]
            steps = episode.fork().generate(tokenizer.encode(text), 11, tokenizer=tokenizer, edits=chosen)
            written[text, n] = "".join(step.text[0] for step in steps)
            print(f"  {n} heads ablated while it writes: {text}{written[text, n]!r}")
    return {"sequence": change.reshape(depth, heads), "written": written, "sequence_adds": adds}


def weights(model, tokenizer):
    """What heads write about a token they attend to, read off their weights alone: [L, H] shares of five or better."""

    def share(sources, targets, sign=1):
        ranks = (
            fw.rank(sign * fw.ov(model, l, sources), torch.tensor(targets)) for l in range(len(model.model.layers))
        )
        return torch.stack([(rank < 5).float().mean(-1) for rank in ranks])

    days, digits, people = ([tokenizer.encode(t)[0] for t in texts] for texts in (DAYS, "0123456789", NAMES))
    found = {"days": share(days[:-1], days[1:]), "digits": share(digits[:-1], digits[1:])}
    found |= {"copies": share(people, people), "denies": share(people, people, sign=-1)}
    print("\nwhat a head writes about a token it attends to: how often the target is among the five highest")
    print("the day after:", best(found["days"]), " the digit after:", best(found["digits"]))
    print("the name itself:", best(found["copies"]), " the name itself among the five LOWEST:", best(found["denies"]))
    return found


def attention(episode, length=25):
    """Where heads look in random tokens that come twice: one diagonal of the pattern for each kind of head, [L, H]."""
    tokens = torch.randint(1000, 40000, (4, length), generator=torch.Generator().manual_seed(0)).tolist()
    pattern = episode.probe([[0, *row, *row] for row in tokens], sites="pattern")["pattern"]
    induction = pattern.diagonal(1 - length, -2, -1).mean((1, -1))  # to the token behind the first occurrence
    previous = pattern.diagonal(-1, -2, -1).mean((1, -1))
    print("\nattention in random tokens that come twice: induction", best(induction), " previous token", best(previous))
    return {"induction": induction, "previous": previous}


def main(pairs=PAIRS, layers=range(16, 30)):
    model, tokenizer = fw.load()
    episode = fw.Episode(model)
    found = names(episode, tokenizer, pairs, list(layers)) | sequence(episode, tokenizer)
    found |= weights(model, tokenizer) | attention(episode)
    print(SUMMARY)
    return found


if __name__ == "__main__":
    main()
