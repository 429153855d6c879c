"""Until when a loaded model stays: as long as any of those who used it wants it to."""

from __future__ import annotations


class Stay:
    """Each caller's last use of a model has a time until which it stays; the latest counts.

    So a caller that wants it gone at once takes it from nobody who has used it within the time
    that it stays for them. All times are those of ``time.monotonic()``, in seconds.
    """

    def __init__(self) -> None:
        self._until: dict[str | None, float] = {}
        self._unused_until = 0.0

    @property
    def until(self) -> float:
        return max(self._until.values(), default=self._unused_until)

    def load(self, now: float, stay_s: float, *, ordered: bool) -> None:
        """Begin anew: no caller has used it yet, but whoever ``ordered`` its load wants it."""
        self._until = {None: now + stay_s} if ordered else {}
        self._unused_until = now + stay_s

    def use(self, caller: str, now: float, stay_s: float) -> None:
        """A call has ended whose caller wants the model to stay so long."""
        self._until = {one: until for one, until in self._until.items() if until > now}
        self._until[caller] = now + stay_s
