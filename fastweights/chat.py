"""Chat templates: where a folder keeps them, and how they are rendered, in jinja2's sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from .files import one_line


def templates_of(folder: Path, config: Mapping[str, Any], older: Any) -> dict[str, str]:
    """Name → template, from the oldest place to the newest, which counts most.

    Args:
        config: tokenizer_config.json; its `chat_template` is a template, or a list or an object of named ones.
        older: the `chat_template` of chat_template.json, likewise.
    """
    templates: dict[str, str] = {}
    for value in (config.get("chat_template"), older):
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


def render(template: str, messages: Sequence[Mapping[str, Any]], **values: Any) -> str:
    """The text of a conversation; raises ValueError when the template refuses it."""
    import jinja2

    if isinstance(messages, str | Mapping):
        raise ValueError(f"messages is a {type(messages).__name__}, expected a list of role/content objects")
    if wrong := [m for m in messages if not isinstance(m, Mapping)]:
        raise ValueError(f"messages holds a {type(wrong[0]).__name__}, expected role/content objects")
    try:
        return _compile(template).render(messages=[dict(m) for m in messages], **values)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refused the messages: {one_line(error)}") from None


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
