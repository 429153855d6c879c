"""Who holds a device's memory: which model may load, and which ones make room for it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from backend.engine.load_turns import LoadTurns
from backend.errors import OutOfMemory

# A loaded model's queued work goes before another model's load, but nobody waits longer for that.
AGE_BOUND_S = 5.0
LEAVE_S = 5.0  # how long an unload may take before nobody waits for it
LOOK_AGAIN_S = 0.25  # for callers that have left meanwhile, and memory that others gave back


class Tenant(Protocol):
    """What holds memory: a model's worker."""

    model_id: str
    pinned: bool
    used_at: float  # when its last batch ended, or it was loaded; of time.monotonic()

    @property
    def users(self) -> int:
        """How many inputs it has, queued and running."""

    @property
    def callers(self) -> Collection[str]:
        """Who waits for it."""

    @property
    def is_leaving(self) -> bool:
        """Whether it is about to give its memory back."""

    def leave(self, *, though_used: bool = False) -> bool:
        """Have it unload, unless it is used, or after its present batch; whether it will."""


@dataclass(slots=True)
class _Holding:
    device: str
    size: int  # bytes


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    tenant: Tenant
    device: str
    size: int
    since: float

    @property
    def callers(self) -> Collection[str]:
        return self.tenant.callers


class Residency:
    """Keeps what models hold on each device within its budget.

    A model that is to load waits in line, its callers in turn (``LoadTurns``). Before the first in
    line, models leave that nobody uses, the least recently used first, and no more of them than it
    takes. Pinned ones never do.
    """

    def __init__(self, budget: Callable[[str], int], free: Callable[[str], int]) -> None:
        """``budget`` tells a device's bytes for models, and ``free`` those free there just now."""
        self._budget_of = budget
        self._free = free
        self._budgets: dict[str, int] = {}
        self._held: dict[Tenant, _Holding] = {}
        self._line: list[_Waiting] = []
        self._turns: defaultdict[str, LoadTurns[_Waiting]] = defaultdict(LoadTurns)  # by device
        self._changed = threading.Condition()

    def take(self, tenant: Tenant, device: str, size: int, wanted: Callable[[], bool]) -> bool:
        """Hold ``size`` bytes for a tenant, when there is room; false once it is not ``wanted``.

        It may be unwanted by now, where its download took long: it has what there is room for at
        once. Raises ``OutOfMemory`` where there never will be.
        """
        with self._changed:
            if not size:
                self._held[tenant] = _Holding(device, 0)
                return True
            me = _Waiting(tenant, device, size, time.monotonic())
            self._line.append(me)
            try:
                entered = self._enters(me)
                while not entered and wanted():
                    if me is self._first(device):
                        self._make_room(me)
                    self._changed.wait(LOOK_AGAIN_S)
                    entered = wanted() and self._enters(me)
                return entered
            finally:
                self._line.remove(me)
                self._changed.notify_all()

    def check(self, tenant: Tenant, device: str, size: int) -> None:
        """Raise ``OutOfMemory`` where there will never be room for a tenant."""
        if size:
            with self._changed:
                self._check_possible(_Waiting(tenant, device, size, time.monotonic()))

    def settle(self, tenant: Tenant, size: int) -> None:
        """Put right what a tenant holds, now that it is loaded; idle ones go if it is too much."""
        with self._changed:
            holding = self._held[tenant]
            holding.size = size
            over = -self._room(holding.device)
            if over > 0:
                self._send_away(holding.device, over, besides=tenant)
            self._changed.notify_all()

    def give_back(self, tenant: Tenant) -> None:
        """The tenant holds nothing any more."""
        with self._changed:
            self._held.pop(tenant, None)
            self._changed.notify_all()

    def look_again(self) -> None:
        """A tenant has become idle."""
        with self._changed:
            if self._line:
                self._changed.notify_all()

    def empty(self, besides: Tenant, idle_s: float = 0.0) -> None:
        """Have all models on a tenant's device leave that nobody used for so long, and wait."""
        with self._changed:
            device = self.device_of(besides)
            since = time.monotonic() - idle_s
            others = [
                tenant
                for tenant, holding in self._held.items()
                if holding.device == device and tenant is not besides and tenant.used_at <= since
            ]
            leaving = [tenant for tenant in others if tenant.is_leaving or tenant.leave()]
            self._changed.wait_for(
                lambda: not any(tenant in self._held for tenant in leaving), LEAVE_S
            )

    def device_of(self, tenant: Tenant) -> str:
        """The device that a tenant holds memory on."""
        return self._held[tenant].device

    def held(self, tenant: Tenant) -> int:
        """The bytes that a tenant holds."""
        holding = self._held.get(tenant)
        return holding.size if holding else 0

    def budgets(self) -> dict[str, dict[str, int]]:
        """Each device that was asked for: the bytes that models may hold there, and do."""
        with self._changed:
            return {
                device: {"budget_bytes": budget, "held_bytes": budget - self._room(device)}
                for device, budget in self._budgets.items()
            }

    def why(self, tenant: Tenant) -> OutOfMemory | None:
        """What keeps a tenant waiting, if it waits."""
        with self._changed:
            mine = next((one for one in self._line if one.tenant is tenant), None)
            return self._refusal(mine) if mine else None

    def _check_possible(self, me: _Waiting) -> None:
        kept = sum(
            holding.size
            for tenant, holding in self._held.items()
            if tenant.pinned and holding.device == me.device
        )
        alone = not any(holding.device == me.device for holding in self._held.values())
        if me.size > self._budget(me.device) - kept or (alone and me.size > self._free(me.device)):
            raise self._refusal(me)

    def _enters(self, me: _Waiting) -> bool:
        """Hold the memory, if there is room just now. Raises ``OutOfMemory``."""
        self._check_possible(me)
        if not self._may_enter(me):
            return False
        self._held[me.tenant] = _Holding(me.device, me.size)
        self._turns[me.device].begins(me)
        return True

    def _may_enter(self, me: _Waiting) -> bool:
        if self._short(me) > 0:
            return False
        first = self._first(me.device)
        if me is first:
            return True
        # Room that is being made is the first one's; what it cannot use yet may be used meanwhile.
        leaving = any(tenant.is_leaving for tenant in self._held)
        late = time.monotonic() - first.since >= AGE_BOUND_S
        return self._short(first) > 0 and not leaving and not late

    def _make_room(self, me: _Waiting) -> None:
        coming = sum(
            holding.size
            for tenant, holding in self._held.items()
            if tenant.is_leaving and holding.device == me.device
        )
        if self._short(me) > coming:
            late = time.monotonic() - me.since >= AGE_BOUND_S
            self._send_away(
                me.device, self._short(me) - coming, besides=me.tenant, though_used=late
            )

    def _send_away(
        self, device: str, size: int, *, besides: Tenant, though_used: bool = False
    ) -> None:
        """Have tenants leave that hold ``size`` bytes together, if there are such."""
        may = [
            tenant
            for tenant, holding in self._held.items()
            if holding.device == device
            and tenant is not besides
            and not (tenant.pinned or tenant.is_leaving)
            and holding.size
            and (though_used or not tenant.users)
        ]
        # Whoever is used goes last.
        may.sort(key=lambda tenant: (tenant.users > 0, tenant.used_at))
        chosen: list[Tenant] = []
        while may and sum(map(self.held, chosen)) < size:
            chosen.append(may.pop(0))
        spare = sum(map(self.held, chosen)) - size
        if spare < 0:
            return
        for tenant in list(chosen):  # a small one was taken before a large one that is enough
            if self.held(tenant) <= spare:
                spare -= self.held(tenant)
                chosen.remove(tenant)
        for tenant in chosen:
            tenant.leave(though_used=though_used)

    def _budget(self, device: str) -> int:
        if device not in self._budgets:
            self._budgets[device] = self._budget_of(device)
        return self._budgets[device]

    def _room(self, device: str) -> int:
        held = sum(one.size for one in self._held.values() if one.device == device)
        return self._budget(device) - held

    def _short(self, me: _Waiting) -> int:
        """The bytes that are missing before ``me`` may load; none if not above 0.

        The budget is a promise; what is free is the truth, where others use the device too.
        """
        return me.size - min(self._room(me.device), self._free(me.device))

    def _first(self, device: str) -> _Waiting:
        return self._turns[device].first([one for one in self._line if one.device == device])

    def _refusal(self, me: _Waiting) -> OutOfMemory:
        holders = {
            tenant: holding.size
            for tenant, holding in self._held.items()
            if holding.device == me.device and holding.size
        }
        shown = ", ".join(
            f"{tenant.model_id} {shown_size(size)} ({_use(tenant)})"
            for tenant, size in holders.items()
        )
        budget, free = self._budget(me.device), max(0, self._free(me.device))
        return OutOfMemory(
            f"{me.tenant.model_id} needs {shown_size(me.size)} on {me.device}, where models may "
            f"hold {shown_size(budget)} and {shown_size(free)} is free; "
            f"held: {shown or 'nothing'}.",
            details={
                "needed_bytes": me.size,
                "budget_bytes": budget,
                "held_bytes": {tenant.model_id: size for tenant, size in holders.items()},
            },
            retry_after_s=10,
        )


def _use(tenant: Tenant) -> str:
    if tenant.pinned:
        return "pinned"
    return f"{tenant.users} in use" if tenant.users else "idle"


def shown_size(size: int) -> str:
    """``450 MB``: decimal, as CRANE_MEMORY_BUDGET reads it."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
