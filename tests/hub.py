"""A server that speaks as much of the Hub's API as loading a checkpoint takes."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin")


class Hub:
    """Serves a folder as a repository of any name; ``url`` is for HF_ENDPOINT.

    One of a name that the folder has as a folder is that. Weights are sent to their ``hold_at``-th
    byte, and on when ``go_on`` is set; so is everything if it is ``silent``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hold_at: int | None = None
        self.silent = False
        self.go_on = threading.Event()
        self.asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            do_HEAD = do_GET = lambda handler: self._answer(handler)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()  # which may be done twice

    def environment(self, cache: Path) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        self.asked.append(f"{handler.command} {path}")
        if self.silent:
            self.go_on.wait(60)
        name = path.removeprefix("/api/models").split("/")[2]
        folder = self.folder / name if (self.folder / name).is_dir() else self.folder
        if path.startswith("/api/models/") and "/tree/" in path:
            entries = [self._entry(folder, file) for file in _files(folder)]
            self._send(handler, json.dumps(entries).encode())
        elif path.startswith("/api/models/"):
            info = {
                "id": "of/model",
                "sha": COMMIT,
                "siblings": [
                    {**self._entry(folder, file), "rfilename": str(file.relative_to(folder))}
                    for file in _files(folder)
                ],
            }
            self._send(handler, json.dumps(info).encode())
        elif "/resolve/" in path:
            name = path.partition("/resolve/")[2].partition("/")[2]
            self._send_file(handler, folder, name)
        else:
            handler.send_error(404)

    def _entry(self, folder: Path, file: Path) -> dict:
        size, blob = file.stat().st_size, _digest(file)
        entry = {"type": "file", "path": str(file.relative_to(folder)), "size": size}
        if file.name.endswith(LARGE):
            lfs = {"oid": blob, "sha256": blob, "size": size, "pointerSize": 130}
            return entry | {"oid": "0" * 40, "blobId": "0" * 40, "lfs": lfs}
        return entry | {"oid": blob[:40], "blobId": blob[:40]}

    def _send_file(self, handler: BaseHTTPRequestHandler, folder: Path, name: str) -> None:
        file = folder / name
        if not file.is_file():
            handler.send_response(404)
            handler.send_header("X-Error-Code", "EntryNotFound")
            handler.send_header("X-Repo-Commit", COMMIT)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        entry = self._entry(folder, file)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        self._send(handler, file.read_bytes(), etag, held="lfs" in entry)

    def _send(self, handler, data: bytes, etag: str | None = None, *, held: bool = False) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.send_header("X-Repo-Commit", COMMIT)
        if etag:
            handler.send_header("ETag", f'"{etag}"')
        handler.end_headers()
        if handler.command == "HEAD":
            return
        first = self.hold_at if held and self.hold_at is not None else len(data)
        handler.wfile.write(data[:first])
        handler.wfile.flush()
        if data[first:] and self.go_on.wait(60):
            handler.wfile.write(data[first:])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
