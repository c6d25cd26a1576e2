"""What a record shows: a table and a paragraph for the terminal, pictures, and a page for a browser.

Everything here takes a `Record`, or what its record.json holds. So the report of an experiment that was saved earlier
can be made again: `report.write(json.loads(Path("record.json").read_text()), folder)`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_text
from .canvas import encoded
from .page import lens_page, patch_page, record_page
from .pictures import draw, heat_map, patch_picture
from .text import Recorded, lens_table, paragraph, patch_sentence, patch_table, table

__all__ = [
    "draw",
    "heat_map",
    "lens_page",
    "lens_table",
    "paragraph",
    "patch_page",
    "patch_picture",
    "patch_sentence",
    "patch_table",
    "record_page",
    "table",
    "write",
]


def write(record: Recorded | Mapping[str, Any], folder: str | Path) -> list[str]:
    """Writes report.html, logprob.png, distance.png and norms.png into an existing folder; returns their names.

    Everything is drawn before the first file is written.

    Raises:
        ImportError: without matplotlib (`pip install "fastweights[report]"`).
    """
    drawn = draw(record)
    html = record_page(record, drawn)
    paths = {name: Path(folder, f"{name}.png") for name in drawn}
    images = {paths[name]: encoded(figure, paths[name]) for name, (figure, _) in drawn.items()}
    write_text(Path(folder, "report.html"), html)
    for path, content in images.items():
        path.write_bytes(content)
    return ["report.html", *(path.name for path in images)]
