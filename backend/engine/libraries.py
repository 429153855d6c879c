"""The model libraries: imported by one thread at a time, and looked at only when they are whole.

While a thread imports a library, ``sys.modules`` has it already, with most of its names missing.
And two threads that import libraries which import each other may find them half imported as well:
Python lets one of them go on where each waits for the other.
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Iterable
from typing import Any

# What nearly all adapters load their weights with. ``modeling_utils`` is the slow part.
COMMON = ("torch", "transformers.modeling_utils")

_importing = threading.Lock()  # so that no two threads import libraries at once


def load(names: Iterable[str]) -> None:
    """Import libraries; whoever comes meanwhile waits until they are whole. Raises ImportError."""
    with _importing:
        # What torchao reports of kernels that are not there helps nobody.
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
        for name in names:
            importlib.import_module(name)


def imported(name: str) -> Any:
    """A library if it is imported, and whole; else None, also while a thread imports it."""
    module = sys.modules.get(name)
    # Python's own import statement looks at this to know whether it has to wait.
    if module is None or getattr(module.__spec__, "_initializing", False):
        return None
    return module
