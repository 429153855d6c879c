"""Which devices each engine has, found without touching CUDA, and by which names."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import pynvml

from backend.errors import ModelUnavailable


def found(wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The engines of ``CRANE_DEVICES``: ``auto`` is one for each GPU where there are several."""
    count = gpus() if wanted == ("auto",) else 0
    return tuple(f"cuda:{index}" for index in range(count)) if count > 1 else wanted


def gpus(environ: Mapping[str, str] = os.environ) -> int:
    """How many GPUs CUDA would find.

    NVIDIA's management library tells, for who has asked CUDA cannot fork any more.
    """
    if _torch_has_no_cuda():
        return 0
    try:
        pynvml.nvmlInit()
        try:
            count = int(pynvml.nvmlDeviceGetCount())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # no NVIDIA driver
        return 0
    visible = _visible(environ)
    if visible is None:
        return count
    # CUDA reads the list up to the first number that is no GPU's. Other names, as those of parts
    # of a GPU, are not counted by the library, and whoever wrote them knows them.
    right = 0
    for name in visible:
        if name.lstrip("-").isdigit() and not 0 <= int(name) < count:
            break
        right += 1
    return right


def _torch_has_no_cuda() -> bool:
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return True


def _visible(environ: Mapping[str, str]) -> list[str] | None:
    names = environ.get("CUDA_VISIBLE_DEVICES")
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices of one engine of several.

    An engine that has GPUs sees no others, so that no library can take what is not its own. Inside
    it they are counted from 0 again, as CUDA does, while all the world calls them by
    ``CRANE_DEVICES``' names.
    """

    engines: tuple[str, ...]
    index: int = 0

    @property
    def name(self) -> str:
        return self.engines[self.index]

    @property
    def _gpus(self) -> list[str]:
        return self.name.split("+") if self.name.startswith("cuda") else []

    def keep_to(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Hide all other GPUs from this process, which must not have used CUDA before."""
        if self._gpus:
            visible = _visible(environ)
            numbers = [int(name.removeprefix("cuda:")) for name in self._gpus]
            if visible is None:
                names = [str(number) for number in numbers]
            else:  # a number that is past its end is missing where a model is put on it
                names = [visible[number] for number in numbers if number < len(visible)]
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)

    def local(self, wanted: str) -> str:
        """What CUDA calls the device that an entry wants; ``ModelUnavailable`` for another's."""
        if wanted == "auto":
            return "cuda:0" if self._gpus else self.name
        if not self._gpus or not wanted.startswith("cuda"):
            return wanted
        if wanted == "cuda":
            return "cuda:0"
        if wanted not in self._gpus:
            raise ModelUnavailable(
                f"Its device {wanted} is not among CRANE_DEVICES, {','.join(self.engines)}."
            )
        return f"cuda:{self._gpus.index(wanted)}"

    def shown(self, local: str) -> str:
        """What all the world calls a device of this engine."""
        kind, _, index = local.partition(":")
        return self._gpus[int(index or 0)] if self._gpus and kind == "cuda" else local

    def memory(self, local: str) -> str:
        """Where a model on a device takes memory: an engine's GPUs are one place for models."""
        return self.name if self._gpus and local.startswith("cuda") else local

    def parts(self, memory: str) -> list[str]:
        """The devices, as CUDA calls them, that such a place is made of."""
        if self._gpus and memory == self.name:
            return [f"cuda:{index}" for index in range(len(self._gpus))]
        return [memory]

    def sharers(self, memory: str) -> int:
        """How many engines may put models there: main memory is everybody's."""
        if not memory.startswith("cuda"):
            return len(self.engines)
        mine = set(memory.split("+"))
        return max(1, sum(bool(mine & set(name.split("+"))) for name in self.engines))
