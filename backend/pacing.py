"""How soon callers get what costs no quota: refusals, lists, their own quota."""

from __future__ import annotations

import threading
import time

# Of a core's time, for one caller of an HTTP worker. A 429 takes about 0.6 ms: so 80 of them a
# second, and those above that are sent later. Who waits to read an answer does not ask as often.
SHARE = 0.05
BURST_S = 0.2  # of a core's time at once, after a while of none
SERVER_S = 0.0004  # of a core's time that a request takes beside the app's, as measured
MAX_DELAY_S = 2.0  # so that an end of it is soon, for whoever shares an address
MAX_CALLERS = 10_000  # the one that is longest there is forgotten, and only answered sooner


class Pacing:
    """What each caller took of this process's time, and when that will be made up for.

    Otherwise one that asks again as soon as it is answered, on many connections, would take all the
    time there is for Python's threads, at no cost.
    """

    def __init__(self) -> None:
        self._even_at: dict[str, float] = {}  # on the monotonic clock
        self._lock = threading.Lock()

    def delay(self, caller: str, cpu_s: float) -> float:
        """Seconds for which to keep a response that took ``cpu_s`` of a core."""
        now = time.monotonic()
        with self._lock:
            even_at = max(self._even_at.pop(caller, 0.0), now - BURST_S / SHARE) + cpu_s / SHARE
            self._even_at[caller] = min(even_at, now + MAX_DELAY_S)
            if len(self._even_at) > MAX_CALLERS:
                del self._even_at[next(iter(self._even_at))]
        return max(0.0, min(even_at - now, MAX_DELAY_S))
