"""What a load needs on this machine, fetched by a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

from backend.adapters.base import Adapter


class Fetch:
    """One adapter's look-ups and downloads.

    No one can end a download that hangs. So the model's thread waits for it as long as anybody
    waits for the model, and leaves it alone then: it goes on, and serves the next load.
    """

    def __init__(self, adapter: Adapter, work: Callable[[Adapter], None]) -> None:
        self.adapter = adapter
        self._work = work
        self._over = threading.Event()
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name=f"fetch {adapter.spec.id}", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Wait for its end; whether it has come."""
        return self._over.wait(seconds)

    def check(self) -> None:
        """Raise what it has ended with, if that was an error."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._work(self.adapter)
        except BaseException as error:
            self._error = error
        finally:
            self._over.set()
