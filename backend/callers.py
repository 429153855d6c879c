"""Who calls: the holder of a key, or, where none is needed, an address."""

from __future__ import annotations

import ipaddress
import logging
import math
import threading
import time
from dataclasses import dataclass
from functools import lru_cache

from backend.browsers import Browsers
from backend.config import Config
from backend.errors import Forbidden, InvalidApiKey, RateLimitExceeded
from backend.keys import Key, Keys, looks_like_key
from backend.locality import Environ, forwarding_header, is_from_loopback, is_local
from backend.quota.tiers import Tier

logger = logging.getLogger("crane.callers")

# Nobody mistypes a key ten times a minute. Of 190 random bits no number of guesses finds any: this
# is for clients with a wrong key, so that they notice and slow down.
MAX_WRONG_KEYS = 10
WINDOW_S = 60.0
MAX_ADDRESSES = 10_000  # of which wrong keys are counted; the one that began first is forgotten


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose quota a call is on, and what it may use: all models where ``models`` is None."""

    subject: str
    tier: Tier
    key_id: str | None = None
    models: frozenset[str] | None = None
    admin: bool = False

    @property
    def is_keyless(self) -> bool:
        """Whether the caller was let in without a key: from this host, or CRANE_AUTH is off."""
        return self.key_id is None

    def check_admin(self) -> None:
        """Raises ``Forbidden`` for whoever may not load and unload models."""
        if not self.admin:
            raise Forbidden(
                "Only an admin's key may do this: flask --app wsgi crane keys create --owner "
                "NAME --tier TIER --admin makes one, where CRANE_AUTH is not off. On the service's "
                "own host, flask --app wsgi crane models does the same without a key."
            )

    def may_use(self, model_id: str) -> bool:
        return self.models is None or model_id in self.models

    def check_may_use(self, model_id: str) -> None:
        """Raises ``Forbidden``, of a model that is not there as of one that is not to be used."""
        if not self.may_use(model_id):
            allowed = ", ".join(sorted(self.models or ())) or "none"
            raise Forbidden(f"This key may not use {model_id[:100]}. It may use: {allowed}.")


class Callers:
    """Finds a request's caller by its connection and headers."""

    def __init__(self, config: Config, keys: Keys) -> None:
        self._config = config
        self._keys = keys
        self._browsers = Browsers(config)
        self._wrong = WrongKeys()
        self._proxy_was_noted = False

    def identify(self, environ: Environ) -> Caller:
        """The caller of a WSGI request.

        Raises ``InvalidApiKey``, ``RateLimitExceeded`` after many wrong keys, ``KeysUnavailable``,
        and ``Forbidden`` for web pages that have no business here. Where no key is needed, what
        does not look like one of ours is taken for none: some clients must send something.
        """
        authorization = environ.get("HTTP_AUTHORIZATION")
        api_key = environ.get("HTTP_X_API_KEY")
        if self._needs_no_key(environ, authorization, api_key):
            return self._keyless(environ)
        text = _key_of(authorization, api_key)
        if text is None:
            raise InvalidApiKey("An API key is needed: send it as Authorization: Bearer crane_….")
        key = self._find(text, environ)
        tier = self._config.tiers.get(key.tier)
        if tier is None:
            logger.error("a key's tier is not among CRANE_TIERS: %s", key.tier)
            tier = self._config.tiers["free"]
        return Caller(f"key:{key.id}", tier, key.id, key.models, key.admin)

    def identify_watcher(self, environ: Environ) -> Caller:
        """Who looks at the service's condition: from this very host, always without a key."""
        if "HTTP_AUTHORIZATION" in environ or "HTTP_X_API_KEY" in environ or not is_local(environ):
            return self.identify(environ)
        return self._keyless(environ)

    def _needs_no_key(
        self, environ: Environ, authorization: str | None, api_key: str | None
    ) -> bool:
        if self._config.auth == "off":
            return True
        if self._config.auth == "required" or _looks_like_ours(authorization, api_key):
            return False
        return is_local(environ) or self._note_proxy(environ)

    def _keyless(self, environ: Environ) -> Caller:
        self._browsers.check(environ)
        return Caller(f"address:{_network(_address(environ))}", self._config.tiers["free"])

    def _note_proxy(self, environ: Environ) -> bool:
        """Say once why callers on this host need keys; False."""
        if not (self._proxy_was_noted or self._config.trusted_proxies):
            header = forwarding_header(environ)
            if header is not None and is_from_loopback(environ):
                self._proxy_was_noted = True
                logger.warning(
                    "a proxy on this host passes calls on (%s): they are not this host's own and "
                    "need an API key (flask --app wsgi crane keys create); so that clients are "
                    "told apart, CRANE_TRUSTED_PROXIES must say how many proxies there are",
                    header,
                )
        return False

    def _find(self, text: str, environ: Environ) -> Key:
        # Right keys first: none of them waits for, or is counted with, what is wrong.
        key = self._keys.find(text)
        if key is not None:
            return key
        wait_s = self._wrong.count(_network(_address(environ)))
        if wait_s is not None:
            raise RateLimitExceeded(
                f"Too many wrong API keys came from this address, and this one is wrong too; try "
                f"another in {math.ceil(wait_s)} s.",
                retry_after_s=wait_s,
            )
        raise InvalidApiKey("This API key is not valid: it is wrong, expired or revoked.")


class WrongKeys:
    """Counts each address's wrong keys in this process. What it forgets is only answered sooner."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[float, int]] = {}  # when a window began, and how many since
        self._lock = threading.Lock()  # so that a count and its check are one step

    def count(self, network: str) -> float | None:
        """Count one; seconds until there may be more, where it is one too many."""
        now = time.monotonic()
        with self._lock:
            began, count = self._counts.get(network, (now, 0))
            if now - began >= WINDOW_S:
                began, count = now, 0
            self._counts[network] = (began, count + 1)
            if len(self._counts) > MAX_ADDRESSES:
                del self._counts[next(iter(self._counts))]
        return WINDOW_S - (now - began) if count >= MAX_WRONG_KEYS else None


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


def _address(environ: Environ) -> str:
    address: str = environ.get("REMOTE_ADDR", "")
    return address


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
