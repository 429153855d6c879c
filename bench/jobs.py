"""Loads that run in processes of their own, each a module that reads its job from its input."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import astuple
from typing import Any, TypeVar

Result = TypeVar("Result")


def run(module: str, job: dict, *, timeout_s: float) -> dict[str, Any]:
    """Have a module do a job; what it printed, which is JSON. Raises when it failed."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def median(results: list[Result]) -> Result:
    """The median of each figure over several runs."""
    figures = zip(*map(astuple, results), strict=True)
    return type(results[0])(*map(statistics.median, figures))


def request(path: str, body: dict, headers: dict[str, str]) -> str:
    """An HTTP request as it is sent."""
    data = json.dumps(body)
    more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}{more}Content-Length: {len(data.encode())}\r\n\r\n{data}"
