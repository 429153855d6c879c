"""What /metrics tells, in Prometheus's format, of all HTTP workers and the engine together.

``gunicorn.conf.py`` names the folder that they share in ``PROMETHEUS_MULTIPROC_DIR``. Labels are
names of ours only: routes, tiers, codes, models; never what a caller sent.
"""

from __future__ import annotations

import os

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    generate_latest,
    multiprocess,
)

REQUESTS = Counter("crane_requests", "Requests answered.", ["route", "status"])
QUOTA_REFUSALS = Counter(
    "crane_quota_refusals",
    "Calls refused by their caller's rate, budget or concurrency.",
    ["tier", "limit"],
)
QUOTA_LOCAL = Counter(
    "crane_quota_away_decisions",
    "Decisions made while Redis did not answer, by policy.",
    ["policy"],
)
QUOTA_STORE_AWAY = Gauge(
    "crane_quota_store_away",
    "1 while an HTTP worker cannot keep quotas in Redis, or in the file.",
    multiprocess_mode="livemax",
)
CANCELLED = Counter(
    "crane_cancelled",
    "Inputs that nobody waited for any more, by where they were stopped: queued or running.",
    ["model", "where"],
)
CONNECTIONS_DROPPED = Counter(
    "crane_connections_dropped",
    "Connections closed on their clients: head, body or unsent (too slow), or crowded (too many).",
    ["reason"],
)
DEFUNCT = Counter(
    "crane_defunct",
    "Models for which an engine had to be replaced, by cause: hangs or device.",
    ["model", "cause"],
)
CONTENT_TYPE = CONTENT_TYPE_LATEST


def dump() -> bytes:
    """All metrics, of this process, or of all that share a folder."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest()
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
