"""A decoding loop of one's own: best of n, where every candidate has weights of its own.

    python examples/best_of_n.py

One plastic life reads a beginning. It is forked into n rows, and each row samples a continuation that writes into that
row's fast weights alone. A judge without fast weights scores the texts, the life that won goes on with its weights and
all that it read, and the others are forgotten. Nothing here is a hook: `fork`, `feed`, `fw.Sampling`, `probe`.
"""

import torch

import fastweights as fw

BEGINNING = "Once upon a time there was a small lighthouse on a rock in the sea."

SUMMARY = """
The candidates differ by far more than the two scores of one of them: at this rate the events of a few tokens hardly
change how likely the weights find the text that wrote them, and they may find it less likely. Ten times the rate moves
the scores by whole nats, and the text breaks. The winner keeps its own weights, and only those: the rows that lost
leave nothing behind."""


def continued(life, n, tokens, sampling, seed):
    """n rows that go on from one life, and the ids [n, tokens] that each of them sampled, read and wrote."""
    rows = life.fork(rows=[0] * n)
    rows.generator.manual_seed(seed)
    chosen = []
    while len(chosen) < tokens:
        next_B = sampling.choose(rows.logits, rows.token_ids, rows.generator)
        rows.feed(next_B[:, None], update="all")  # each row writes into its own weights
        chosen.append(next_B)
    return rows, torch.stack(chosen, 1)


def mean_logprob(logits, ids):
    """Mean log p of the last tokens of each row, given what stands before them: [n]."""
    tokens = ids.shape[1]
    logprob = logits[:, -tokens - 1 : -1].float().log_softmax(-1)
    return logprob.gather(-1, ids[..., None].to(logprob.device))[..., 0].mean(1)


def main(n=6, rounds=2, tokens=12, rate=0.01, temperature=0.9):
    model, tokenizer = fw.load()
    fast = fw.attach(model, layers=[11, 12, 13], rule=fw.Hebbian(rate=rate))
    sampling = fw.Sampling(temperature=temperature, top_p=0.95)
    life = fw.Episode(model)
    life.feed(tokenizer.encode(BEGINNING))
    found = []
    for number in range(rounds):
        rows, ids = continued(life, n, tokens, sampling, seed=n * number)
        texts = torch.tensor(rows.token_ids)
        judged = mean_logprob(fw.Episode(model, n).feed(texts, update="none"), ids)
        themselves = mean_logprob(rows.probe(texts).logits, ids)
        best = int(judged.argmax())
        norms = [float(fast.delta_weight(12, "up_proj", row=row, episode=rows).norm()) for row in range(n)]
        print(f"round {number + 1}: log p of each token, by the judge and by the candidate's own weights; ‖ΔW‖")
        for row in judged.argsort(descending=True).tolist():
            text = tokenizer.decode(ids[row].tolist()).replace("\n", "⏎")
            print(f"  {judged[row]:6.2f} {themselves[row]:6.2f}  {norms[row]:.3f}  {text!r}")
        found.append({"judged": judged, "themselves": themselves, "norms": norms, "best": best})
        life = rows.fork(rows=[best])  # the winner's past: what it read, and what it wrote
    text = tokenizer.decode(life.token_ids[0])
    print(f"\n{text}\n\n{life.length} tokens, {life.events} events{SUMMARY}")
    fw.detach(model)
    return {"rounds": found, "text": text, "length": life.length, "events": life.events}


if __name__ == "__main__":
    main()
