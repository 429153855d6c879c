"""The settings: read once from the environment, checked whole, frozen."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from backend.cores import allowed
from backend.errors import did_you_mean
from backend.media import MAX_KEPT_RATE
from backend.media.fetch import media_hosts
from backend.quota.tiers import DEFAULT_TIERS, Tier, tiers

_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_MAX_SECRET = 65536
_DURATIONS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


PEPPER_LENGTH = 16  # characters, at least
MAX_ENGINES = 64
CALLS_OF_MAX_PIXELS = 8  # how many of the largest calls an HTTP worker holds at once
MAX_DURATION_S = 24 * 3600.0  # no call waits a day, and a poll's milliseconds have 31 bits


def size(text: str) -> int:
    """Bytes of ``33554432``, ``32MiB`` or ``450MB``."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]+)?)\s*([A-Za-z]*)", text)
    number = float(match[1]) * _SIZES.get(match[2].upper(), 0) if match else 0
    if number < 1:
        raise ValueError("must be a size of a byte or more, such as 33554432 or 32MiB")
    return int(number)


def seconds_of(text: str) -> float | None:
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]+)?)\s*(ms|s|m|h|)", text)
    return float(match[1]) * _DURATIONS[match[2]] if match else None


def duration(text: str) -> float:
    """Seconds of ``120``, ``1.5s``, ``500ms``, ``15m`` or ``1h``."""
    seconds = seconds_of(text)
    if seconds is None or not 0 < seconds <= MAX_DURATION_S:
        raise ValueError("must be a duration above 0 and up to 24h, such as 120, 90s, 500ms or 15m")
    return seconds


def forever_or(parse: Callable[[str], float]) -> Callable[[str], float]:
    def parse_or(text: str) -> float:
        return math.inf if text == "never" else parse(text)

    return parse_or


def whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return parse


def path(text: str) -> Path:
    """A path, absolute or from where the service is started; ``~`` is the home folder."""
    if not text:
        raise ValueError("must be a path, not empty")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("must be a path; there is no such home folder") from None


def address(text: str) -> str:
    """``host:port`` or ``[v6]:port``; port 0 takes a free one."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", text)
    if not match or int(match[2]) > 65535:
        raise ValueError("must be host:port, such as 127.0.0.1:8000")
    return text


def devices(text: str) -> tuple[str, ...]:
    """``auto`` alone, or the device of each engine: ``cpu``, ``cuda:1``, ``cuda:0+cuda:1``."""
    names = tuple(
        re.sub(r"\bcuda(?!:)", "cuda:0", "".join(name.split())) for name in text.split(",")
    )
    for name in names:
        if not re.fullmatch(r"auto|cpu|mps|cuda:[0-9]{1,3}(\+cuda:[0-9]{1,3})*", name):
            raise ValueError(
                "must be auto, or a device for each engine, such as cpu, mps, cuda:0,cuda:1 or, "
                "for one engine with two GPUs, cuda:0+cuda:1"
            )
        if len(set(name.split("+"))) != len(name.split("+")):
            raise ValueError(f"names a GPU twice for one engine, {name}")
    if "auto" in names and len(names) > 1:
        raise ValueError("must be auto alone, or a device for each engine")
    if len(names) > MAX_ENGINES:
        raise ValueError(f"must name at most {MAX_ENGINES} engines")
    return names


def origins(text: str) -> tuple[str, ...]:
    """``*`` alone, or a comma-separated list of origins such as ``https://app.example.com``."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\-]+(:[0-9]{1,5})?", name):
            raise ValueError(f"{name!r} is not an origin such as https://app.example.com")
    if "*" in names and len(names) > 1:
        raise ValueError("must be '*' alone or a list of origins")
    return names


