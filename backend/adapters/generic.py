"""Any pipeline of transformers, for the tasks of ``backend.tasks.generic``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from backend.adapters.base import Adapter, Batch, Prediction, too_late
from backend.adapters.generic_calls import CALLS
from backend.adapters.hub import pick_device
from backend.adapters.interruption import interruptible_parts
from backend.adapters.memory import dtype_name, quantize
from backend.adapters.packing import keep_packed
from backend.adapters.plain import plain
from backend.adapters.transformers_base import quiet
from backend.adapters.words import bound_words
from backend.errors import CraneError, DeadlineExceeded, InvalidRequest, ModelUnavailable


class GenericPipeline(Adapter):
    """Builds the pipeline that is called like the entry's type, and asks it for each input.

    One by one: pipelines that run several inputs together pad them, and few models give the same
    numbers then.
    """

    memory_ways = frozenset(("quantize",))

    def load(self) -> None:
        import transformers

        quiet()
        call = CALLS[self.spec.type]
        if missing := _missing(call.needs):
            raise ModelUnavailable(f"It needs {missing}, which is not installed here.")
        weights, revision = self.weights
        self.device = pick_device(self.device)
        kwargs = dict(self.spec.load_kwargs)
        trust = {"trust_remote_code": kwargs.pop("trust_remote_code", None)}
        # A device map in the entry's `load` places the model by itself.
        device = {} if "device_map" in kwargs else {"device": self.device}
        dtype = self.wanted_dtype(self.device)
        try:
            self.pipeline = transformers.pipeline(
                self.spec.type,
                model=weights,
                dtype=dtype,
                model_kwargs=kwargs,
                **revision,
                **trust,
                **device,
            )
        except (ImportError, ValueError) as error:
            said = str(error).lower()
            named = tuple(name for name in call.may_need if name in said)
            if missing := _missing(named):
                why = f"It needs {missing}, which is not installed here."
                raise ModelUnavailable(why) from error
            raise
        bound_words(self.pipeline.tokenizer)
        model = self.pipeline.model
        if call.model_types and model.config.model_type not in call.model_types:
            raise ModelUnavailable(
                f"Its checkpoint is for a model of the kind {model.config.model_type!r}; for this "
                f"task it must be {' or '.join(map(repr, call.model_types))}."
            )
        quantize([model], self.spec.memory, self.device)
        model.eval()
        keep_packed(model)
        for part in interruptible_parts(model):
            part.register_forward_pre_hook(self._stop_if_cancelled)
        model.register_forward_hook(_have_float32_logits)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.do_sample = False  # numbers are drawn for all callers in turn
        self.dtype = dtype_name(model.dtype, self.spec.memory)

    def unload(self) -> None:
        del self.pipeline

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        return 1  # nothing is padded

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        results = []
        for place in range(len(batch)):
            results.append(self._answer(batch, place))
            batch.progress(place + 1, len(batch))
        return results

    def _answer(self, batch: Batch, place: int) -> Prediction | CraneError:
        self._cancelled: Callable[[], bool] = lambda: batch.cancelled(place)
        try:
            self._stop_if_cancelled()
            ask = CALLS[self.spec.type].ask
            output, facts = ask(self.pipeline, batch.inputs[place], batch.options)
        except (InvalidRequest, DeadlineExceeded) as error:
            return error
        return Prediction(plain(output), {"inputs": 1}, facts)

    def _stop_if_cancelled(self, *_: Any) -> None:
        if self._cancelled():
            raise too_late()


def _have_float32_logits(_: Any, __: Any, output: Any) -> None:
    """TAPAS's tokenizer makes NumPy arrays of them, which have no bfloat16."""
    for name, value in output.items() if isinstance(output, Mapping) else ():
        if name.startswith("logits") and value is not None:
            output[name] = value.float()


def _missing(packages: tuple[str, ...]) -> str:
    return " and ".join(name for name in packages if importlib.util.find_spec(name) is None)
