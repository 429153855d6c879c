"""The model libraries: imported by one thread at a time, and looked at only when they are whole.

While a thread imports a library, ``sys.modules`` has it already, with most of its names missing.
And two threads that import libraries which import each other may find them half imported as well:
Python lets one of them go on where each waits for the other.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from backend.engine.load_turns import Load, LoadTurns
from backend.errors import ModelUnavailable

# What nearly all adapters load their weights with. ``modeling_utils`` is the slow part.
COMMON = ("torch", "transformers.modeling_utils")

# Kernels that a CPU's engine keeps, in each of the two caches of oneDNN: its own, and that of
# PyTorch's layer above it. There is one for each shape of each layer's inputs, of up to 0.7 MB, and
# they keep 1,024 by default. A picture of Stable Diffusion has about 75, which are to stay.
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
MAX_KERNELS = 256

LOOK_S = 0.25  # between looks whether a load is still wanted
# After a load was given up, and may never end. Those that wait for it get an error then; an engine
# in a process of its own has ended before that, and they wait for the next one.
GIVEN_UP_S = 10.0


class LoadLock:
    """One load at a time, in the order in which they came, their callers in turn (``LoadTurns``).

    transformers' ``from_pretrained`` changes functions of the process while it works, and puts back
    what it found: two at once may leave them changed for good, and then nothing loads any more. It
    imports modules as well. Whoever waits can ask for whom.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holder: _Load | None = None
        self._given_up_at = math.inf  # the holder
        self._line: list[_Load] = []  # those that wait
        self._turns: LoadTurns[_Load] = LoadTurns()

    @property
    def holder(self) -> str | None:
        """The name under which the lock is held."""
        holder = self._holder
        return holder.name if holder else None

    def give_up(self, thread: threading.Thread) -> None:
        """Whatever a thread does may never end: if it has the lock, the others are not to wait."""
        with self._changed:
            if self._holder and self._holder.thread == thread.ident:
                self._given_up_at = min(self._given_up_at, time.monotonic())

    @contextmanager
    def hold(
        self,
        name: str,
        wanted: Callable[[], bool] = lambda: True,
        waiting: Load | None = None,
    ) -> Iterator[bool]:
        """Load in here; or not, where the value is false: it was not ``wanted`` any more.

        ``waiting`` knows the callers who wait for it. A thread that has the lock may enter again.
        Raises ``ModelUnavailable`` where the load that
        has the lock was given up.
        """
        me = threading.get_ident()
        if (holder := self._holder) and holder.thread == me:
            yield True
            return
        mine = _Load(me, name, waiting)
        with self._changed:
            self._line.append(mine)
        try:
            yield self._wait(mine, wanted)
        finally:
            with self._changed:
                if self._holder is mine:
                    self._holder, self._given_up_at = None, math.inf
                else:
                    self._line.remove(mine)
                self._changed.notify_all()

    def _wait(self, mine: _Load, wanted: Callable[[], bool]) -> bool:
        while wanted():
            with self._changed:
                if self._changed.wait_for(lambda: self._is_next(mine), LOOK_S):
                    self._line.remove(mine)
                    self._holder = mine
                    self._turns.begins(mine)
                    return True
                if time.monotonic() > self._given_up_at + GIVEN_UP_S:
                    raise ModelUnavailable(
                        f"One model loads at a time, and the load of {self.holder} hangs: "
                        "the service must be started again."
                    )
        return False

    def _is_next(self, load: _Load) -> bool:
        return self._holder is None and self._turns.first(self._line) is load


@dataclass(frozen=True, slots=True, eq=False)
class _Load:
    thread: int
    name: str
    waiting: Load | None

    @property
    def callers(self) -> Collection[str]:
        return self.waiting.callers if self.waiting else ()


alone = LoadLock()


def set_up(threads: int) -> None:
    """Set what the libraries read from the environment when they are first imported.

    ``threads`` is for the computation of one run. An operator's own bounds of caches hold.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads wait for one core
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(MAX_KERNELS))


def load(names: Iterable[str]) -> None:
    """Import libraries; whoever comes meanwhile waits until they are whole. Raises ImportError."""
    missing = [name for name in names if imported(name) is None]
    if not missing:
        return
    with alone.hold("the model libraries"):
        # What torchao reports of kernels that are not there helps nobody.
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
        for name in missing:
            importlib.import_module(name)


def imported(name: str) -> Any:
    """A library if it is imported, and whole; else None, also while a thread imports it."""
    module = sys.modules.get(name)
    # Python's own import statement looks at this to know whether it has to wait.
    if module is None or getattr(module.__spec__, "_initializing", False):
        return None
    return module
