"""API keys: who may call. ``crane_<id>_<secret>``, of which only an HMAC is kept."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic
from typing import TYPE_CHECKING, Any

from backend import logs
from backend.config import PEPPER_LENGTH, Config
from backend.errors import KeysUnavailable
from backend.key_text import (
    ID_PLACE,
    id_of,
    is_id,
    looks_like_key,
    mac_of,
    mark_of,
    new_id,
    new_text,
)
from backend.lookups import Lookups
from backend.private import kept_secret, write_private

if TYPE_CHECKING:
    from backend.store import Store

logger = logging.getLogger("crane.keys")

__all__ = ["Key", "KeyEnded", "Keys", "UnknownKey", "looks_like_key"]

CACHE_S = 3.0  # a revoked key stops within this and the time of one read
CACHE_SIZE = 10_000  # keys; the one that was read the longest ago makes room
USED_EVERY_S = 60.0
FIRST_KEY_FILE = "first-key"  # in the data folder
_NO_MAC = "0" * 64


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key, which is all but the key itself."""

    id: str
    owner: str
    tier: str
    models: frozenset[str] | None  # None: every model
    admin: bool  # whether it may load and unload them
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None

    def state(self, now: datetime) -> str:
        """``live``, ``revoked`` or ``expired``."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "live"


class UnknownKey(LookupError):
    """There is no key of that id."""


class KeyEnded(ValueError):
    """A key that is revoked or expired, and cannot be made to work again."""


@dataclass(slots=True)
class _Seen:
    """A key as it was in the database a moment ago, and a digest of the text that was it."""

    key: Key
    mac: str = field(repr=False)
    read_at: float
    digest: bytes | None = field(repr=False, default=None)


class Keys:
    """The keys of a service. Cheap to make: nothing is imported or opened before the first use.

    All methods raise ``KeysUnavailable`` where the database, or the pepper, cannot be used.
    """

    def __init__(
        self, config: Config, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._config = config
        self._now = now
        self._lock = threading.Lock()  # so that there is one store, and the tables keep their size
        self._opened: tuple[Store, bytes, Lookups] | None = None
        self._seen: dict[str, _Seen] = {}
        self._digest_key = secrets.token_bytes(32)  # so that digests are no use elsewhere
        self._used: dict[str, float] = {}
        self._wrong: dict[bytes, float] = {}  # digests of texts that were no key, and when
        self._warned = False

    def find(self, text: str) -> Key | None:
        """The key that ``text`` is, where it is whole, right, unexpired and not revoked."""
        id_ = id_of(text)
        if id_ is None:
            return None
        # Where it is another secret than the one that was seen, it may have been rotated just now.
        if key := self.seen(text):
            return key
        digest = self._digest(text)
        if monotonic() - self._wrong.get(digest, -CACHE_S) < CACHE_S:
            return None
        with _available():
            _, pepper, lookups = self._open()
            key = self._right(self._read(lookups, pepper, id_), text)
        if key is None:
            with self._lock:
                _put(self._wrong, digest, monotonic())
        return key

    def seen(self, text: str) -> Key | None:
        """The key that ``text`` is, where that was found out a moment ago; waits for nothing."""
        seen = self._seen.get(text[ID_PLACE])
        if seen is None or monotonic() - seen.read_at > CACHE_S or not text.isascii():
            return None
        return self._right(seen, text)

    def create(
        self,
        *,
        owner: str,
        tier: str,
        expires_at: datetime | None = None,
        models: Iterable[str] | None = None,
        admin: bool = False,
    ) -> tuple[Key, str]:
        """Make a key; the text is told here and never again."""
        with _available():
            store, pepper, _ = self._open()
            only = None if models is None else sorted(models)
            row, text = self._made(
                pepper, owner=owner, tier=tier, expires_at=expires_at, models=only, admin=admin
            )
            store.add_key(row)
        return _key(row), text

    def create_first(self, *, owner: str, tier: str, keep: Callable[[str], None]) -> Key | None:
        """Make an admin's key where no key was ever made; of all that race, one does.

        ``keep`` gets the text before the key is there. Where it raises, there is none.
        """
        with _available():
            store, pepper, _ = self._open()
            if store.has_keys():
                return None
            row, text = self._made(pepper, owner=owner, tier=tier, admin=True)
            return _key(row) if store.add_first_key(row, lambda: keep(text)) else None

    def list(self) -> list[Key]:
        """All keys that were ever made, the oldest first."""
        with _available():
            return [_key(row) for row in self._open()[0].all_keys()]

    def revoke(self, id: str) -> Key:
        """Make a key stop working, for good. Raises ``UnknownKey``."""
        with _available():
            store, _, _ = self._open()
            row = None
            if is_id(id):  # a database may refuse to look for what is none
                row = store.change_key(id, revoked_at=self._now()) or store.key(id)
        self._forget(id)
        if row is None:
            raise UnknownKey(id)
        return _key(row)

    def rotate(self, id: str) -> tuple[Key, str]:
        """Give a key a new secret; the old one stops. Raises ``UnknownKey`` and ``KeyEnded``."""
        text = new_text(id)
        with _available():
            store, pepper, _ = self._open()
            row = store.key(id) if is_id(id) else None
            if row is None:
                raise UnknownKey(id)
            if (state := _key(row).state(self._now())) != "live":
                raise KeyEnded(f"key {id} is {state}")
            row = store.change_key(id, mac=mac_of(pepper, text), pepper_mark=mark_of(pepper))
        self._forget(id)
        if row is None:  # revoked since it was read
            raise KeyEnded(f"key {id} is revoked")
        return _key(row), text

    def close(self) -> None:
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None:
            opened[0].close()

    def _digest(self, text: str) -> bytes:
        # OpenSSL's HMAC takes 30 µs amid all that a worker does, and this 2.
        return hashlib.blake2b(text.encode(), key=self._digest_key).digest()

    def _right(self, seen: _Seen | None, text: str) -> Key | None:
        store, pepper, _ = self._open()
        if seen is None:  # compared all the same: an id that is there is answered no later
            hmac.compare_digest(_NO_MAC, mac_of(pepper, text))
            return None
        digest = self._digest(text)
        if seen.digest is None or not hmac.compare_digest(seen.digest, digest):
            if not hmac.compare_digest(seen.mac, mac_of(pepper, text)):
                return None
            seen.digest = digest
        if seen.key.state(self._now()) != "live":
            return None
        if monotonic() - self._used.get(seen.key.id, -USED_EVERY_S) >= USED_EVERY_S:
            self._note_use(store, seen.key)
        return seen.key

    def _open(self) -> tuple[Store, bytes, Lookups]:
        if self._opened is None:
            with self._lock:
                if self._opened is None:
                    from backend.store import LIMIT_S, Store

                    pepper = self._config.key_pepper or kept_secret(
                        self._config.data_dir / "pepper", least=PEPPER_LENGTH
                    )
                    store = Store(self._config)
                    # Through the store's attribute, which a test may replace.
                    lookups = Lookups(lambda ids: store.keys(ids), limit_s=LIMIT_S)
                    self._opened = store, pepper.encode(), lookups
        return self._opened

    def _made(self, pepper: bytes, **known: Any) -> tuple[dict[str, Any], str]:
        id_ = new_id()
        text = new_text(id_)
        made = {"id": id_, "mac": mac_of(pepper, text), "pepper_mark": mark_of(pepper)}
        empty = dict.fromkeys(("models", "expires_at", "last_used_at", "revoked_at"))
        return {**empty, **made, "created_at": self._now(), **known}, text

    def _read(self, lookups: Lookups, pepper: bytes, id_: str) -> _Seen | None:
        read_at = monotonic()
        row = lookups.get(id_)
        if row is None:  # not remembered: there is no end of ids that do not exist
            return None
        if row["pepper_mark"] != mark_of(pepper) and not self._warned:
            self._warned = True
            logger.warning(
                "key %s was made with another pepper and cannot be recognised; "
                "CRANE_KEY_PEPPER must be the same wherever the database is used",
                id_,
            )
        seen = _Seen(_key(row), row["mac"], read_at)
        with self._lock:
            _put(self._seen, id_, seen)
        return seen

    def _forget(self, id_: str) -> None:
        with self._lock:
            self._seen.pop(id_, None)

    def _note_use(self, store: Store, key: Key) -> None:
        """Write down that a key was used, now and then; a call never fails for it."""
        now = monotonic()
        with self._lock:  # so that one of a key's many threads writes, and tries once
            if now - self._used.get(key.id, -USED_EVERY_S) < USED_EVERY_S:
                return
            _put(self._used, key.id, now)
        try:
            store.change_key(key.id, last_used_at=self._now())
        except OSError:
            logger.warning("the use of key %s was not written down", key.id)


@contextmanager
def _available() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # StoreError is one, and so is whatever keeps the pepper from us
        raise KeysUnavailable(
            "Keys cannot be looked up just now; try again in a few seconds.", retry_after_s=2
        ) from error


def _key(row: Mapping[str, Any]) -> Key:
    known = {name: row[name] for name in Key.__slots__}
    return Key(**known | {"models": None if row["models"] is None else frozenset(row["models"])})


def _put(table: dict[Any, Any], id_: str | bytes, value: Any) -> None:
    """Put in as the newest, and let the oldest go where there are too many."""
    table.pop(id_, None)
    table[id_] = value
    if len(table) > CACHE_SIZE:
        del table[next(iter(table))]


def main() -> None:
    """Make a key for the widest tier if none was ever made, and print the file that it is in."""
    config = Config.from_env()
    logs.set_up(config.log_level, config.log_format)
    widest = max(config.tiers.values(), key=lambda tier: tier.limits[0].per_second)
    file = config.data_dir.resolve() / FIRST_KEY_FILE
    with closing(Keys(config)) as keys:
        try:
            key = keys.create_first(
                owner="first", tier=widest.name, keep=lambda text: write_private(file, f"{text}\n")
            )
        except KeysUnavailable as error:
            sys.exit(f"No first API key could be made: {error.__cause__ or error}")
    if key is not None:
        print(file)


if __name__ == "__main__":
    main()
