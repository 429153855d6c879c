"""Where a call comes from: from this very host, or from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.config import is_loopback

# What proxies, tunnels and CDNs write into the calls that they pass on, as WSGI names it; beside
# ``X-Forwarded…``, which has too many endings for a list. The last is gunicorn's, for a connection
# that began with a line of the PROXY protocol.
FORWARDING = frozenset(
    f"HTTP_{name.upper().replace('-', '_')}"
    for name in (
        "Forwarded",
        "Via",
        "X-Real-IP",
        "X-Client-IP",
        "X-Cluster-Client-IP",
        "X-Original-Forwarded-For",
        "X-Original-Host",
        "X-Originating-IP",
        "X-Remote-IP",
        "X-Remote-Addr",
        "X-ProxyUser-IP",
        "X-Envoy-External-Address",
        "X-Azure-ClientIP",
        "Client-IP",
        "Forwarded-For",
        "True-Client-IP",
        "Fastly-Client-IP",
        "CF-Connecting-IP",
        "CF-Connecting-IPv6",
        "CDN-Loop",
    )
) | {"PROXY_PROTOCOL"}
_X_FORWARDED = "HTTP_X_FORWARDED"

Environ = Mapping[str, Any]


def is_local(environ: Environ) -> bool:
    """Whether a call was made on this host, and passed on by nobody.

    Both ends of its connection are loopback addresses, so is the address that its server listens
    at, and no header says that a proxy is between. This needs no look at settings, which a command
    line may have overruled. Where a server does not show its sockets, its ``SERVER_NAME`` must be
    a loopback address, which is so with none that listens elsewhere.
    """
    return is_from_loopback(environ) and forwarding_header(environ) is None


def is_from_loopback(environ: Environ) -> bool:
    """Whether a call came over this host's loopback, be it from a proxy on this host."""
    name = environ.get("SERVER_NAME", "")
    if not (name == "localhost" or is_loopback(name)):
        return False
    if not is_loopback(environ.get("REMOTE_ADDR", "")):
        return False
    connection = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
    if connection is None:
        return True
    try:
        ends = getattr(connection, "ends", None)  # our own server's, which looks once
        ends = ends or (connection.getsockname(), connection.getpeername())
    except OSError:  # the caller is gone
        return False
    # The name of a Unix socket is text: whoever may be behind it, that is no address.
    return all(type(end) is tuple and is_loopback(end[0]) for end in ends)


def forwarding_header(environ: Environ) -> str | None:
    """The name of a header by which a proxy says that it passed the call on."""
    # One look at all names together takes a third of the time, and each call has its share of it.
    if FORWARDING.isdisjoint(environ) and _X_FORWARDED not in " ".join(environ):
        return None
    for name in environ:
        if name in FORWARDING or name.startswith(_X_FORWARDED):
            return name.removeprefix("HTTP_").replace("_", "-").title()
    return None
