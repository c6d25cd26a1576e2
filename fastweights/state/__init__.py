"""The state of plastic linears: event logs, and what is asked of them. Knows no module and no model."""

from .log import EventLog
from .slots import OVERFLOW

__all__ = ["OVERFLOW", "EventLog"]
