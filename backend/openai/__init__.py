"""/v1: OpenAI's words for what ``run_model`` does. A new route is one ``Route`` and a line here."""

from __future__ import annotations

from backend.openai.audio import SPEECH, TRANSCRIPTIONS, TRANSLATIONS
from backend.openai.base import Order, Page, Route
from backend.openai.chat import CHAT_COMPLETIONS
from backend.openai.completions import COMPLETIONS
from backend.openai.images import EDITS, GENERATIONS
from backend.openai.vectors import EMBEDDINGS, RERANK

__all__ = ["ROUTES", "Order", "Page", "Route"]

ROUTES: dict[str, Route] = {
    route.path: route
    for route in (
        CHAT_COMPLETIONS,
        COMPLETIONS,
        EMBEDDINGS,
        RERANK,
        GENERATIONS,
        EDITS,
        SPEECH,
        TRANSCRIPTIONS,
        TRANSLATIONS,
    )
}
