"""run_model: the one path from a model's name and an input to an output and its receipt."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from socket import socket
from typing import Any

from backend.callers import Callers
from backend.charges import Charge
from backend.config import Config
from backend.engine.calls import Answer, Call, Event
from backend.engine.client import EngineClient, Stream, caller_gone
from backend.errors import ClientClosedRequest, CraneError, NotAcceptable
from backend.held_bodies import HeldBodies
from backend.inputs import draw_seeds, load_inputs
from backend.media.images import encode_image
from backend.media.reader import MediaReader, Reading
from backend.meter import Meter
from backend.permits import Permits
from backend.receipts import common, facts, rounded
from backend.registry import Registry
from backend.schemas import load
from backend.tasks import TASKS
from backend.tasks.usage import check_logprobs, measured, most_usage, sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Crane:
    """The parts of a running service, as ``create_app`` put them together."""

    config: Config
    registry: Registry
    engine: EngineClient
    media: MediaReader
    callers: Callers
    meter: Meter
    permits: Permits
    bodies: HeldBodies


def run_model(
    crane: Crane,
    model_id: str,
    input_: Any,
    options: Any,
    *,
    request_id: str,
    caller: str = "",
    admin: bool = False,
    repeat: int = 1,
    charge: Charge | None = None,
    one_output: bool = False,
    caller_socket: socket | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Run a model on an input, or on each of a list of inputs; return the output and the receipt.

    With ``repeat`` each input has so many outputs, one after another, as if it was sent as often.
    An ``admin`` may keep a model loaded for as long as it likes.

    Raises a ``CraneError`` that says what was wrong: ``NotAcceptable`` where ``one_output`` is all
    that can be delivered and there would be several; ``ClientClosedRequest`` where there is a
    ``caller_socket``, and its other end is closed while the model runs. ``charge`` is told what
    the call may use, and what it used.
    """
    asked = Asked(crane, model_id, input_, options, request_id, caller, repeat, admin, charge)
    if one_output:
        asked.check_one_output()
    with crane.media.reading(caller, caller_socket) as reading:
        call = asked.call(reading)
        with asked.charged():
            answer = crane.engine.run(call, caller_socket)
    return asked.finish(answer)


def stream_model(
    crane: Crane,
    model_id: str,
    input_: Any,
    options: Any,
    *,
    request_id: str,
    caller: str = "",
    admin: bool = False,
    repeat: int = 1,
    charge: Charge | None = None,
    caller_socket: socket | None = None,
) -> Generator[Event | None]:
    """Run a model as ``run_model`` does, and tell of it: its events, its ``output``, ``done``.

    None says that there was nothing to tell for ``IDLE_S``. Whoever stops listening, by closing
    the generator, stops the work. Raises what ``run_model`` raises, wherever it happens.
    ``charge`` is settled before the output is told, which its caller may take minutes to read.
    """
    asked = Asked(crane, model_id, input_, options, request_id, caller, repeat, admin, charge)
    del input_
    with (
        crane.media.reading(caller, caller_socket) as reading,
        closing(crane.engine.stream(asked.call(reading, stream=True), caller_socket)) as stream,
        asked.charged(),
    ):
        for told in stream:
            if isinstance(told, Answer):
                answer = told
            else:
                try:
                    yield asked.shown(told) if told else None
                except GeneratorExit:
                    asked.left(stream)
                    raise
    output, metadata = asked.finish(answer)
    if charge is not None:
        charge.settle()
    told = Event("output", {"output": output})
    del answer, output  # or they would stay for as long as the client reads
    yield told
    told = Event("done", {"metadata": metadata})
    yield told


