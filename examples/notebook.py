"""Makes examples/tutorial.ipynb of docs/tutorial.md and runs it; the page is the source of both.

    pip install -e ".[test]" && python examples/notebook.py

Text between ```python blocks becomes Markdown cells; outputs come from running the cells.
"""

import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import v4

HERE = Path(__file__).resolve().parent


def notebook(page: str) -> nbformat.NotebookNode:
    """The page as cells: every ```python block is code, what stands between them is Markdown, outputs are left out."""
    page = re.sub(r"^```text\n.*?^```\n", "", page, flags=re.MULTILINE | re.DOTALL)
    page = re.sub(r"\]\((?!https?:)([^)]+\.md)", r"](../docs/\1", page)
    cells = []
    for n, part in enumerate(re.split(r"^```python\n(.*?)^```\n", page, flags=re.MULTILINE | re.DOTALL)):
        if part := re.sub(r"\n{3,}", "\n\n", part).strip():
            cells.append((v4.new_code_cell if n % 2 else v4.new_markdown_cell)(part, id=f"cell-{n}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def run(book: nbformat.NotebookNode, folder: Path) -> None:
    """Runs every cell in `folder`; the outputs are in the cells afterwards."""
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(book, timeout=300, record_timing=False, coalesce_streams=True, resources=resources).execute()


if __name__ == "__main__":
    book = notebook((HERE.parent / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        run(book, Path(folder))
    book.metadata.pop("language_info", None)  # the Python version of this machine
    nbformat.write(book, HERE / "tutorial.ipynb")
