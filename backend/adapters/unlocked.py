"""``functools.cached_property`` without a lock, as Python has it from 3.12 on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functools import cached_property

    unlocked_property = cached_property
else:

    class unlocked_property:  # it is used as cached_property is
        """Computed when it is first read, and kept in the instance.

        Python 3.11's own holds one lock for all instances meanwhile: a model that waits for the
        Hub would keep all other models from loading. Two threads may compute it both.
        """

        def __init__(self, compute: Any) -> None:
            self.__doc__ = compute.__doc__
            self._compute = compute

        def __set_name__(self, owner: type, name: str) -> None:
            self._name = name

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            value = self._compute(instance)
            vars(instance)[self._name] = value  # which is found first from now on
            return value
