"""What an adapter is: one task on one library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from backend.adapters import footprint
from backend.adapters.hub import check_files, fetch_snapshot, pick_device, pick_dtype
from backend.adapters.unlocked import unlocked_property
from backend.engine import libraries
from backend.errors import CraneError, DeadlineExceeded, ModelUnavailable
from backend.registry import ModelSpec

if TYPE_CHECKING:
    import torch


@dataclass(slots=True, kw_only=True)
class Batch:
    """Inputs of one or more callers that run together, all with equal options.

    ``seeds[i]`` is input i's own; ``cancelled(i)`` turns true once nobody waits for it. It is asked
    between steps, and may let other models compute before it answers.
    ``progress(done, of, previews)`` tells the engine how many of a run's steps are done, and
    perhaps how the pictures of some inputs look by now, as pixels. ``listens(i)`` says
    whether input i's caller is told of its run, by ``tell(i, kind, data)`` as ``Event`` has it.
    """

    inputs: list[Any]
    options: dict[str, Any]
    seeds: list[int | None]
    cancelled: Callable[[int], bool]
    progress: Callable[..., None]
    listens: Callable[[int], bool] = lambda index: False
    tell: Callable[[int, str, dict[str, Any]], None] = lambda index, kind, data: None

    def __len__(self) -> int:
        return len(self.inputs)

    def abandoned(self) -> bool:
        """Whether nobody waits for any of it."""
        return not self.waited_for(range(len(self)))

    def waited_for(self, places: Iterable[int]) -> list[int]:
        """Those of some places that somebody still waits for."""
        return [place for place in places if not self.cancelled(place)]

    def pending(self, places: Iterable[int]) -> Iterator[int]:
        """Those of some places that somebody waits for; each is asked when its turn comes.

        For work on one input after another: it ends within one input once nobody waits.
        """
        return (place for place in places if not self.cancelled(place))

    def check(self, places: Iterable[int]) -> None:
        """Raise ``DeadlineExceeded`` where nobody waits for any of some places."""
        if not self.waited_for(places):
            raise too_late()

    def shares(self, owners: Sequence[int], most: int) -> Iterator[list[int]]:
        """Indices of ``owners``, ``most`` at a time, for work that takes several runs.

        ``owners[i]`` is the place that part i of the work is for: once nobody waits for that, what
        is left of its parts is left out.
        """
        left = list(range(len(owners)))
        while left := [index for index in left if not self.cancelled(owners[index])]:
            yield left[:most]
            left = left[most:]


class Entry(Protocol):
    """An input that joins a run by itself, with its own options; as a batch has them."""

    @property
    def input(self) -> Any: ...

    @property
    def options(self) -> Mapping[str, Any]: ...

    @property
    def seed(self) -> int | None: ...

    @property
    def listens(self) -> bool: ...

    @property
    def caller(self) -> str: ...

    prepared: Any  # what ``Feed.park`` waited for; None before

    def cancelled(self) -> bool: ...

    def tell(self, kind: str, data: dict[str, Any]) -> None: ...


class Feed(Protocol):
    """What a run that goes on is fed with: inputs as they come, and its answers to each."""

    def take(self, most: int) -> Sequence[Entry]:
        """Inputs that join the run now; none where none is waiting."""

    def answer(self, entry: Any, result: Prediction | CraneError) -> None:
        """What became of one that was taken; each has one answer, unless it is parked."""

    def park(self, entry: Any, ready: Future[Any]) -> None:
        """Put one that was taken back in the queue, at its head, once the future is done."""


def too_late() -> DeadlineExceeded:
    """What becomes of an input that nobody waits for."""
    return DeadlineExceeded("Nobody waited for the answer any more.")


@dataclass(slots=True)
class Prediction:
    """One input's output; ``usage`` is counted up, ``facts`` (``finish_reason``) are told as is.

    ``applied`` has the values of options that the caller and the entry left to the model.
    """

    output: Any
    usage: Mapping[str, int | float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    applied: dict[str, Any] = field(default_factory=dict)


class Adapter(ABC):
    """Performs one task with one library.

    Building an adapter is cheap; ``load`` is what costs memory, and the only place to import the
    library. The model's worker makes one call at a time, all of them from one thread but ``place``
    and ``fetch``, so an adapter needs no locks. After ``load`` its ``revision``, ``device`` and
    ``dtype`` say what was loaded, and ``window`` to how many tokens a text is cut; None if to none.
    """

    max_batch_tokens: ClassVar[int] = 32768  # padded; 32 texts of 1,024 tokens
    # On a CPU, where a run's time is as its tokens: more of them at once only take longer, and keep
    # other callers waiting. Of BERT's base model, 4,096 tokens take a second or two on two cores.
    max_cpu_tokens: ClassVar[int | None] = None
    # Whether batches in half precision on a CPU leave a core to each HTTP worker; see Worker.
    spares_cores: ClassVar[bool] = True

    # What is imported before ``place`` and ``load``.
    libraries: ClassVar[tuple[str, ...]] = libraries.COMMON
    # Whether nothing else may load meanwhile in this process; see Worker.
    loads_alone: ClassVar[bool] = True
    # Whether its runs on a CPU wait for those of other models there; see turns.py.
    takes_turns: ClassVar[bool] = True
    # What an entry's `memory` and `compile` may ask of this adapter.
    memory_ways: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, spec: ModelSpec, *, device: str = "auto", dtype: str = "auto") -> None:
        self.spec = spec
        self.device = device if device != "auto" else spec.device
        self.dtype = spec.dtype if spec.dtype != "auto" else dtype
        self.revision: str | None = spec.revision
        self.window: int | None = None

    @classmethod
    def weights_key(cls, spec: ModelSpec) -> str:
        """Entries with equal keys share one worker, and ``load_beside`` each other."""
        return spec.id

    def check_entry(self) -> None:
        """Refuse an entry that asks for more than this adapter can do: ``ModelUnavailable``."""
        asked = {way: f"memory.{way}" for way, wanted in self.spec.memory.items() if wanted}
        asked |= {"compile": "compile"} if self.spec.compile else {}
        if beyond := [name for way, name in asked.items() if way not in self.memory_ways]:
            raise ModelUnavailable(
                f"Its entry asks for {beyond[0]}, which type {self.spec.type} cannot do."
            )

    def place(self) -> tuple[str, int]:
        """The device that ``load`` will use, and a guess at the bytes that it will take there."""
        if self.spec.hf_model is None:
            return "cpu", 0
        device = pick_device(self.device)
        dtype = str(self.wanted_dtype(device)).removeprefix("torch.")
        return device, footprint.estimate(self.weight_files, dtype)

    @property
    def max_run_tokens(self) -> int:
        """How many tokens a run may have, padded."""
        if self.device != "cpu" or self.max_cpu_tokens is None:
            return self.max_batch_tokens
        return min(self.max_batch_tokens, self.max_cpu_tokens)

    @unlocked_property
    def weight_files(self) -> Mapping[Path, int]:
        """The files that ``load`` will read the weights from, fetched or not, and their bytes."""
        return footprint.find_files(self.spec) if self.spec.hf_model else {}

    def fetch(self) -> None:
        """Have all that ``load`` reads on this machine, checked; other models may load meanwhile.

        It may take hours, and run in another thread than the rest. A ``ModelUnavailable`` raised
        here reaches the caller.
        """
        if self.spec.hf_model is None:
            return
        downloads = not Path(self.spec.weights()).is_absolute()
        _ = self.folder
        if downloads:  # so that what is known of them is what came
            vars(self).pop("weight_files", None)

    @unlocked_property
    def folder(self) -> Path:
        """Where the files are that ``load`` reads: the entry's folder, or what the Hub has."""
        weights = self.spec.weights()
        folder = Path(weights)
        if not folder.is_absolute():
            # The snapshot's folder is named after its commit: the very files that are checked are
            # loaded, even if the branch moves on meanwhile.
            folder = self.download(weights)
            self.revision = folder.name
        check_files(folder, self.spec.sha256)
        return folder

    def download(self, repository: str) -> Path:
        """The folder of what the Hub has, in its cache; fetched where it is not there yet."""
        return fetch_snapshot(repository, self.spec.revision, **self.spec.load_kwargs)

    @property
    def weights(self) -> tuple[str, dict[str, str]]:
        """What ``from_pretrained`` takes: a folder, and its keywords.

        It has nothing to ask the Hub then. Code that a repository brings may, by its name.
        """
        folder = self.folder
        by_name = self.spec.load_kwargs.get("trust_remote_code")
        if by_name and not Path(self.spec.weights()).is_absolute():
            return self.spec.weights(), {"revision": folder.name}
        return str(folder), {}

    def wanted_dtype(self, device: str) -> torch.dtype | str:
        """What ``load`` makes of an entry's dtype: ``auto`` is the weights' own."""
        return pick_dtype(self.dtype, device)

    def footprint(self) -> int:
        """The bytes that the loaded weights take."""
        return footprint.count(self)

    @abstractmethod
    def load(self) -> None:
        """Put the model on its device. A ``ModelUnavailable`` raised here reaches the caller."""

    @abstractmethod
    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        """Answer each input, in order; an error in a place is that input's alone.

        What nobody waits for shall keep nobody waiting; what is given for it is not looked at.
        """

    def joins(self, options: Mapping[str, Any]) -> bool:
        """Whether an input with these options may join a run that goes on: ``roll``'s."""
        return False

    def roll(self, feed: Feed, most: int) -> None:
        """Answer all that is fed, at most so many inputs at a time, until nothing is left."""
        raise NotImplementedError

    def load_beside(self, loaded: Adapter) -> None:
        """Take over the weights that another entry's adapter of the same key has loaded."""
        raise NotImplementedError

    def unload(self) -> None:  # noqa: B027  # not every adapter takes something
        """Let go of what ``load`` took."""

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        """Guess an input's length in tokens: inputs of like size run together."""
        return 1 + len(value if isinstance(value, str) else str(value)) // 4
