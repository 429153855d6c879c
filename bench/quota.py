"""What quotas cost: a check in each store, the whole hook, and all that a call passes through.

``python -m bench.quota`` times a check (a call let in) on a real Valkey or Redis over a Unix socket
and on SQLite; then /crane/run with the echo task with quotas and without, in turns, one client; and
how many calls a second two HTTP workers answer 32 clients, with a key, on each store.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from backend.quota.decisions import Call, Store
from backend.quota.redis import RedisStore
from backend.quota.sqlite import SqliteStore
from backend.quota.tiers import UNIT, tiers
from bench.jobs import median
from bench.load import Result, measure
from bench.servers import ROOT, Server, crane
from tests.valkey import Valkey

ECHO = [{"model_id": "echo", "input": {"hello": "world"}}]
TIERS = "free 1000000000/minute concurrency=1000000, pro 1000000000/minute concurrency=1000000"
CHECKS = 3000


def check_ms(store: Store) -> tuple[float, float]:
    """The median and 99th percentile of a check, of 50 callers whose calls are all settled."""
    tier = tiers(TIERS)["free"]
    times = []
    for number in range(CHECKS):
        call = Call(f"caller {number % 50}", tier, str(number), UNIT, 60_000)
        started = time.perf_counter()
        store.spend(call)
        times.append((time.perf_counter() - started) * 1e3)
        store.settle(call, UNIT)
    cuts = statistics.quantiles(times, n=100)
    return cuts[49], cuts[98]


def in_turns(rounds: int, sides: list[Callable[[], Result]]) -> list[list[Result]]:
    return [[side() for side in sides] for _ in range(rounds)]


def load(server: Server, clients: int, seconds: float, key: str | None = None) -> Result:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return measure(
        server.port, "/crane/run", ECHO, clients=clients, seconds=seconds, headers=headers
    )


def make_key(data_dir: Path) -> str:
    command = [sys.executable, "-m", "flask", "--app", "wsgi", "crane", "keys", "create"]
    return subprocess.run(
        [*command, "--owner", "bench", "--tier", "pro"],
        cwd=ROOT,
        env={"CRANE_DATA_DIR": str(data_dir), "PATH": "/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        valkey = Valkey().start()
        stack.callback(valkey.remove)
        stores = {"redis": RedisStore(valkey.url), "sqlite": SqliteStore(folder / "check.db")}
        for name, store in stores.items():
            pairs = [check_ms(store) for _ in range(options.rounds)]
            p50, p99 = (statistics.median(side) for side in zip(*pairs, strict=True))
            print(f"a check on {name}: p50 {p50:.3f} ms, p99 {p99:.3f} ms")
            store.close()

        def start(**settings: object) -> Server:
            known = {"CRANE_DATA_DIR": folder, "CRANE_TIERS": TIERS, "CRANE_QUOTA": "on"}
            settings = known | settings
            return stack.enter_context(crane(CRANE_LOG_FORMAT="json", **settings))

        key = make_key(folder)
        sides = {
            "no quota": start(CRANE_QUOTA="off"),
            "sqlite": start(),
            "redis": start(CRANE_REDIS_URL=valkey.url),
        }
        rounds = in_turns(
            options.rounds,
            [lambda s=s: load(s, 1, options.seconds, key) for s in sides.values()],
        )
        print(f"/crane/run, echo, 1 client, median of {options.rounds} rounds:")
        for place, name in enumerate(sides):
            result = median([row[place] for row in rounds])
            added = statistics.median(row[place].p50_ms - row[0].p50_ms for row in rounds)
            print(f"  {name:9}{result}   adds {added:.3f} ms p50")

    for name in ("sqlite", "redis"):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            settings: dict[str, object] = {"CRANE_QUOTA": "on"}
            if name == "redis":
                valkey = Valkey().start()
                stack.callback(valkey.remove)
                settings["CRANE_REDIS_URL"] = valkey.url
            key = make_key(folder)
            settings |= {"CRANE_DATA_DIR": folder, "CRANE_TIERS": TIERS, "CRANE_AUTH": "required"}
            server = stack.enter_context(
                crane(CRANE_WORKERS=2, CRANE_LOG_FORMAT="json", **settings)
            )
            results = [load(server, 32, options.seconds, key) for _ in range(options.rounds)]
            print(f"two HTTP workers, 32 clients, a key, {name}: {median(results)}")


if __name__ == "__main__":
    main()
