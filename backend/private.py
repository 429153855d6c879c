"""Folders and files that only the service's own user may read."""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path


def private_folder(path: Path) -> Path:
    """Make a folder of mode 0700; one that is there already stays as it is."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def private_file(path: Path) -> Path:
    """Make an empty file of mode 0600; one that is there already stays as it is."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    return path


def kept_secret(path: Path, *, least: int) -> str:
    """The secret in a file, made at the first call: all processes that race get the same one.

    Raises ``OSError`` where the file can be neither read nor made, or has less than ``least``
    characters in it.
    """
    with suppress(FileNotFoundError):
        return _read(path, least)
    private_folder(path.parent)
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # of mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_urlsafe(48) + "\n")
            file.flush()
            os.fsync(handle)
        # A link is there whole or not at all, and never takes the place of another's.
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)
    return _read(path, least)


def _read(path: Path, least: int) -> str:
    text = path.read_bytes().decode(errors="replace").strip()
    if len(text) < least:
        raise OSError(f"{path} must have at least {least} characters in it")
    return text
