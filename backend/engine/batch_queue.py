"""One model's queue, from which batches are taken: its callers' inputs, caller after caller."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator

from backend.engine.jobs import Item, Job


class BatchQueue:
    """Inputs that wait for a model: each caller's in their order, and the callers in turn.

    So one caller's input stands behind one of each other caller at most, however many those have
    queued. It needs its owner's lock.
    """

    def __init__(self) -> None:
        # In the order of the callers' turns; none of them is empty.
        self._of: dict[str, deque[Item]] = {}
        self._size = 0  # which any thread may read

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Item]:
        return (item for items in self._of.values() for item in items)

    @property
    def callers(self) -> list[str]:
        """Who has inputs here, which any thread may read."""
        return list(self._of)

    @property
    def head(self) -> Item:
        """The input whose turn it is; there must be one."""
        return next(iter(self._of.values()))[0]

    def put(self, items: Iterable[Item]) -> None:
        for item in items:
            self._of.setdefault(item.caller, deque()).append(item)
            self._size += 1

    def put_back(self, items: Iterable[Item]) -> None:
        """Put what was taken at the head again, in the order in which it was taken."""
        back: dict[str, deque[Item]] = {}
        for item in items:
            back.setdefault(item.caller, deque()).append(item)
            self._size += 1
        for caller in back:
            back[caller].extend(self._of.pop(caller, ()))
        self._of = back | self._of

    def take(self) -> Item:
        """Take the head; its caller's next turn comes after all others'."""
        caller = self.head.caller
        items = self._of.pop(caller)
        item = items.popleft()
        self._size -= 1
        if items:
            self._of[caller] = items
        return item

    def take_while(self, joins: Callable[[Item], bool], most: int) -> list[Item]:
        """Take up to ``most`` from the head, as long as the next one ``joins``.

        Who may not join ends it, so that a run that always has new inputs overtakes nobody.
        """
        batch: list[Item] = []
        while len(batch) < most and self._of and joins(self.head):
            batch.append(self.take())
        return batch

    def take_equals(
        self, most: int, group: Callable[[list[Item]], list[Item]] = lambda batch: batch
    ) -> list[Item]:
        """Take the head and what may share a batch with it; there must be one.

        ``group`` says which of these run at once, the first among them. What is passed over keeps
        its place, and who has nothing in the group keeps its turn.
        """
        if self._size == 1:
            return [self.take()]
        key = self.head.job.key
        may = {
            caller: deque(item for item in items if item.job.key == key)
            for caller, items in self._of.items()
        }
        batch: list[Item] = []
        while len(batch) < most and (may := {caller: own for caller, own in may.items() if own}):
            for own in list(may.values())[: most - len(batch)]:
                batch.append(own.popleft())
        batch = group(batch)
        self._size -= len(batch)
        taken = set(map(id, batch))
        served = dict.fromkeys(item.caller for item in batch)
        for caller in served:
            left = deque(item for item in self._of.pop(caller) if id(item) not in taken)
            if left:
                self._of[caller] = left
        return batch

    def push_out(self, new: list[Item], max_size: int) -> list[Job]:
        """Take out the jobs that give their room to a new one; none where that is not enough.

        They are the last ones of whoever has most queued, and more than the new one's caller will
        have. A job of which an input has begun stays.
        """
        queued = {caller: len(items) for caller, items in self._of.items()}
        own = queued.pop(new[0].caller, 0) + len(new)
        jobs = {caller: _whole_jobs(self._of[caller]) for caller in queued}
        out: list[Job] = []
        short = len(self) + len(new) - max_size
        while short > 0:
            largest = max(queued, key=lambda caller: queued[caller], default=None)
            if largest is None or queued[largest] <= own:
                return []
            if not jobs[largest]:
                del queued[largest]
                continue
            out.append(jobs[largest].pop())
            queued[largest] -= len(out[-1].items)
            short -= len(out[-1].items)
        gone = set(out)
        self.keep(lambda items: [item for item in items if item.job not in gone])
        return out

    def keep(self, kept: Callable[[Iterable[Item]], list[Item]]) -> None:
        """Keep of each caller's inputs those that ``kept`` returns."""
        left = ((caller, deque(kept(items))) for caller, items in self._of.items())
        self._of = {caller: items for caller, items in left if items}
        self._size = sum(map(len, self._of.values()))

    def clear(self) -> list[Item]:
        """Take all."""
        items, self._of, self._size = list(self), {}, 0
        return items


def _whole_jobs(items: Iterable[Item]) -> list[Job]:
    """The jobs of which all inputs are there, in their order."""
    counts = Counter(item.job for item in items)
    return [job for job, count in counts.items() if count == len(job.items)]
