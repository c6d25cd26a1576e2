"""The version: here, so that a record can name it."""

__version__ = "0.1.0"