class Asked:
    """A call for a model whose options are sound; from it come the engine's call and the receipt.

    Raises ``ModelNotFound`` and ``InvalidRequest``.
    """

    def __init__(
        self,
        crane: Crane,
        model_id: str,
        input_: Any,
        options: Any,
        request_id: str,
        caller: str,
        repeat: int,
        admin: bool,
        charge: Charge | None,
    ) -> None:
        self._started = time.perf_counter()
        self._config = crane.config
        self._engine = crane.engine
        self._spec = crane.registry.get(model_id)
        self._task = TASKS[self._spec.type]
        self._options = load(self._spec.options_schema, options, "options")
        # Which changes no output.
        self._keep_alive_s = self._allowed_stay(self._options.pop("keep_alive"), admin)
        self._input = input_
        self._repeat = repeat
        self._batched = type(input_) is list or repeat > 1
        self._request_id = request_id
        self._caller = caller
        self._charge = charge
        self._seeds: list[int] | None = None
        self._measured: dict[str, float] = {}  # what the inputs have of media

    def _allowed_stay(self, wanted_s: float | None, admin: bool) -> float | None:
        """How long a model stays for a caller: to keep it longer is its operator's to allow.

        An entry does by ``limits: {keep_alive: …}``, ``idle_timeout`` and its own default.
        """
        spec = self._spec
        if wanted_s is None or admin or "keep_alive" in spec.limits:
            return wanted_s
        own_s = self._config.idle_timeout_s if spec.idle_timeout is None else spec.idle_timeout
        default_s = spec.options_schema.fields["keep_alive"].load_default
        return min(wanted_s, max(own_s, default_s or 0.0))

    def check_one_output(self) -> None:
        if self._batched or self._task.outputs(self._options) > 1:
            raise NotAcceptable(
                "Several outputs cannot be sent as bare bytes: ask for one, or send "
                "Accept: application/json."
            )

    def call(self, reading: Reading, *, stream: bool = False) -> Call:
        """What the engine gets, the input's media read, and its cost reserved.

        Raises ``InvalidRequest``, and what ``Charge.reserve`` does.
        """
        task, options, repeat = self._task, self._options, self._repeat
        inputs = load_inputs(self._config, task, self._input, options, reading, repeat=repeat)
        self._input = None  # a stream's client may take minutes from now on
        check_logprobs(task, inputs, options, repeat, self._config.max_output)
        self._reserve(inputs)
        self._seeds = draw_seeds(self._task, self._options, len(inputs) * self._repeat)
        return Call(
            request_id=self._request_id,
            model_id=self._spec.id,
            inputs=inputs,
            # A seed is an input's own: calls that differ in nothing else share a batch.
            options={name: value for name, value in self._options.items() if name != "seed"},
            seeds=self._seeds,
            timeout_s=reading.left_s(),
            keep_alive_s=self._keep_alive_s,
            stream=stream,
            caller=self._caller,
            repeat=self._repeat,
        )

    def _reserve(self, inputs: list[Any]) -> None:
        if self._charge is not None:
            self._charge.reserve(self._spec.cost, *self._most(inputs))
        if not self._task.formats:  # of what makes media, those it made count
            self._measured = rounded(measured(inputs), 3)

    def _most(self, inputs: list[Any]) -> tuple[int, dict[str, float]]:
        """How many inputs the model has to run, and what they may use if the cost depends on it."""
        if not self._spec.cost.is_by_usage:
            return sequences(self._task, inputs, self._options, self._repeat), {}
        cut = self._options.get("truncate") and self._spec.cost.per_1k_tokens
        window = self._engine.window(self._spec.id) if cut else None
        return most_usage(self._task, inputs, self._options, self._repeat, window)

    @contextmanager
    def charged(self) -> Iterator[None]:
        """Tell the charge of an error that the engine answers with."""
        try:
            yield
        except CraneError as error:
            if error.usage is not None:  # media count whichever input was refused
                error.usage = {**self._measured, **error.usage}
            if self._charge is not None:
                self._charge.failed(error)
            raise

    def left(self, stream: Stream) -> None:
        """Tell the charge what a call used that nobody listens to any more."""
        with suppress(ClientClosedRequest), self.charged():
            stream.throw(caller_gone())

    def shown(self, event: Event) -> Event:
        """An event of the engine as callers see it."""
        if event.kind == "start":
            told = dict(event.data)
            timings_ms = rounded(told.pop("timings_ms"))
            return Event("start", {"metadata": {**self._about(**told), "timings_ms": timings_ms}})
        if "preview" in event.data:
            preview = encode_image(event.data["preview"], "jpeg")
            return Event(event.kind, {**event.data, "preview": preview})
        return event

    def finish(self, answer: Answer) -> tuple[Any, dict[str, Any]]:
        """The output and the receipt."""
        told = facts(answer, batched=self._batched)
        told["usage"] = self._measured | told["usage"]
        if self._charge is not None:
            self._charge.ran(told["usage"])
        self._options |= common(answer.applied)
        metadata = self._about(answer.revision, answer.device, answer.dtype) | told
        total_ms = (time.perf_counter() - self._started) * 1e3
        metadata["timings_ms"] = rounded({**answer.timings_ms, "total": total_ms})
        metadata["batch_size"] = answer.batch_size
        return answer.outputs if self._batched else answer.outputs[0], metadata

    def _about(self, revision: str | None, device: str, dtype: str) -> dict[str, Any]:
        """What a receipt says before the output is known."""
        known: dict[str, Any] = {
            "model_id": self._spec.id,
            "task": self._spec.type,
            "hf_model": self._spec.hf_model,
            "revision": revision,
            "device": device,
            "dtype": dtype,
            "request_id": self._request_id,
            "options": dict(self._options),
        }
        if self._seeds is not None:
            known["seed"] = self._seeds if self._batched else self._seeds[0]
        return known
