"""A real gunicorn with Crane in it, as an operator runs it, and a plain client for it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from backend.config import Config
from backend.keys import FIRST_KEY_FILE, Keys

ROOT = Path(__file__).resolve().parent.parent


class Gunicorn:
    """``gunicorn wsgi:app`` on a free port of 127.0.0.1, in a process group of its own."""

    def __init__(
        self,
        models: Path,
        data_dir: Path,
        settings: dict[str, object],
        *,
        arguments: Sequence[str] = (),
        **how: Any,  # to start the process
    ) -> None:
        self.models, self.data_dir = models, settings.get("CRANE_DATA_DIR", data_dir)
        self.output = data_dir.with_suffix(".log")
        env = {name: value for name, value in os.environ.items() if not name.startswith("CRANE_")}
        env |= {
            "CRANE_MODELS": str(models),
            "CRANE_DATA_DIR": str(data_dir),
            "CRANE_BIND": "127.0.0.1:0",
            "CRANE_DTYPE": "float32",
            "CRANE_LOG_FORMAT": "json",
            "CRANE_QUOTA": "off",
            "PYTHONUNBUFFERED": "1",
        }
        env |= {name: str(value) for name, value in settings.items()}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "wsgi:app", *arguments],
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **how,
            )
        self.port = 0
        self._admin_key: str | None = None
        self._seen: dict[int, psutil.Process] = {}

    def wait_until_ready(self, timeout_s: float = 30) -> Gunicorn:
        """Return once /readyz says so."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log()
            if match := re.search(r"listens at http://[\d.]+:(\d+)", self.log()):
                self.port = int(match[1])
                if self.get("/readyz")[0] == 200:
                    self.processes()
                    return self
            time.sleep(0.05)
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.log()}")

    def log(self) -> str:
        return self.output.read_text(errors="replace")

    def log_lines(self, **fields) -> list[dict]:
        """The JSON log lines that have all of ``fields``."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if fields.items() <= line.items()]

    def processes(self, name: str = "") -> list[psutil.Process]:
        """The living processes of this server whose command line has ``name`` in it."""
        if self.process.poll() is None:
            master = psutil.Process(self.process.pid)
            for process in [master, *master.children(recursive=True)]:
                self._seen.setdefault(process.pid, process)
        return [process for process in self._seen.values() if name in _command(process)]

    def engine(self) -> psutil.Process:
        return self.processes("backend.engine.server")[-1]

    def http_workers(self) -> list[psutil.Process]:
        return [p for p in self.processes("gunicorn") if p.pid != self.process.pid]

    def get(self, path: str, **headers: str) -> tuple[int, dict]:
        status, _, body = self.request("GET", path, None, headers)
        return status, json.loads(body)

    def post(self, body: object, timeout_s: float = 60, **headers: str) -> tuple[int, dict]:
        """POST /crane/run; return the status and the JSON of the answer."""
        headers = {"Content-Type": "application/json", **headers}
        data = json.dumps(body).encode()
        status, _, answer = self.request("POST", "/crane/run", data, headers, timeout_s)
        return status, json.loads(answer)

    def run(self, model_id="echo", input="hello", timeout_s=60, **body) -> tuple[int, dict]:
        return self.post({"model_id": model_id, "input": input, **body}, timeout_s)

    def request(self, method, path, data=None, headers=None, timeout_s=60):
        """One request on a connection of its own: ``(status, headers, body)``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def under_way(self, model_id: str) -> int:
        """How many inputs of a model are running or queued."""
        model = self.get(f"/crane/models/{model_id}")[1]
        return model["queue"] + (model["running"] or {"inputs": 0})["inputs"]

    def stream(self, model_id="echo", input="hello", timeout_s=60, **body) -> Stream:
        """POST /crane/run for a stream of events."""
        body = {"model_id": model_id, "input": input, "stream": True, **body}
        return Stream(self.port, json.dumps(body).encode(), timeout_s)

    def first_key(self) -> str:
        """The key that the first start which needs keys has put into a file."""
        return (Path(str(self.data_dir)) / FIRST_KEY_FILE).read_text().strip()

    def order(self, model_id: str, what: str) -> int:
        """Load or unload a model as an admin does; return the status."""
        if self._admin_key is None:
            with closing(Keys(Config(data_dir=Path(str(self.data_dir))))) as keys:
                self._admin_key = keys.create(owner="admin", tier="pro", admin=True)[1]
        headers = {"Authorization": f"Bearer {self._admin_key}"}
        path = f"/crane/models/{model_id}/{what}"
        return self.request("POST", path, headers=headers)[0]

    def stop(self, timeout_s: float = 30) -> None:
        """End it as a service manager does, and check that nothing is left."""
        self.processes()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"did not stop in {timeout_s} s:\n{self.log()}") from None
        left = wait_for_end(self._seen.values(), timeout_s=20)
        for process in left:
            process.kill()
        assert not left, f"left behind: {left}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Stream:
    """An answer's server-sent events as they come: ``(name, data)``, and ``(":", comment)``."""

    def __init__(self, port: int, body: bytes, timeout_s: float = 60, **headers: str) -> None:
        headers = {"Content-Type": "application/json", **headers}
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
        self._connection.request("POST", "/crane/run", body, headers)
        self._response = self._connection.getresponse()
        self.status, self.headers = self._response.status, self._response.headers

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        lines: list[str] = []
        while line := self._response.readline():
            text = line.decode().rstrip("\n")
            if text:
                lines.append(text)
            elif lines[0].startswith(":"):
                yield ":", lines.pop(0)[1:].strip()
            else:
                name, data = (part.partition(": ")[2] for part in lines)
                lines.clear()
                yield name, json.loads(data)
        self.leave()

    def until(self, name: str) -> Any:
        """The data of the next event of that name."""
        return next(data for event, data in self if event == name)

    def json(self) -> Any:
        """The answer where it is no stream."""
        answer = json.loads(self._response.read())
        self.leave()
        return answer

    def leave(self) -> None:
        self._response.close()
        self._connection.close()

    __del__ = leave


def wait_for(
    condition: Callable[[], Any], timeout_s: float = 30.0, *, every_s: float = 0.005
) -> Any:
    """Return what a condition gives once that is true of anything."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(every_s)
    return found


def wait_for_end(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Return the processes that still run after so long, or none as soon as all have ended.

    One that has ended may stay in the list of processes for seconds, where its parent is init.
    """
    deadline = time.monotonic() + timeout_s
    while left := [process for process in processes if _runs(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) if process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.NoSuchProcess:
        return ""
