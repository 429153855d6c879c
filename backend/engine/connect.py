"""The engines that ``CRANE_ENGINE`` asks for."""

from __future__ import annotations

from backend.config import Config
from backend.engine.client import EngineClient
from backend.engine.inline import InlineEngine
from backend.engine.several import reach
from backend.registry import Registry


def connect(config: Config, registry: Registry) -> EngineClient:
    if config.engine == "process":
        return reach(config, registry)
    return InlineEngine(config, registry)