def host_names(text: str) -> tuple[str, ...]:
    """``*`` alone, or a comma-separated list of names such as ``crane.example.com``, no ports."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if not re.fullmatch(r"\*|[A-Za-z0-9_.-]+|[0-9A-Fa-f:.]+", name):
            raise ValueError(f"{name!r} is not a name such as crane.example.com, without a port")
    if "*" in names and len(names) > 1:
        raise ValueError("must be '*' alone or a list of names")
    return names


def database_url(text: str) -> str:
    """A URL of PostgreSQL. Strict, so that no part of a password can pass for a host."""
    user = r"(?:[^\s@/?#:]*(?::[^\s@/?#:]*)?@)?"
    hosts = r"[A-Za-z0-9._,:%\[\]-]*"
    url = rf"postgres(?:ql)?(?:\+psycopg)?://{user}{hosts}(?:/[^\s@/?#]*)?(?:\?[^\s#]*)?"
    if not re.fullmatch(url, text):
        raise ValueError(
            "must be postgresql://user:password@host:5432/name, "
            "where marks in a name or password are percent-encoded"
        )
    return text


def pepper(text: str) -> str:
    if len(text) < PEPPER_LENGTH:
        raise ValueError(f"must have at least {PEPPER_LENGTH} characters")
    return text


def redis_url(text: str) -> str:
    user = r"(?:[^\s@/?#]*@)?"
    options = r"(?:\?[^\s#]*)?"
    network = (
        rf"rediss?://{user}(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{{1,5}})?(?:/[0-9]*)?"
    )
    if not re.fullmatch(rf"(?:{network}|unix://{user}/[^\s?#]+){options}", text):
        raise ValueError(
            "must be redis://:password@host:6379/0, rediss://… or unix:///path/to/socket, "
            "where marks in a name or password are percent-encoded"
        )
    return text


@lru_cache(4096)
def is_loopback(address: str) -> bool:
    """Whether an address is this very host's; no name is."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def cores() -> int:
    """The cores this process may use, which ``taskset`` or a container may have made fewer."""
    return len(allowed()) or os.cpu_count() or 1


def _default_workers() -> int:
    return 1 if cores() <= 4 else 2


def _setting(name: str, parse: Callable[[str], Any], default: Any, *, secret: bool = False) -> Any:
    """A field that is read from ``CRANE_name``; a secret also from a file, and shown nowhere."""
    metadata = {"name": f"CRANE_{name}", "parse": parse, "secret": secret}
    if callable(default):
        return field(default_factory=default, metadata=metadata, repr=not secret)
    return field(default=default, metadata=metadata, repr=not secret)


