"""Folders and files that only the service's own user may read."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from contextlib import suppress
from errno import ENOTDIR
from pathlib import Path

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
_OTHERS = 0o077
# SQLite makes these beside a database, with its mode; from an older start they may have another.
_BESIDE = ("-wal", "-shm", "-journal")


def private_folder(path: Path) -> Path:
    """Make a folder of mode 0700, whatever the umask is; one that is there already stays as it is.

    Folders above it that are missing are made too, for all to read and for us to write.
    """
    try:
        _make_folder(path, PRIVATE_FOLDER)
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(ENOTDIR, os.strerror(ENOTDIR), str(path)) from None
    else:
        path.chmod(PRIVATE_FOLDER)
    return path


def _make_folder(path: Path, mode: int) -> None:
    try:
        path.mkdir(mode)
    except FileNotFoundError:
        if path == path.parent:
            raise
        with suppress(FileExistsError):
            _make_folder(path.parent, 0o755)
        path.mkdir(mode)


def private_database(path: Path) -> Path:
    """Make an empty file of mode 0600 for SQLite, in a private folder, whatever the umask is.

    What is there already is ours alone from now on. It is never opened here: to close it would end
    the locks that this process has on it.
    """
    private_folder(path.parent)
    with suppress(FileExistsError):
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, PRIVATE_FILE)
        os.close(handle)
    for name in (path.name, *(path.name + end for end in _BESIDE)):
        make_private(path.with_name(name))
    return path


def make_private(path: Path) -> None:
    """Take from others what they may do with a file or folder, if it is there, ours and no link."""
    with suppress(FileNotFoundError):
        found = path.lstat()
        is_ours = os.geteuid() in (0, found.st_uid)
        if is_ours and not stat.S_ISLNK(found.st_mode) and found.st_mode & _OTHERS:
            path.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600, whole or not at all, whatever is there already."""
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=private_folder(path.parent))
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


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
