"""An adapter for lm-evaluation-harness (the extra "eval"): frozen and plastic models on any of its tasks.

Importing this file registers the model "fastweights" with the harness; nothing else here imports it.

    python -m fastweights.harness run --model fastweights --device cpu --tasks arc_easy \\
        --model_args pretrained=org/name,layers=11+12+13,rule=hebbian,rate=0.01,life=carried

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from .attach import attach
from .episode import Episode
from .episode_state import Address
from .inputs import Update
from .model import Llama
from .plastic import plastic_linears
from .progress import bar
from .rules import Delta, GradientAscent, Hebbian, LocalLeastSquares, Rule
from .state import EventLog
from .tokenizer import Tokenizer
from .weights import load

LIVES = ("document", "carried")
RULES = {
    "hebbian": Hebbian,
    "local-least-squares": LocalLeastSquares,
    "delta": Delta,
    "gradient-ascent": GradientAscent,
}
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # what tasks call it
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

Logs = Mapping[Address, EventLog]


@register_model("fastweights")
class FastWeightsLM(LM):
    """A model of fastweights as lm-evaluation-harness asks it.

    What a token scores is measured before anything of it is written. Contexts that are too long lose their beginning.

    Args:
        pretrained: a model that `fw.load` returned, plastic or not; or what `fw.load` takes.
        tokenizer: of a model that is given.
        life: "document": every request begins with the fast weights of a new episode, and the windows of one long text
            are one life. "carried": one life for everything, in the order in which the harness asks. Every request of a
            document begins with the same fast weights then. Of a document that is scored, what all its contexts begin
            with alike lives on, and never an answer; of a text that is rolled over, all of it; of a generation, the
            context and the (first) text that was generated. `reset` begins a new one.
        update: as in `feed`; contexts and texts that are rolled over are "prompt", continuations "generated".
        batch_size: requests in one batch, where lives are per document.
        max_length: tokens of context and continuation; None: all positions of the model.
        max_gen_toks: new tokens where a task does not say how many.
        add_bos_token: whether BOS comes first; None: as the tokenizer does it.
        layers, linears, rule, rank, overflow: as in `attach`, for a model without plastic linears; layers may be
            "11+12+13". A rule may be a name of the command line, and every other keyword is then an option of it.

    Raises:
        ValueError: what does not fit, before anything is read.

    Example:
        lm = FastWeightsLM(model, tokenizer, life="carried")
        lm_eval.simple_evaluate(lm, tasks=["arc_easy"])["results"]
    """

    def __init__(
        self,
        pretrained: Llama | str | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        life: str = "document",
        update: Update = "all",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        layers: int | Sequence[int] | str | None = None,
        linears: str | Sequence[str] | None = None,
        rule: Rule | str = "hebbian",
        rank: int = 64,
        overflow: str = "compress",
        **options: Any,
    ):
        super().__init__()
        if life not in LIVES:
            raise ValueError(f"life={life!r}: expected one of {', '.join(map(repr, LIVES))}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r}: expected a whole number, 1 or more")
        if options and (layers is None or not isinstance(rule, str)):
            raise ValueError(
                f"{', '.join(options)}: not an argument, and an option of a rule only with layers= and a rule's name"
            )
        if isinstance(pretrained, Llama):
            self.model = pretrained
        else:
            self.model, tokenizer = load(pretrained, dtype, device, revision)
        if not isinstance(tokenizer, Tokenizer):
            raise ValueError("the harness asks with texts, and this model came without a tokenizer: pass tokenizer=")
        self.tokenizer = tokenizer
        longest = self.model.config.max_position_embeddings
        self.max_length = longest if max_length is None else int(max_length)
        if not 2 <= self.max_length <= longest:
            raise ValueError(f"max_length={max_length!r}: expected a whole number from 2 to {longest}")
        if layers is not None:
            attach(self.model, _layers(layers), _rule(rule, options), linears, rank, overflow)
        for linear in plastic_linears(self.model).values():
            if isinstance(linear.rule.rate, tuple):
                raise ValueError(f"{linear.name} has a rate per row, but here rows are requests: expected one rate")
        self.life, self.update, self.batch_size, self.max_gen_toks = life, update, int(batch_size), int(max_gen_toks)
        self.add_bos_token = add_bos_token
        self.carried: Logs | None = None

    def reset(self) -> None:
        """Begins a new life: what was carried over is forgotten."""
        self.carried = None

    # ---- what the harness asks of every model

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eot_token_id(self) -> int:
        """The end of a text: the one that the tokenizer names, or the first at which a generation stops."""
        named = self.tokenizer.eos_token and self.tokenizer.backend.token_to_id(self.tokenizer.eos_token)
        if isinstance(named, int):
            return named
        ids = self.tokenizer.eos_token_ids or self.model.config.eos_token_ids
        if not ids:
            raise ValueError("neither the tokenizer nor config.json names an end of text, which the harness needs")
        return ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or the end of a text where the tokenizer names none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if self.tokenizer.bos_token is None or bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """The ids of a text."""
        add = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(string, add_special_tokens=True if add is None else add)

    @property
    def tokenizer_name(self) -> str:
        return f"fastweights {self.tokenizer.vocab_size} {self.chat_template(True)}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        name = chat_template if isinstance(chat_template, str) else "default"
        return self.tokenizer.chat_templates.get(name, "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(chat_history, add_generation_prompt)

    def set_cache_hook(self, cache_hook: Any) -> None:
        if self.life == "carried":
            raise ValueError(
                "use_cache would leave documents out of a life that is carried over: expected life='document'"
            )
        super().set_cache_hook(cache_hook)

    # ---- the three kinds of requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether greedy decoding says it) of each request."""
        pairs = [self._pair(*request.args) for request in requests]
        found = [(0.0, True)] * len(pairs)
        if self.life == "document":
            score, parts = self._score_alone, self._batches([sum(map(len, pair)) for pair in pairs])
        else:
            score, parts = self._score_document, _documents(requests)
        for part in _shown("loglikelihood", parts, len(pairs), disable_tqdm):
            for n, scored in zip(part, score([pairs[n] for n in part]), strict=True):
                found[n] = scored
        return self._cached("loglikelihood", requests, found)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each text; one that is longer than `max_length` is read in windows that do not overlap."""
        texts = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            texts.append([make_disjoint_window(window) for window in windows])
        found = [0.0] * len(texts)
        parts = self._batches([len(windows) for windows in texts], 1 if self.life == "carried" else None)
        for part in _shown("loglikelihood_rolling", parts, len(texts), disable_tqdm):
            for n, scored in zip(part, self._roll([texts[n] for n in part]), strict=True):
                found[n] = scored
        return self._cached("loglikelihood_rolling", requests, found)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, without what it stops at."""
        asked = [self._asked(*request.args) for request in requests]
        found = [""] * len(asked)
        if self.life == "carried":
            parts = [[n] for n in range(len(asked))]
        else:
            ways = [json.dumps(options, sort_keys=True) for _, options in asked]
            alike = ([n for n, other in enumerate(ways) if other == way] for way in dict.fromkeys(ways))
            parts = [part[n : n + self.batch_size] for part in alike for n in range(0, len(part), self.batch_size)]
        before, document = self.carried, None
        for part in _shown("generate_until", parts, len(asked), disable_tqdm):
            request = requests[part[0]]
            again = self.life == "carried" and document == (request.task_name, request.doc_id)
            document = request.task_name, request.doc_id
            before = before if again else self.carried
            episode = self._begin(len(part), before)
            for n, text in zip(part, self._generate(episode, [asked[n] for n in part], part), strict=True):
                found[n] = text
            if self.life == "carried" and not again:
                self.carried = episode.logs
        return self._cached("generate_until", requests, found)

    # ---- how they are answered

    def _score_alone(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Each pair in a life of its own, in one batch."""
        return self._score(self._begin(len(pairs)), [ids for ids, _ in pairs], [ids for _, ids in pairs])

    def _score_document(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """The pairs of one document, each from the life so far; what the contexts begin with alike lives on."""
        contexts = [context for context, _ in pairs]
        shared = len(list(itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*contexts, strict=False))))
        episode, scores = self._begin(1, self.carried), []
        _feed(episode, [contexts[0][:shared]], self._update(generated=False))
        for first in range(0, len(pairs), self.batch_size):
            some = pairs[first : first + self.batch_size]
            rests = [context[shared:] for context, _ in some]
            scores += self._score(episode.fork(rows=[0] * len(some)), rests, [ids for _, ids in some])
        self.carried = episode.logs
        return scores

    def _score(
        self, episode: Episode, contexts: Sequence[list[int]], continuations: Sequence[list[int]], rolled: bool = False
    ) -> list[tuple[float, bool]]:
        """Each row's continuation after its context, token by token before it is written; the last one is not read."""
        _feed(episode, contexts, self._update(generated=False))
        first_BV = episode.logits
        assert first_BV is not None
        rest_BTV = _feed(episode, [ids[:-1] for ids in continuations], self._update(generated=not rolled), "all")
        scores = []
        for row, ids in enumerate(continuations):
            logits_TV = first_BV[row : row + 1]
            if rest_BTV is not None:
                logits_TV = torch.cat([logits_TV, rest_BTV[row, : max(0, len(ids) - 1)]])
            logits_TV = logits_TV[: len(ids)]
            ids_T = torch.tensor(ids, device=logits_TV.device)
            wide_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
            logprob_T = wide_TV.gather(-1, ids_T[:, None])[:, 0] - wide_TV.logsumexp(-1)
            scores.append((float(logprob_T.double().sum()), bool((logits_TV.argmax(-1) == ids_T).all())))
        return scores

    def _roll(self, texts: Sequence[list[tuple[list[int], list[int]]]]) -> list[float]:
        """log p of texts in windows: each begins at position 0, and its text's fast weights go on."""
        sums, logs, rows = [0.0] * len(texts), self.carried, list(range(len(texts)))
        for number in range(max(map(len, texts), default=0)):
            stay = [place for place, row in enumerate(rows) if len(texts[row]) > number]
            if number and logs is not None:
                logs = {address: log.rows(stay) for address, log in logs.items()}
            rows = [rows[place] for place in stay]
            episode = self._begin(len(rows), logs)
            contexts, continuations = zip(*(texts[row][number] for row in rows), strict=True)
            _feed(episode, [ids[:-1] for ids in contexts], "none")  # of the window before, where they were written
            scores = self._score(episode, [ids[-1:] for ids in contexts], continuations, rolled=True)
            for row, (logprob, _) in zip(rows, scores, strict=True):
                sums[row] += logprob
            logs = episode.logs
        if self.life == "carried":
            self.carried = logs
        return sums

    def _generate(
        self, episode: Episode, asked: Sequence[tuple[list[int], dict[str, Any]]], numbers: Sequence[int]
    ) -> list[str]:
        """The texts of one batch; each row draws with the number of its request."""
        texts = [""] * len(asked)
        options: dict[str, Any] = {"update": self.update, "tokenizer": self.tokenizer, "seed": list(numbers)}
        options |= {"include_stop_str_in_output": False, **asked[0][1]}
        for step in episode.generate([ids for ids, _ in asked], **options):
            texts = [text + new for text, new in zip(texts, step.text, strict=True)]
        return texts

    def _begin(self, rows: int, before: Logs | None = None) -> Episode:
        """An episode without tokens, and with the fast weights of another where it is given."""
        episode = Episode(self.model, rows)
        for address, log in (before or {}).items():
            episode.logs[address].copy_from(log)
        return episode

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of both, as the harness cuts them; a context that is too long loses its beginning."""
        if not context:
            ids, rest = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            rest = rest[1:] if rest[:1] == ids else rest
        else:
            start = context.rstrip()  # spaces between the two belong to the continuation
            ids = self.tok_encode(start) or [self.prefix_token_id]
            rest = self.tok_encode(context + continuation)[len(ids) :]
        if len(rest) > self.max_length:
            raise ValueError(f"a continuation of {len(rest)} tokens is longer than max_length={self.max_length}")
        return ids[-(self.max_length + 1 - max(1, len(rest))) :], rest

    def _asked(self, context: str, options: Mapping[str, Any]) -> tuple[list[int], dict[str, Any]]:
        """The ids of a context, and what a task says about generating as `Episode.generate` takes it."""
        options = {key: value for key, value in options.items() if value is not None}
        until, sample = options.pop("until", []), options.pop("do_sample", None)
        lengths = [options.pop(key) for key in NEW_TOKENS if key in options]
        if unknown := sorted(options.keys() - set(SAMPLING)):
            raise ValueError(f"a task generates with {', '.join(unknown)}, which fastweights does not implement")
        if sample is False:
            options["temperature"] = 0.0
        elif sample:
            options.setdefault("temperature", 1.0)
        new = int(lengths[0]) if lengths else self.max_gen_toks
        if not 0 < new < self.max_length:
            raise ValueError(f"a task asks for {new} new tokens, expected 1 to {self.max_length - 1} (max_length - 1)")
        strings = [text for text in ([until] if isinstance(until, str) else until) if text]
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return ids[new - self.max_length :], {**options, "max_new_tokens": new, "stop_strings": strings}

    def _update(self, generated: bool) -> Update:
        """`update` for a feed of contexts, or of continuations, which no feed would take for generated."""
        if isinstance(self.update, str) and self.update in ("prompt", "generated"):
            return "all" if (self.update == "generated") == generated else "none"
        return self.update

    def _batches(self, lengths: Sequence[int], size: int | None = None) -> list[list[int]]:
        """The numbers of requests in batches of one life each: the longest first, or, of 1, in their order."""
        size = size or self.batch_size
        order = list(range(len(lengths)))
        if size > 1:
            order.sort(key=lambda n: -lengths[n])
        return [order[n : n + size] for n in range(0, len(order), size)]

    def _cached(self, kind: str, requests: Sequence[Instance], found: list) -> list:
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return found


def _feed(episode: Episode, ids: Sequence[list[int]], update: Update, logits: str = "last") -> Tensor | None:
    """Feeds rows of any lengths, none at all included; None where all are empty."""
    longest = max(map(len, ids))
    if not longest:
        return None
    padded = [[*row, *[0] * (longest - len(row))] for row in ids]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
    return episode.feed(padded, update, attention_mask=mask, logits=logits)


def _documents(requests: Sequence[Instance]) -> list[list[int]]:
    """The numbers of the requests that follow each other and are of one document."""
    keys = [(request.task_name, request.doc_id) for request in requests]
    return [list(part) for _, part in itertools.groupby(range(len(keys)), keys.__getitem__)]


def _shown(what: str, parts: Sequence[list[int]], total: int, hidden: bool) -> Iterator[list[int]]:
    """The parts, with a bar that moves when one is done."""
    with bar(what) as show:
        for part, done in zip(parts, itertools.accumulate(map(len, parts)), strict=True):
            yield part
            if not hidden:
                show(done, total)


def _layers(layers: Any) -> Any:
    """Layers as `attach` takes them; a command line joins them with +."""
    if isinstance(layers, str) and layers != "all":
        return [int(layer) for layer in layers.split("+")]
    return layers


def _rule(rule: Rule | str, options: Mapping[str, Any]) -> Rule:
    if not isinstance(rule, str):
        return rule
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: expected one of {', '.join(map(repr, RULES))}, or a rule")
    try:
        return RULES[rule](**options)
    except TypeError as error:
        raise ValueError(f"rule={rule!r}: {error}") from None


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
