"""What web pages may do where no key is needed: nothing, unless they are the operator's own.

A browser calls this host for any page that asks for it, with this host's address. A page cannot
send a key that it does not have, so calls with one need none of this.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache

from backend.config import Config, is_loopback
from backend.errors import Forbidden
from backend.locality import Environ

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:@/\\\[\]]+)(?::[0-9]*)?")
_SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
_SHOWN = 100  # characters of a header, in an error


class Browsers:
    """Checks the calls of callers without a key; raises ``Forbidden`` that names the setting."""

    def __init__(self, config: Config) -> None:
        self._hosts = {name.lower() for name in config.allowed_hosts}
        self._origins = {name.lower() for name in config.allowed_origins}
        self._any_address = config.auth == "off"  # which is meant for more than this host

    def check(self, environ: Environ) -> None:
        self._check_host(environ)
        if environ["REQUEST_METHOD"] not in _SAFE_METHODS:
            self._check_origin(environ)

    def _check_host(self, environ: Environ) -> None:
        """A page's own name may be made to lead here (DNS rebinding): then ``Host`` has that name.

        A call without ``Host`` is no browser's.
        """
        sent = environ.get("HTTP_HOST")
        if not sent or "*" in self._hosts:
            return
        name = host_name(sent)
        if is_own_name(name) or name in self._hosts or (self._any_address and _is_address(name)):
            return
        raise Forbidden(
            f"The service is not known as {sent[:_SHOWN]!r} here, and without an API key it "
            "answers only to names that it knows: those of CRANE_ALLOWED_HOSTS and localhost."
        )

    def _check_origin(self, environ: Environ) -> None:
        """Pages may send some calls anywhere without asking first; browsers say whose they are."""
        if "*" in self._origins:
            return
        origin = environ.get("HTTP_ORIGIN")
        if origin is None:
            if environ.get("HTTP_SEC_FETCH_SITE") not in ("cross-site", "same-site"):
                return
            origin = "another site"
        elif origin.lower() in self._origins or _is_same(origin, environ.get("HTTP_HOST", "")):
            return
        raise Forbidden(
            f"A web page of {origin[:_SHOWN]} may not do this without an API key. If it is to, "
            "CRANE_ALLOWED_ORIGINS must name its origin."
        )


@lru_cache(1024)
def host_name(host: str) -> str:
    """The name in a ``Host`` header, without a port and in lower case; empty where it has none."""
    match = _HOST.fullmatch(host.strip().lower())
    return match[1].strip("[]").removesuffix(".") if match else ""


@lru_cache(1024)
def is_own_name(name: str) -> bool:
    """Whether a name leads to this host wherever it is looked up (RFC 6761), or is its address."""
    return name == "localhost" or name.endswith(".localhost") or is_loopback(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_same(origin: str, host: str) -> bool:
    """Whether a page came from where its call goes, with TLS or without: it may end before us."""
    scheme, _, place = origin.lower().partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)
    if port is None or not host:
        return False
    return place.removesuffix(port) == host.lower().removesuffix(port)
