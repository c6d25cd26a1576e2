"""Surgery: the weights of three MLPs change after every token of a text, and a question is asked after every change.

    python examples/surgery.py

The target is what the model holds at the answer when the text stands in front of the question. After each event (one
change of the weights) the same question is asked without the text: what does the model answer, and how far is each
layer from the target? `fw.surgery` does this; here it runs with gradient ascent and with both forms of a local rule.
"""

from pathlib import Path

import fastweights as fw

HERE = Path(__file__).resolve().parent
CONTEXT = (HERE / "context.txt").read_text(encoding="utf-8")
QUESTION = (HERE / "question.txt").read_text(encoding="utf-8")
LAYERS_OF_INTEREST = [11, 12, 13]
TOKENS_TO_BE_UPDATED = [10, 12, 13, 59]  # positions; the text has 59 tokens, so the last is the first generated one

SUMMARY = """
A 135M model prefers A before anything has changed, so no answer here shows that it learned the fact; with the
text in front of it, it says C, which is no option. What the numbers do show is what a change does, where, and
after which token: these rules amplify what the model just did, and do not carry a text into its weights."""


def table(record, every=1):
    """What the question gave after each event; distances after the last layer and after 14, relative to the target."""
    print("event  token        log p(A) log p(B)  first    distance after 14   ‖ΔW‖")
    for row, number in enumerate(record.probed):
        if row % every and row < len(record.probed) - 1:
            continue
        token = record.events[number - 1].token if number else "(untouched)"
        a, b = record.logprob[row].tolist()
        end, middle = record.relative[row, -1], record.relative[row, max(LAYERS_OF_INTEREST) + 1]
        line = f"{number:5}  {token:12}{a:9.3f}{b:9.3f}  {record.top[row][0][0]!r:8}{end:9.3f}{middle:9.3f}"
        print(line + f"{record.delta_norm[row]:7.2f}")
    a, b = record.target_logprob.tolist()
    print(f"{'':5}  {'(target)':12}{a:9.3f}{b:9.3f}  {record.target_top[0][0]!r:8}{0:9.3f}{0:9.3f}\n")


def main():
    model, tokenizer = fw.load()

    def operate(rule, **options):
        return fw.surgery(
            model,
            tokenizer,
            context=CONTEXT,
            question=QUESTION,
            answers=["A", "B"],
            layers=LAYERS_OF_INTEREST,
            rule=rule,
            **options,
        )

    print("gradient ascent on log p(next token), after every token of the text")
    ascent = operate(fw.GradientAscent(rate=0.3, clip=0.005))
    table(ascent, every=8)

    # on_event hands over the episode after each change: a test of one's own. It may ask anything that only reads.
    continuations = []

    def test_model(episode, event):
        steps = episode.fork().generate(None, 6, update="none", tokenizer=tokenizer)
        continuations.append((event.position, event.token, "".join(step.text[0] for step in steps)))

    print(f"formula A, Hebbian, after the tokens at {TOKENS_TO_BE_UPDATED} of the text and of what follows")
    options = {"update": TOKENS_TO_BE_UPDATED, "max_new_tokens": 2}
    a = operate(fw.Hebbian(rate=0.3), on_event=test_model, **options)
    table(a)
    for position, token, text in continuations:
        print(f"  the text as it would go on after the event of token {position}, {token!r}: {text!r}")

    b = operate(fw.LocalLeastSquares(gamma=0.3), **options)
    slow = operate(fw.LocalLeastSquares(gamma=0.3, target="slow"), **options)
    apart = float((a.logprob - b.logprob).abs().max())
    print(f"\nformula B, local least squares with γ = the rate of A: log-probabilities {apart:.0e} from A's at most")
    print("formula B towards what the frozen weights gave, so that a repeated input converges")
    table(slow)

    lead = {}
    for name, record in (("gradient ascent", ascent), ("A", a), ("B, slow target", slow)):
        before, after = ((record.logprob[n, 0] - record.logprob[n, 1]).item() for n in (0, -1))
        nearer = int((record.distance[-1] < record.distance[0]).sum())
        moved = float(record.distance[-1, -1] / record.distance[0, -1]) - 1
        lead[name] = (before, after, moved, nearer)
        print(
            f"{name:16} A ahead of B: {before:.2f} → {after:.2f} nats; last layer {moved:+.1%} from the target, ",
            end="",
        )
        print(f"nearer in {nearer} of {record.distance.shape[1]} layers")
    print(SUMMARY)
    return {"ascent": ascent, "a": a, "b": b, "slow": slow, "apart": apart, "lead": lead, "tests": continuations}


if __name__ == "__main__":
    main()
