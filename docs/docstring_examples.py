"""Shows the `Example:` of a docstring as code. Loaded by mkdocs.yml; not part of the site."""

import re
import textwrap

import griffe

EXAMPLE = re.compile(r"^( *)Example:\n((?:\1 {4}.*\n?|\s*\n)+)", re.MULTILINE)


class Examples(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(found: re.Match) -> str:
    return f"Example:\n    ```python\n{textwrap.indent(textwrap.dedent(found[2]).strip(), '    ')}\n    ```\n"
