"""Who calls: the holder of a key, or, where none is needed, an address."""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import math
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache

from backend.config import Config, is_loopback
from backend.errors import Forbidden, InvalidApiKey, RateLimitExceeded
from backend.keys import Key, Keys, looks_like_key
from backend.meter import Meter
from backend.quota.tiers import UNIT, Limit, Tier

logger = logging.getLogger("crane.callers")

# Nobody mistypes a key ten times a minute; and of 190 random bits, ten guesses find none.
WRONG_KEYS = Tier("wrong keys", (Limit("rate", 10, 60),), 1000)
# A key that was right here lately goes on working for an address that others send wrong ones from.
TRUSTED_S = 600
MAX_TRUSTED = 10_000


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose quota a call is on, and what it may use: all models where ``models`` is None."""

    subject: str
    tier: Tier
    key_id: str | None = None
    models: frozenset[str] | None = None
    admin: bool = False

    def check_admin(self) -> None:
        """Raises ``Forbidden`` for whoever may not load and unload models."""
        if not self.admin:
            raise Forbidden(
                "Only an admin's key may do this: flask --app wsgi crane keys create --admin makes "
                "one. Where no key is needed, calls from this very host may."
            )

    def may_use(self, model_id: str) -> bool:
        return self.models is None or model_id in self.models

    def check_may_use(self, model_id: str) -> None:
        if not self.may_use(model_id):
            allowed = ", ".join(sorted(self.models or ())) or "none"
            raise Forbidden(f"This key may not use {model_id}. It may use: {allowed}.")


class Callers:
    """Finds a request's caller by its headers and address."""

    def __init__(self, config: Config, keys: Keys, meter: Meter) -> None:
        self._config = config
        self._needs_keys = config.needs_keys
        self._keys = keys
        self._meter = meter
        self._trusted: OrderedDict[bytes, float] = OrderedDict()
        self._lock = threading.Lock()  # of the line above

    def identify(self, *, authorization: str | None, api_key: str | None, address: str) -> Caller:
        """The caller, by two headers and an address.

        Raises ``InvalidApiKey``, or ``RateLimitExceeded`` after too many wrong keys. Where no key
        is needed, what does not look like one of ours is taken for none: some clients must send
        something.
        """
        if self._config.auth == "off" or not (
            self._needs_keys or _looks_like_ours(authorization, api_key)
        ):
            return Caller(
                f"address:{_network(address)}",
                self._config.tiers["free"],
                admin=is_loopback(address),
            )
        text = _key_of(authorization, api_key)
        if text is None:
            raise InvalidApiKey("An API key is needed: send it as Authorization: Bearer crane_….")
        key = self._find(text, address)
        tier = self._config.tiers.get(key.tier)
        if tier is None:
            logger.error("a key's tier is not among CRANE_TIERS: %s", key.tier)
            tier = self._config.tiers["free"]
        return Caller(f"key:{key.id}", tier, key.id, key.models, key.admin)

    def _find(self, text: str, address: str) -> Key:
        if key := self._keys.seen(text):
            return key
        # Never the key itself: nothing of it is kept longer than the request.
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
        subject = f"wrong:{_network(address)}"
        if not self._is_trusted(digest):
            standing = self._meter.look(subject, WRONG_KEYS)
            if standing is not None and standing.left[0] < UNIT:
                raise _too_many(standing.reset_ms[0] / 1000)
        key = self._keys.find(text)
        if key is None:
            # Only now: calls with a right key, however many at once, are no attempts to find one.
            try:
                attempt = self._meter.let_in(subject, WRONG_KEYS, UNIT)
            except RateLimitExceeded as error:
                raise _too_many(error.retry_after_s or 1) from None
            if attempt is not None:
                self._meter.settle(attempt, UNIT)
            raise InvalidApiKey("This API key is not valid: it is wrong, expired or revoked.")
        self._trust(digest)
        return key

    def _is_trusted(self, digest: bytes) -> bool:
        with self._lock:
            return time.monotonic() - self._trusted.get(digest, -math.inf) < TRUSTED_S

    def _trust(self, digest: bytes) -> None:
        with self._lock:
            self._trusted[digest] = time.monotonic()
            self._trusted.move_to_end(digest)
            if len(self._trusted) > MAX_TRUSTED:
                self._trusted.popitem(last=False)


def _too_many(wait_s: float) -> RateLimitExceeded:
    wait_s = math.ceil(wait_s)
    message = f"Too many wrong API keys came from this address; try again in {wait_s} s."
    return RateLimitExceeded(message, retry_after_s=wait_s)


def _looks_like_ours(authorization: str | None, api_key: str | None) -> bool:
    bearer = (authorization or "").partition(" ")[2]
    return looks_like_key(bearer.strip()) or looks_like_key((api_key or "").strip())


def _key_of(authorization: str | None, api_key: str | None) -> str | None:
    """The key that was sent, in whichever header."""
    if authorization is None:
        return api_key
    scheme, _, text = authorization.partition(" ")
    if scheme.lower() != "bearer":
        raise InvalidApiKey("Send the API key as Authorization: Bearer crane_…, or in X-API-Key.")
    if api_key is not None and api_key.strip() != text.strip():
        raise InvalidApiKey("Authorization and X-API-Key hold different keys: send one.")
    return text.strip()


@lru_cache(4096)
def _network(address: str) -> str:
    """An IPv4 address, or the /64 that an IPv6 one is in: whoever has one of it has all of it."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"  # a Unix socket's, or what a proxy made up
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)
