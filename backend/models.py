"""run_model: the one path from a model's name and an input to an output and its receipt."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from socket import socket
from threading import BoundedSemaphore
from typing import Any

from backend.callers import Callers
from backend.config import Config
from backend.engine.calls import Answer, Call
from backend.engine.client import EngineClient
from backend.errors import InvalidRequest, NotAcceptable, Overloaded
from backend.media.reader import MediaReader, Reading
from backend.meter import Meter
from backend.registry import ModelSpec, Registry
from backend.schemas import check_depth, check_text, load
from backend.tasks import TASKS, Task
from backend.tasks.base import MAX_SEED


@dataclass(frozen=True, slots=True, kw_only=True)
class Crane:
    """The parts of a running service, as ``create_app`` put them together."""

    config: Config
    registry: Registry
    engine: EngineClient
    media: MediaReader
    callers: Callers
    meter: Meter
    places: BoundedSemaphore

    @contextmanager
    def admission(self) -> Iterator[None]:
        """Hold one of this process's ``CRANE_THREADS`` places, or refuse at once.

        The server has a few threads more, which keep answering /livez when all places are taken.
        """
        if not self.places.acquire(blocking=False):
            raise Overloaded(
                f"This worker has {self.config.threads} calls already; try again in 1 s.",
                retry_after_s=1,
            )
        try:
            yield
        finally:
            self.places.release()


def run_model(
    crane: Crane,
    model_id: str,
    input_: Any,
    options: Any,
    *,
    request_id: str,
    one_output: bool = False,
    caller_socket: socket | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Run a model on an input, or on each of a list of inputs; return the output and the receipt.

    Raises a ``CraneError`` that says what was wrong: ``NotAcceptable`` where ``one_output`` is all
    that can be delivered and there would be several; ``ClientClosedRequest`` where there is a
    ``caller_socket``, and its other end is closed while the model runs.
    """
    started = time.perf_counter()
    spec = crane.registry.get(model_id)
    task = TASKS[spec.type]
    applied = load(spec.options_schema, options, "options")
    keep_alive_s = applied.pop("keep_alive")  # which changes no output
    batched = type(input_) is list
    if one_output and (batched or task.outputs(applied) > 1):
        raise NotAcceptable(
            "Several outputs cannot be sent as bare bytes: ask for one, or send "
            "Accept: application/json."
        )
    with crane.media.reading() as reading:
        inputs = load_inputs(crane.config, task, input_, reading)
        seeds = draw_seeds(task, applied, len(inputs))
        answer = crane.engine.run(
            Call(
                request_id=request_id,
                model_id=model_id,
                inputs=inputs,
                # A seed is an input's own: calls that differ in nothing else share a batch.
                options={name: value for name, value in applied.items() if name != "seed"},
                seeds=seeds,
                timeout_s=max(0.0, crane.config.request_timeout_s - reading.fetching_s),
                keep_alive_s=keep_alive_s,
            ),
            caller_socket,
        )
    applied |= common(answer.applied)
    metadata = receipt(spec, answer, applied, seeds, batched=batched, request_id=request_id)
    outputs = [task.dump(output, applied) for output in answer.outputs]
    metadata["timings_ms"]["total"] = round((time.perf_counter() - started) * 1e3, 2)
    return outputs if batched else outputs[0], metadata


def load_inputs(config: Config, task: Task, input_: Any, reading: Reading) -> list[Any]:
    """The inputs of a call, their media read: each item of a list, else the one input."""
    check_depth(input_, at="input")
    if type(input_) is not list:
        loaded = load(task.input, input_, "input")
        check_text(loaded, max_text=config.max_text, at="input")
        return [reading.read(loaded, "input")]
    if not 1 <= len(input_) <= config.max_batch:
        fault = f"must have 1 to {config.max_batch} items as a batch, not {len(input_)}"
        raise InvalidRequest.of({"input": fault})
    inputs: list[Any] = []
    faults: dict[str, str] = {}
    for index, one in enumerate(input_):
        try:
            inputs.append(load(task.input, one, f"input[{index}]"))
        except InvalidRequest as error:
            faults |= error.details
    if faults:
        raise InvalidRequest.of(faults)
    check_text(inputs, max_text=config.max_text, at="input")
    read: list[Any] = reading.read(inputs, "input")
    return read


def draw_seeds(task: Task, options: dict[str, Any], count: int) -> list[int] | None:
    """A seed for each input: the caller's and those after it, or fresh ones; None if none is used.

    An input with several outputs has a seed for each, of which this is the first. The seed that
    was used is put into ``options``, so that the receipt's options repeat the call.
    """
    if not task.draws(options):
        return None
    if options["seed"] is None:
        options["seed"] = secrets.randbelow(MAX_SEED + 1)
    step = task.outputs(options)
    return [(options["seed"] + index * step) % (MAX_SEED + 1) for index in range(count)]


def common(applied: list[dict[str, Any]]) -> dict[str, Any]:
    """What the model chose for options that were left to it, where all inputs agree."""
    first = applied[0]
    return {name: first[name] for name in first if all(one[name] == first[name] for one in applied)}


def receipt(
    spec: ModelSpec,
    answer: Answer,
    options: dict[str, Any],
    seeds: list[int] | None,
    *,
    batched: bool,
    request_id: str,
) -> dict[str, Any]:
    """What a caller is told beside the output; facts of a batch are lists in its order."""
    metadata: dict[str, Any] = {
        "model_id": spec.id,
        "task": spec.type,
        "hf_model": spec.hf_model,
        "revision": answer.revision,
        "device": answer.device,
        "dtype": answer.dtype,
        "request_id": request_id,
        "options": options,
    }
    if seeds is not None:
        metadata["seed"] = seeds if batched else seeds[0]
    for name in sorted({name for facts in answer.facts for name in facts}):
        values = [facts.get(name) for facts in answer.facts]
        metadata[name] = values if batched else values[0]
    usage: Counter[str] = Counter()
    for counts in answer.usage:
        usage.update(counts)
    metadata["usage"] = dict(usage)
    metadata["timings_ms"] = {name: round(ms, 2) for name, ms in answer.timings_ms.items()}
    metadata["batch_size"] = answer.batch_size
    return metadata
