"""Text ↔ ids, on the `tokenizers` package, as a Hugging Face folder describes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from .chat import render, templates_of
from .config_json import eos_ids
from .files import one_line, read_json, warn, write_text
from .inputs import whole_numbers
from .spm import SentencePieceModel
from .stream import BYTE_TOKEN, Stream

_HALF = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """Turns text into ids and back.

    `backend` is a `tokenizers.Tokenizer`; `config` is what tokenizer_config.json holds (names of the special
    tokens, and settings that travel along with `save`); `chat_templates` maps names to jinja templates:
    "default" is used unless another is asked for.

    Example:
        ids = tokenizer.encode("The capital of France is")
        tokenizer.tokens(ids)        # ['The', ' capital', ' of', ' France', ' is']
    """

    def __init__(
        self,
        backend: Backend,
        config: Mapping[str, Any] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] | None = None,
        bos_token_id: int | None = None,
    ):
        self.backend = backend
        backend.no_truncation()  # a tokenizer.json may carry either from training
        backend.no_padding()
        self.config = dict(config or {})
        self.chat_templates = dict(chat_templates or {})
        self.bos_token, self.eos_token = self._named("bos_token"), self._named("eos_token")
        if self.bos_token is not None:
            bos_token_id = backend.token_to_id(self.bos_token)
        self.bos_token_id = bos_token_id
        ids = list(eos_token_ids or ())
        if self.eos_token is not None and (eos := backend.token_to_id(self.eos_token)) is not None:
            ids.append(eos)
        self.eos_token_ids = tuple(dict.fromkeys(ids))
        if backend.post_processor is None:
            bos = bos_token_id if self.config.get("add_bos_token") else None
            eos = backend.token_to_id(self.eos_token or "") if self.config.get("add_eos_token") else None
            if bos is not None or eos is not None:
                backend.post_processor = bos_processor(backend, bos, eos)
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self._starts_with_bos = backend.encode("").ids[:1] == [bos_token_id]
        self._byte_level = '"ByteLevel"' in (backend.decoder.__getstate__().decode() if backend.decoder else "")

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Reads a Hugging Face folder: tokenizer.json, or tokenizer.model where there is no other; and, where there
        are, tokenizer_config.json, special_tokens_map.json, added_tokens.json, the chat template in any of its
        places, and the stop ids of generation_config.json and config.json.

        A tokenizer.model gives what transformers 5 makes of it: with `"tokenizer_class": "LlamaTokenizer"` in
        tokenizer_config.json by the rules of that class (`legacy`, `add_prefix_space`), else by the file's own
        rules, as SentencePiece; BOS and EOS are written where `add_bos_token` and `add_eos_token` say so.
        """
        folder = Path(folder)
        config, model = read_json(folder / "tokenizer_config.json"), read_json(folder / "config.json")
        generation = read_json(folder / "generation_config.json")
        if "added_tokens_decoder" not in config:  # the older places, which transformers reads without the newer one
            special = read_json(folder / "special_tokens_map.json")
            named = {_content(token) for token in [*_named(config), *_named(special, lists=False)]}
            older = read_json(folder / "added_tokens.json")
            config |= special
            if older:
                config["added_tokens_decoder"] = {
                    str(i): {"content": text, "special": text in named, "normalized": text not in named}
                    for text, i in older.items()
                }
        backend = _backend(folder, config, model)
        _add_tokens(backend, config, folder)
        # generation_config.json is the newer place; both may name several ids, and any of them ends a text
        stops = eos_ids([*eos_ids(generation.get("eos_token_id")), *eos_ids(model.get("eos_token_id"))])
        bos = model.get("bos_token_id")
        templates = templates_of(folder, config, read_json(folder / "chat_template.json").get("chat_template"))
        return cls(backend, config, templates, stops, bos if "bos_token" not in config else None)

    @property
    def vocab_size(self) -> int:
        """Ids that stand for text, added tokens included; the model's vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; the tokenizer's own post-processor decides whether BOS comes first.

        A chat template usually writes BOS itself, and encoding its text would add another: a text that
        already starts with BOS gets no second one here. Raises ValueError for what is no text.
        """
        if not isinstance(text, str):
            raise ValueError(f"text is a {type(text).__name__}: expected one text, a str")
        if not text.isascii() and (half := _HALF.search(text)):
            raise ValueError(f"text holds half a character, {half[0]!a}, at {half.start()}: it is no Unicode text")
        ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._starts_with_bos and ids[:2] == [self.bos_token_id] * 2:
            return ids[1:]
        return ids

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`, special tokens written out unless skipped; spaces are never "cleaned up"."""
        return self.backend.decode(whole_numbers("ids", ids), skip_special_tokens=skip_special_tokens)

    def tokens(self, ids: int | Iterable[int]) -> list[str]:
        """One printable piece of text per id; newlines, controls and parts of a character are escaped."""
        return [self._piece(i) for i in whole_numbers("ids", ids)]

    def stream(self, skip_special_tokens: bool = False, context: Sequence[int] = ()) -> Stream:
        """A decoder for ids that come one at a time, after the ids of `context`."""
        return Stream(self, skip_special_tokens, context)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for a conversation of {"role": ..., "content": ...} messages, as text.

        `chat_template` names one of `chat_templates`, or is a template itself; other keywords reach the
        template (`tools`, `date_string`, ...). The text usually holds BOS already: `encode` adds no other.
        Raises ValueError when there is no template or when the template refuses the messages.
        """
        name = chat_template or "default"
        template = self.chat_templates.get(name) or (chat_template if chat_template and "{" in chat_template else None)
        if template is None:
            have = f"has only the chat templates {sorted(self.chat_templates)}" if self.chat_templates else "has none"
            raise ValueError(f"chat template {name!r} does not exist: this tokenizer {have}; pass chat_template=...")
        named = {k: self._named(k) for k in self.config if k.endswith("_token") and self._named(k) is not None}
        values = {"tools": None, "documents": None, **named, **kwargs}
        return render(template, messages, add_generation_prompt=add_generation_prompt, **values)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {k: v for k, v in self.config.items() if k not in ("chat_template", "auto_map")}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config.setdefault("clean_up_tokenization_spaces", False)
        if self.chat_templates.keys() - {"default"}:
            config["chat_template"] = [{"name": n, "template": t} for n, t in self.chat_templates.items()]
        elif self.chat_templates:
            write_text(folder / "chat_template.jinja", self.chat_templates["default"])
        generation = {"bos_token_id": self.bos_token_id, "eos_token_id": list(self.eos_token_ids) or None}
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")

    def _named(self, key: str) -> str | None:
        return _content(self.config.get(key))

    def _piece(self, token_id: int) -> str:
        token = self.backend.id_to_token(token_id)
        if token is None:
            return f"<unused {token_id}>"
        if byte := BYTE_TOKEN.fullmatch(token):
            raw = bytes.fromhex(byte[1])
            token = raw.decode("ascii") if raw.isascii() else f"\\x{byte[1].lower()}"
        elif self._byte_level and all(c in _byte_alphabet() for c in token):
            token = bytes(_byte_alphabet()[c] for c in token).decode("utf-8", errors="backslashreplace")
        else:
            token = token.replace("▁", " ")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)


def bos_processor(backend: Backend, bos_token_id: int | None, eos_token_id: int | None = None) -> Any:
    """A post-processor that writes BOS before every text and EOS after it, where given."""
    bos, eos = (None if i is None else backend.id_to_token(i) for i in (bos_token_id, eos_token_id))
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    pair = [*([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    specials = [(text, i) for text, i in ((bos, bos_token_id), (eos, eos_token_id)) if text is not None]
    return processors.TemplateProcessing(single=single, pair=single + pair, special_tokens=specials)


def _backend(folder: Path, config: dict[str, Any], model: Mapping[str, Any]) -> Backend:
    """The pipeline of a folder. Special tokens that a tokenizer.model alone names are put into `config`."""
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return Backend.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception
            raise ValueError(f"{path} is not a readable tokenizer: {one_line(error)}") from None
    if not (folder / "tokenizer.model").is_file():
        hint = (
            f"; vocab.json alone is not supported: save it once from transformers with "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            if (folder / "vocab.json").is_file()
            else ""
        )
        raise FileNotFoundError(f"{path} is missing, and the tokenizer is read from it{hint}")
    pieces = SentencePieceModel.read(folder / "tokenizer.model")
    name = config.get("tokenizer_class") or model.get("tokenizer_class") or ""
    llama = name.removesuffix("Fast") == "LlamaTokenizer"
    own = {"bos_token": "<s>", "eos_token": "</s>"} if llama else {"bos_token": pieces.bos, "eos_token": pieces.eos}
    for key, piece in {**own, "unk_token": pieces.unk}.items():
        if piece is not None and _content(config.get(key)) is None:
            config[key] = piece
    if config.get("bos_token") is not None and "add_bos_token" not in config:
        warn(f"{folder}: tokenizer_config.json says no add_bos_token, so texts begin without BOS, as in transformers")
    if not llama and pieces.prefix and (added := config.get("added_tokens_decoder")):
        # found in the text as it is: each stretch between them gets a space in front
        config["added_tokens_decoder"] = {i: {**token, "normalized": False} for i, token in added.items()}
    return pieces.backend(llama, config.get("legacy"), config.get("add_prefix_space"))


def _add_tokens(backend: Backend, config: Mapping[str, Any], folder: Path) -> None:
    """Tokens that the files beside tokenizer.json name: their ids must come out as written there.

    Special tokens that `config` names, and that stand nowhere else, come last.
    """
    wanted = sorted((int(i), _added(token)) for i, token in (config.get("added_tokens_decoder") or {}).items())
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for _, token in wanted if repr(token) not in known])
    for i, token in wanted:
        if (got := backend.token_to_id(token.content)) != i:
            place = "added_tokens.json" if (folder / "added_tokens.json").is_file() else "tokenizer_config.json"
            raise ValueError(f"{folder}: {place} gives {token.content!r} the id {i}, tokenizer.json {got}")
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([_added(value, special=True) for value in _named(config) if _content(value) not in there])


def _named(config: Mapping[str, Any], lists: bool = True) -> list[Any]:
    """The special tokens that a configuration names, one by one and (`lists`) in lists."""
    tokens = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("extra_special_tokens", *(["additional_special_tokens"] if lists else [])):
        more = config.get(key) or []
        tokens += more.values() if isinstance(more, Mapping) else more
    return [token for token in tokens if _content(token) is not None]


def _added(token: Any, **flags: bool) -> AddedToken:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    given = {name: token[name] for name in names if name in token} if isinstance(token, Mapping) else {}
    return AddedToken(_content(token) or "", **{**given, **flags})


def _content(token: Any) -> str | None:
    """The text of a special token, which configs write as a string or as an object; None for "" as well."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) and text else None


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones stand for themselves, the rest follow U+0100."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}
