"""The task without a model: for smoke tests, overhead measurements and the tests."""

from __future__ import annotations

from backend.schemas import Anything, Integer
from backend.tasks.base import Options, Task, about


class EchoOptions(Options):
    delay_ms = Integer(
        low=0,
        high=60_000,
        load_default=0,
        metadata=about("how long the answer is held back, to try out a slow model"),
    )


ECHO = Task(
    name="echo",
    input=Anything(),
    options=EchoOptions,
    output="the input",
    example=({"hello": "world"}, {}),
    weights=False,
)
