"""Fetches a URL that a caller named: from public hosts the operator allows, and no others.

Whoever writes the URL may own its name, its name server and its web server, and may want to reach
what only this machine can. So each redirect is checked as if it were the first URL, a name is
resolved once and the connection goes to the address that was checked, and a clock of ours ends it.
"""

from __future__ import annotations

import io
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPException, HTTPResponse, HTTPSConnection
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from backend.media import Refused

MAX_URL = 2048
MAX_REDIRECTS = 3
MAX_ADDRESSES = 2
PIECE = 65536  # bytes
MAX_RESOLVERS = 16  # names that this process looks up at once
HEADERS = {"User-Agent": "crane", "Accept-Encoding": "identity", "Connection": "close"}

_LABEL = "[a-z0-9_-]{1,63}"
_NAME = rf"{_LABEL}(?:\.{_LABEL})*"
_PLACE = re.compile(rf"(\*|(?:\*\.)?{_NAME}|\[[0-9a-f:.]+\])\.?(?::([0-9]{{1,5}}))?")

_ROUTED = IPv6Network("2000::/3")  # mapped, compatible, site and link addresses are outside it
_NAT64 = IPv6Network("64:ff9b::/96")  # an IPv4 address as an IPv6-only network's DNS gives it
_NEVER = [
    ip_network(network)
    for network in (
        "168.63.129.16/32",  # looks public; inside Azure it is the machine's own host
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata is at 192.0.0.192
        "192.88.99.0/24",  # relays of 6to4
        "2001::/23",  # protocol assignments, Teredo among them
        "2002::/16",  # 6to4, which carries an IPv4 address
        "3fff::/20",  # documentation, younger than Python 3.11's own list
    )
]


_RESOLVERS = threading.BoundedSemaphore(MAX_RESOLVERS)


class _Target(NamedTuple):
    url: str
    host: str
    port: int
    path: str


def media_hosts(text: str) -> tuple[str, ...]:
    """Hosts of ``images.example.com, *.example.com, *``, each with ``:port`` where it is not 443.

    ``*.example.com`` is any name below ``example.com``, ``*`` is any public host.
    """
    hosts = []
    for name in (name.strip() for name in text.split(",") if name.strip()):
        try:
            hosts.append(_spell(*_place(name)))
        except ValueError:
            raise ValueError(
                f"{name!r} is not a host such as images.example.com or *.example.com"
            ) from None
    return tuple(hosts)


def fetch(
    url: str, *, hosts: tuple[str, ...], max_bytes: int, deadline: float
) -> tuple[bytes, str | None]:
    """Return what is at ``url`` and its media type, without parameters; None where it has none.

    ``hosts`` is of ``media_hosts``, ``deadline`` on ``time.monotonic()``'s clock. No more than
    ``max_bytes`` are kept, whatever the server says. Raises ``Refused``.
    """
    if not hosts:
        raise Refused(
            "is a URL, and none is fetched here because no host is allowed (CRANE_MEDIA_HOSTS); "
            "send it as base64, as a data: URL or as a multipart file"
        )
    base = ""
    for hop in range(MAX_REDIRECTS + 1):
        try:
            target = _target(url, base, hosts)
            with _answer(target, deadline) as response:
                location = response.headers.get("Location")
                if response.status not in (301, 302, 303, 307, 308) or location is None:
                    return _body(response, max_bytes, deadline), _media_type(response)
                url, base = location, target.url
        except Refused as fault:
            if hop == 0:
                raise
            message = f"redirects to an address that {fault}"
            raise Refused(message, too_large=fault.too_large) from None
    raise Refused(f"redirects more than {MAX_REDIRECTS} times")


def _place(text: str) -> tuple[str, int]:
    """The host, spelled as it is compared, and the port; raise ``ValueError`` for anything else."""
    match = _PLACE.fullmatch(text.lower())
    if not match or len(match[1]) > 253:
        raise ValueError
    host, port = match[1], int(match[2] or 443)
    if host.startswith("["):
        host = f"[{IPv6Address(host[1:-1])}]"
    if not 0 < port < 65536:
        raise ValueError
    return host, port


def _spell(host: str, port: int) -> str:
    return host if port == 443 else f"{host}:{port}"


def _target(url: str, base: str, hosts: tuple[str, ...]) -> _Target:
    """Where ``url`` leads from ``base``; raise ``Refused`` if a rule is against it."""
    # Before any parsing: urlsplit drops tabs and newlines, and takes white space off the ends.
    if not url.isascii():
        raise Refused("has characters outside ASCII; write them percent-encoded, a host as xn--…")
    if re.search(r"[\x00-\x20\x7f\\]", url):
        raise Refused("has white space, a control character or a backslash in its URL")
    try:
        url = urljoin(base, url)
        parts = urlsplit(url)
    except ValueError:
        raise Refused("is not a URL that can be read") from None
    if len(url) > MAX_URL:
        raise Refused(f"has a URL of {len(url)} characters; at most {MAX_URL} are allowed")
    if parts.scheme != "https":
        got = f", not {parts.scheme[:20]}" if parts.scheme else ""
        raise Refused(f"must be an https URL{got}")
    if "@" in parts.netloc:
        raise Refused("must not have a user name or a password in its URL")
    try:
        host, port = _place(parts.netloc)
    except ValueError:
        host, port = "*", 0
    if "*" in host:
        raise Refused("must have a host, and if need be a port, in its URL")
    labels = host.split(".")
    above = [f"*.{'.'.join(labels[place:])}" for place in range(1, len(labels))]
    if not any(_spell(name, port) in hosts for name in (host, "*", *above)):
        shown = _spell(host[:100], port)
        raise Refused(f"names {shown}, from which nothing is fetched here (CRANE_MEDIA_HOSTS)")
    path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
    return _Target(url, host.strip("[]"), port, path)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise Refused("took too long")
    return left