def _from_file(path: str) -> str:
    """The secret that a file holds; raise ``ValueError`` without a word of what is in it."""
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_SECRET).decode().strip()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except ValueError:  # a NUL in the path, or what is no text in the file
        raise ValueError("is not a file with text in it") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What an operator may set. Times are in seconds, sizes in bytes."""

    models: Path = _setting("MODELS", path, Path("models.yaml"))
    bind: str = _setting("BIND", address, "127.0.0.1:8000")
    workers: int = _setting("WORKERS", whole(1, 128), _default_workers)
    threads: int = _setting("THREADS", whole(1, 1024), 128)
    engine: str = _setting("ENGINE", one_of("process", "inline"), "inline")
    engine_socket: Path | None = _setting("ENGINE_SOCKET", path, None)
    devices: tuple[str, ...] = _setting("DEVICES", devices, ("auto",))
    dtype: str = _setting("DTYPE", one_of("auto", "float32", "float16", "bfloat16"), "auto")
    request_timeout_s: float = _setting("REQUEST_TIMEOUT", duration, 120.0)
    load_wait_s: float = _setting("LOAD_WAIT", duration, 60.0)
    load_timeout_s: float = _setting("LOAD_TIMEOUT", duration, 3600.0)
    hang_timeout_s: float = _setting("HANG_TIMEOUT", duration, 60.0)
    idle_timeout_s: float = _setting("IDLE_TIMEOUT", forever_or(duration), 900.0)
    memory_budget: int | None = _setting("MEMORY_BUDGET", size, None)
    queue_size: int = _setting("QUEUE_SIZE", whole(1, 100_000), 1024)
    head_timeout_s: float = _setting("HEAD_TIMEOUT", duration, 10.0)
    client_timeout_s: float = _setting("CLIENT_TIMEOUT", duration, 30.0)
    min_rate: int = _setting("MIN_RATE", size, 16 * 2**10)
    max_connections: int = _setting("MAX_CONNECTIONS", whole(1, 100_000), 256)
    max_unsent: int = _setting("MAX_UNSENT", size, 256 * 2**20)
    max_body: int = _setting("MAX_BODY", size, 32 * 2**20)
    max_bodies: int = _setting("MAX_BODIES", size, 512 * 2**20)
    max_output: int = _setting("MAX_OUTPUT", size, 128 * 2**20)
    max_batch: int = _setting("MAX_BATCH", whole(1, 100_000), 256)
    max_text: int = _setting("MAX_TEXT", whole(1, 100_000_000), 1_000_000)
    data_dir: Path = _setting("DATA_DIR", path, Path(".crane"))
    max_pixels: int = _setting("MAX_PIXELS", whole(1, 500_000_000), 2**25)
    max_audio_s: float = _setting("MAX_AUDIO", duration, 1800.0)
    media_hosts: tuple[str, ...] = _setting("MEDIA_HOSTS", media_hosts, ())
    database_url: str | None = _setting("DATABASE_URL", database_url, None, secret=True)
    key_pepper: str | None = _setting("KEY_PEPPER", pepper, None, secret=True)
    auth: str = _setting("AUTH", one_of("auto", "required", "off"), "auto")
    quota: str = _setting("QUOTA", one_of("on", "off"), "on")
    tiers: dict[str, Tier] = _setting("TIERS", tiers, lambda: tiers(DEFAULT_TIERS))
    quota_on_outage: str = _setting("QUOTA_ON_OUTAGE", one_of("local", "allow", "deny"), "local")
    redis_url: str | None = _setting("REDIS_URL", redis_url, None, secret=True)
    trusted_proxies: int = _setting("TRUSTED_PROXIES", whole(0, 10), 0)
    allowed_origins: tuple[str, ...] = _setting("ALLOWED_ORIGINS", origins, ())
    allowed_hosts: tuple[str, ...] = _setting("ALLOWED_HOSTS", host_names, ())
    log_level: str = _setting("LOG_LEVEL", one_of("DEBUG", "INFO", "WARNING", "ERROR"), "INFO")
    log_format: str = _setting("LOG_FORMAT", one_of("auto", "json", "console"), "auto")

    def __post_init__(self) -> None:
        faults = []
        if self.engine == "process" and self.engine_socket is None:
            faults.append(
                "CRANE_ENGINE=process needs CRANE_ENGINE_SOCKET, which gunicorn.conf.py sets; "
                "without gunicorn.conf.py use CRANE_ENGINE=inline"
            )
        if self.engine == "inline" and len(self.devices) > 1:
            faults.append(
                f"CRANE_ENGINE=inline is one engine in each HTTP process, and CRANE_DEVICES names "
                f"{len(self.devices)}"
            )
        if self.max_batch > self.queue_size:
            faults.append(
                f"CRANE_MAX_BATCH ({self.max_batch}) must not be above "
                f"CRANE_QUEUE_SIZE ({self.queue_size})"
            )
        if faults:
            raise ValueError("\n".join(faults))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Config:
        """Read the ``CRANE_…`` settings; raise ``ValueError`` that lists every fault at once."""
        known = {f.metadata["name"]: f for f in fields(cls)}
        files = {f"{name}_FILE": name for name, f in known.items() if f.metadata["secret"]}
        values: dict[str, Any] = {}
        faults: list[str] = []
        for name in sorted(environ):
            if not name.startswith("CRANE_"):
                continue
            setting = known.get(files.get(name, name))
            if setting is None:
                hint = did_you_mean(name, [*known, *files])
                faults.append(f"{name} is not a Crane setting ({hint})")
                continue
            if name in files and files[name] in environ:
                faults.append(f"{name} and {files[name]} are both set; one must go")
                continue
            shown = name if setting.metadata["secret"] else f"{name}={environ[name]!r}"
            try:
                text = environ[name].strip()
                if name in files:
                    shown = f"{name}={text!r}"  # the path, which is no secret
                    text = _from_file(text)
                values[setting.name] = setting.metadata["parse"](text)
            except ValueError as error:
                faults.append(f"{shown} {error}")
        if not faults:
            try:
                return cls(**values)
            except ValueError as error:
                faults += str(error).split("\n")
        raise ValueError("Crane's settings are wrong:\n" + "\n".join(f"  {f}" for f in faults))

    @property
    def max_media_bytes(self) -> int:
        """Decoded media that an HTTP worker holds: a call may have as much by itself.

        A pixel has 3 bytes, a sample 4.
        """
        pixels = CALLS_OF_MAX_PIXELS * 3 * self.max_pixels
        return max(pixels, int(4 * MAX_KEPT_RATE * self.max_audio_s))

    @property
    def max_message(self) -> int:
        """Bytes of one message between an HTTP worker and an engine, either way.

        It is above what any call has that the other settings allow: of a body's bytes msgpack
        makes at most three times as many, for ``1e1,`` takes nine. An answer has no more than its
        outputs as JSON.
        """
        return max(self.max_media_bytes + 4 * self.max_body, self.max_output) + 2**26

    @property
    def engine_file(self) -> Path:
        """Where the running service says which its engine's socket is."""
        return self.data_dir / "engine"

    @property
    def engine_sockets(self) -> list[Path]:
        """Each engine's socket; ``gunicorn.conf.py`` chooses where."""
        path = self.engine_socket
        assert path is not None
        return [path.with_name(f"{path.name}{index}") for index in range(len(self.devices))]

    @property
    def engine_threads(self) -> tuple[int, int]:
        """CPU threads for a model: all cores, and the cores less one for each HTTP worker.

        Several engines share the cores.
        """
        engines = len(self.devices)
        return max(1, cores() // engines), max(1, (cores() - self.workers) // engines)
