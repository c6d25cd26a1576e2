"""Text ↔ ids, on the `tokenizers` package; chat templates through jinja2's sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from .config import eos_ids
from .files import one_line, read_json, write_text

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


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
        if backend.post_processor is None and self.config.get("add_bos_token") and bos_token_id is not None:
            backend.post_processor = bos_processor(backend, bos_token_id)
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self._starts_with_bos = backend.encode("").ids[:1] == [bos_token_id]
        self._byte_level = '"ByteLevel"' in (backend.decoder.__getstate__().decode() if backend.decoder else "")

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Reads a Hugging Face folder: tokenizer.json and, where there are, tokenizer_config.json, the chat
        template in any of its places, and the stop ids of generation_config.json and config.json."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            slow = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()]
            hint = (
                f"; {slow[0]} alone is not supported: save it once from transformers with "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
                if slow
                else ""
            )
            raise FileNotFoundError(f"{path} is missing, and the tokenizer is read from it{hint}")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception
            raise ValueError(f"{path} is not a readable tokenizer: {one_line(error)}") from None
        config = read_json(folder / "tokenizer_config.json")
        for key, value in read_json(folder / "special_tokens_map.json").items():
            config.setdefault(key, value)
        _add_missing_tokens(backend, config, folder)
        model, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
        # generation_config.json is the newer place; both may name several ids, and any of them ends a text
        stops = eos_ids([*eos_ids(generation.get("eos_token_id")), *eos_ids(model.get("eos_token_id"))])
        bos = model.get("bos_token_id")
        templates = _chat_templates(folder, config)
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
        already starts with BOS gets no second one here.
        """
        ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._starts_with_bos and ids[:2] == [self.bos_token_id] * 2:
            return ids[1:]
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`, special tokens written out unless skipped; spaces are never "cleaned up"."""
        return self.backend.decode(_checked(ids), skip_special_tokens=skip_special_tokens)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """One printable piece of text per id; newlines, controls and parts of a character are escaped."""
        return [self._piece(i) for i in _checked(ids)]

    def stream(self, skip_special_tokens: bool = False) -> Stream:
        """A decoder for ids that come one at a time."""
        return Stream(self, skip_special_tokens)

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
        if isinstance(messages, str | Mapping):
            raise ValueError(f"messages is a {type(messages).__name__}, expected a list of role/content objects")
        if wrong := [m for m in messages if not isinstance(m, Mapping)]:
            raise ValueError(f"messages holds a {type(wrong[0]).__name__}, expected role/content objects")
        named = {k: self._named(k) for k in self.config if k.endswith("_token") and self._named(k) is not None}
        values = {"tools": None, "documents": None, **named, **kwargs}
        import jinja2

        try:
            return _compile(template).render(
                messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt, **values
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refused the messages: {one_line(error)}") from None

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
        """The text of a special token, which configs write as a string or as an object."""
        value = self.config.get(key)
        if isinstance(value, Mapping):
            value = value.get("content")
        return value if isinstance(value, str) else None

    def _piece(self, token_id: int) -> str:
        token = self.backend.id_to_token(token_id)
        if token is None:
            return f"<unused {token_id}>"
        if byte := _BYTE_TOKEN.fullmatch(token):
            raw = bytes.fromhex(byte[1])
            token = raw.decode("ascii") if raw.isascii() else f"\\x{byte[1].lower()}"
        elif self._byte_level and all(c in _byte_alphabet() for c in token):
            token = bytes(_byte_alphabet()[c] for c in token).decode("utf-8", errors="backslashreplace")
        else:
            token = token.replace("▁", " ")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)


class Stream:
    """Text of ids that come one at a time: `"".join(push(i) for i in ids) + flush()` is `decode(ids)`.

    Text is held back while later ids could still change it, so no half character is ever given out.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._context: list[int] = []  # ids given out last: decoders treat the start of a text differently
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that is certain after this id: none for a part of a character."""
        token_id = _checked([token_id])[0]
        piece = self._tokenizer.backend.id_to_token(token_id)
        if piece is None or (self._skip and token_id in self._tokenizer.special_ids):
            return ""  # decode passes over it, and it ends no run of bytes
        self._pending.append(token_id)
        new = self._new_text()
        # "�" may be the start of a character; a run of byte tokens is decoded as a whole, once it has ended
        if not new or new.endswith("�") or _BYTE_TOKEN.fullmatch(piece):
            return ""
        self._context, self._pending = self._pending, []
        return new

    def flush(self) -> str:
        """What was held back, as `decode` shows it; call it once after the last id."""
        new = self._new_text()
        self._context, self._pending = [], []
        return new

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._context, self._skip)
        return self._tokenizer.decode(self._context + self._pending, self._skip)[len(known) :]


def bos_processor(backend: Backend, bos_token_id: int, eos_token_id: int | None = None) -> Any:
    """A post-processor that writes BOS before every text (and EOS after it where given)."""
    bos = backend.id_to_token(bos_token_id)
    specials = [(bos, bos_token_id)]
    single, pair = [bos, "$A"], [f"{bos}:1", "$B:1"]
    if eos_token_id is not None:
        eos = backend.id_to_token(eos_token_id)
        specials.append((eos, eos_token_id))
        single, pair = [*single, eos], [*pair, f"{eos}:1"]
    return processors.TemplateProcessing(single=single, pair=single + pair, special_tokens=specials)


def _checked(ids: Iterable[int]) -> list[int]:
    ids = [int(i) for i in ids]
    if bad := [i for i in ids if i < 0]:
        raise ValueError(f"token id {bad[0]} is negative, expected ids from 0 up")
    return ids


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """From the newest place to the oldest: chat_template.jinja, chat_template.json, tokenizer_config.json."""
    raw = config.get("chat_template")
    older = read_json(folder / "chat_template.json").get("chat_template")
    templates: dict[str, str] = {}
    for value in (raw, older):
        if isinstance(value, str):
            templates["default"] = value
        elif isinstance(value, list):
            templates |= {entry["name"]: entry["template"] for entry in value}
        elif isinstance(value, dict):
            templates |= value
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return templates


def _add_missing_tokens(backend: Backend, config: Mapping[str, Any], folder: Path) -> None:
    """Tokens that only tokenizer_config.json names; their ids must come out as written there."""
    decoder = config.get("added_tokens_decoder") or {}
    for wanted, token in sorted((int(i), t) for i, t in decoder.items()):
        if backend.token_to_id(token["content"]) is None:
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            backend.add_tokens([AddedToken(token["content"], **{f: token[f] for f in flags if f in token})])
        if (got := backend.token_to_id(token["content"])) != wanted:
            raise ValueError(
                f"{folder}: tokenizer_config.json gives {token['content']!r} the id {wanted}, tokenizer.json {got}"
            )


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones stand for themselves, the rest follow U+0100."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    """A template with the settings and helpers that Hugging Face's templates are written for."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the assistant wrote, for training; here it only shows its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # jinja2's own escapes <, > and & for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
