"""How server-sent events look on the wire."""

from __future__ import annotations

EVENT_STREAM = "text/event-stream"
IDLE = ": still here\n\n"  # a comment, which clients pass over


def event(data: bytes, name: str | None = None) -> str:
    """One event; ``data`` is JSON, which has no line ends of its own that would end it."""
    named = f"event: {name}\n" if name is not None else ""
    return f"{named}data: {data.decode()}\n\n"