def _is_public(text: str) -> bool:
    address = ip_address(text)
    if address in _NAT64:
        address = IPv4Address(int(address) & 0xFFFFFFFF)
    if address.version == 6 and address not in _ROUTED:
        return False
    if address.is_multicast or any(address in network for network in _NEVER):
        return False
    return address.is_global


def _addresses(target: _Target, deadline: float) -> list[str]:
    """What the host's name leads to; raise ``Refused`` if any of it is not public."""
    answers: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
            answers.put([str(where[0]) for *_, where in found])
        except (OSError, UnicodeError):
            answers.put([])
        finally:
            _RESOLVERS.release()

    # A thread of its own, because getaddrinfo cannot be told how long it may take; and not any
    # number of them, for one may stay long after nobody waits for it.
    if not _RESOLVERS.acquire(timeout=_left(deadline)):
        raise Refused("took too long")
    threading.Thread(target=ask, name="media resolver", daemon=True).start()
    try:
        found = answers.get(timeout=_left(deadline))
    except queue.Empty:
        raise Refused("took too long") from None
    # A name that does not exist is answered alike, so that nobody can list our private names.
    if not found or not all(map(_is_public, found)):
        raise Refused("does not lead to a public address")
    return list(dict.fromkeys(found))[:MAX_ADDRESSES]


@contextmanager
def _cut(sock: socket.socket, deadline: float) -> Iterator[None]:
    """Shut the connection at the deadline, which no timeout of a single read can promise."""
    brake = sock.dup()  # stays ours while the other is wrapped, read and closed

    def pull() -> None:
        with suppress(OSError):  # the other side has gone already
            brake.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0, deadline - time.monotonic()), pull)
    timer.name, timer.daemon = "media deadline", True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        brake.close()


def _reach(addresses: list[str], port: int, deadline: float) -> socket.socket:
    for to_come, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
        share = _left(deadline) / to_come  # a silent address leaves time for the next
        with suppress(OSError):
            return socket.create_connection((address, port), share)
    raise ConnectionError


@contextmanager
def _answer(target: _Target, deadline: float) -> Iterator[HTTPResponse]:
    """Open the answer to a GET; whatever goes wrong until it is closed becomes ``Refused``."""
    addresses = _addresses(target, deadline)
    trust = ssl.create_default_context()
    connection = HTTPSConnection(target.host, target.port, context=trust)
    connection.auto_open = 0  # it is given its socket, and would look the name up for another
    try:
        with (
            closing(connection),
            _reach(addresses, target.port, deadline) as sock,
            _cut(sock, deadline),
        ):
            sock.settimeout(_left(deadline))
            connection.sock = trust.wrap_socket(
                sock, server_hostname=target.host, do_handshake_on_connect=False
            )
            connection.sock.do_handshake()
            connection.request("GET", target.path, headers=HEADERS)
            with connection.getresponse() as response:
                yield response
    except ssl.SSLCertVerificationError:
        raise Refused("has a certificate that does not hold") from None
    except (OSError, HTTPException):
        _left(deadline)  # a connection that was cut looks like one that broke
        raise Refused("could not be reached, or broke off") from None


def _body(response: HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    if response.status != 200:
        raise Refused(f"answered {response.status}")
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    transfer = response.headers.get("Transfer-Encoding", "chunked").lower()
    if (encoding, transfer) != ("identity", "chunked"):
        raise Refused("came compressed, which was not asked for")
    too_large = Refused(f"has more than {max_bytes} bytes", too_large=True)
    if (response.length or 0) > max_bytes:
        raise too_large
    body = io.BytesIO()
    # read1, not read: a chunk of "-1" bytes makes read take all that comes, and it keeps a list
    # of the chunks, which for tiny ones weighs many times what they hold.
    while piece := response.read1(min(PIECE, max_bytes + 1 - body.tell())):
        body.write(piece)
        if body.tell() > max_bytes:
            raise too_large
    _left(deadline)  # where there is no length, a connection that was cut looks like an end
    if response.length:
        raise Refused("broke off before its end")
    return body.getvalue()


def _media_type(response: HTTPResponse) -> str | None:
    text = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    return text if re.fullmatch(r"[a-z0-9.+_-]{1,127}/[a-z0-9.+_-]{1,127}", text) else None
