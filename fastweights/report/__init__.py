"""What a record shows: a table and a paragraph for the terminal, pictures, and a page for a browser."""

from .text import paragraph, table

__all__ = ["paragraph", "table"]
