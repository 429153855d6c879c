"""Draws of a library that knows the global random state alone, from generators of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def own_draws(seeds: list[int], device: str, step: Callable[[], None] = lambda: None) -> Any:
    """A ``with`` block whose draws are those of ``torch.manual_seed(seed)``, of no one else's.

    It sees the torch calls of this thread only, so models in other threads neither disturb it nor
    are disturbed; those that name a generator draw from that. ``seeds`` has one for each input of a
    batch; rows of ``multinomial`` are shared out evenly among them, and nothing else may be drawn
    for several. ``step`` is called before each token that is drawn or chosen; what it raises ends
    the run.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    # A library draws on the processor or on the model's device; manual_seed seeds both alike.
    kinds = {"cpu", torch.device(device).type}
    generators = [
        {
            kind: torch.Generator(kind if kind == "cpu" else device).manual_seed(seed)
            for kind in kinds
        }
        for seed in seeds
    ]

    def one(place: Any) -> torch.Generator:
        assert len(generators) == 1, "nothing but tokens can be drawn for several inputs at once"
        return generators[0][torch.device(place or "cpu").type]

    def from_own(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """A function that draws on the device of its tensor, or on the ``device`` it is given."""

        def draw(*args: Any, **how: Any) -> torch.Tensor:
            if how.get("generator") is None:
                tensors = [arg for arg in args[:2] if isinstance(arg, torch.Tensor)]
                where = tensors[0].device if tensors else how.get("device")
                how = {**how, "generator": one(where)}
            return function(*args, **how)

        return draw

    # Both are what torch does itself, memory's order too.
    def randn_like(like: torch.Tensor, **how: Any) -> torch.Tensor:
        empty = torch.empty_like(like, **how)
        return empty.normal_(generator=one(empty.device))

    def rand_like(like: torch.Tensor, **how: Any) -> torch.Tensor:
        empty = torch.empty_like(like, **how)
        return empty.uniform_(generator=one(empty.device))

    def bernoulli(chances: torch.Tensor, *args: Any, **how: Any) -> torch.Tensor:
        step()
        return from_own(torch.bernoulli)(chances, *args, **how)

    def multinomial(chances: torch.Tensor, *args: Any, **how: Any) -> torch.Tensor:
        step()
        if how.get("generator") is not None:
            return torch.multinomial(chances, *args, **how)
        how.pop("generator", None)
        parts = chances.chunk(len(generators))
        kind = chances.device.type
        drawn = [
            torch.multinomial(part, *args, generator=own[kind], **how)
            for part, own in zip(parts, generators, strict=True)
        ]
        return torch.cat(drawn)

    def argmax(*args: Any, **how: Any) -> torch.Tensor:
        step()
        return torch.argmax(*args, **how)

    ours: dict[Any, Callable[..., torch.Tensor]] = {
        **{
            function: from_own(function)
            for function in (
                torch.randn,
                torch.rand,
                torch.randint,
                torch.randperm,
                torch.normal,
                torch.Tensor.normal_,
                torch.Tensor.uniform_,
                torch.Tensor.bernoulli_,
                torch.Tensor.exponential_,
            )
        },
        torch.randn_like: randn_like,
        torch.rand_like: rand_like,
        torch.bernoulli: bernoulli,
        torch.multinomial: multinomial,
        torch.argmax: argmax,
    }

    class OwnDraws(TorchFunctionMode):  # type: ignore[misc]  # torch is not typed
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return ours.get(function, function)(*args, **(kwargs or {}))

    return OwnDraws()
