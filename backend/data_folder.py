"""The service's own folder: made fit to be used at a start, and one for each running service in it.

For gunicorn's master, before anything is served.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from backend.private import make_private, private_folder

# All that a service ever puts into its folder. Where there is something else, the folder is more
# than ours, and its mode the operator's to set: it may be /srv, or a home.
OWN_FILES = ("crane.db", "quota.db", "pepper", "engine", "first-key")
OWN_FOLDERS = ("run",)
_PROBE = b"\0" * 65536  # a full disk may have room for an empty file
UNIX_PATH_MAX = 107  # bytes in sockaddr_un; the longest names we put in the folder have 14
_LOCK = "crane.lock"  # held by whoever lives in a run folder


class DataFolderError(Exception):
    """The data folder cannot be used; the text is a line that says why and what to do."""


def prepare(folder: Path) -> None:
    """Make the data folder if need be, and what is ours in it for our eyes only.

    Raises ``DataFolderError``.
    """
    try:
        private_folder(folder)
        ours = [path for path in folder.iterdir() if _is_ours(path)]
        for path in ours:
            _check_use(path)
            make_private(path)
        if len(ours) == sum(1 for _ in folder.iterdir()) and folder.stat().st_uid == os.geteuid():
            make_private(folder.resolve())
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataFolderError(_reason(folder, error)) from None


def _is_ours(path: Path) -> bool:
    name = path.name
    drafts = tuple(f".{own}-" for own in OWN_FILES)
    return (
        name in OWN_FOLDERS
        or name.startswith(drafts)
        or any(name == own or name.startswith(f"{own}-") for own in OWN_FILES)
    )


def _check_use(path: Path) -> None:
    mode = os.R_OK | os.W_OK | (os.X_OK if path.is_dir() else 0)
    effective = os.access in os.supports_effective_ids
    if path.exists() and not os.access(path, mode, effective_ids=effective):
        raise PermissionError(None, "is not ours to read and write", str(path))


def _reason(folder: Path, error: OSError) -> str:
    """One line, in which a folder that is another user's is called so."""
    what = error.strerror or str(error)
    at = Path(os.fsdecode(error.filename)) if error.filename else folder
    if not at.is_relative_to(folder):
        at = folder  # a probe's name says nothing
    whose = ""
    with suppress(OSError, KeyError, StopIteration):
        there = next(path for path in (at, *at.absolute().parents) if path.exists())
        if (uid := there.stat().st_uid) != os.geteuid():
            owner, us = pwd.getpwuid(uid).pw_name, pwd.getpwuid(os.geteuid()).pw_name
            whose = f" ({there} is {owner}'s, and the service runs as {us})"
    return (
        f"Crane cannot keep its data in CRANE_DATA_DIR={folder}: {at}: {what}{whose}. It must be a "
        "folder with free space that the service may read and write."
    )


def make_run_folder(data_dir: Path) -> tuple[Path, int]:
    """A private folder for a running service's sockets and counters, and a lock on it, open.

    It is in the data folder unless that is too deep for a socket's path. Folders that nobody lives
    in any more are removed: those of services that were killed. Whoever has the lock open lives in
    it, which are the master and its workers. Raises ``DataFolderError``.
    """
    run = data_dir.resolve() / "run"
    try:
        if len(bytes(run)) + len("/crane-xxxxxxxx/placement.lock") <= UNIX_PATH_MAX:
            make_private(private_folder(run))
        else:
            run = Path(tempfile.gettempdir())
        for left in run.glob("crane-*"):
            _remove_if_left(left)
        made = Path(tempfile.mkdtemp(prefix="crane-", dir=run))
        # Locked before it has its name, or another start might take it for one that was left.
        lock = os.open(made / f".{_LOCK}", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(made / f".{_LOCK}", made / _LOCK)
    except OSError as error:
        raise DataFolderError(_reason(data_dir, error)) from None
    return made, lock


def _remove_if_left(folder: Path) -> None:
    """Remove a run folder whose lock nobody holds; one without a lock is not known to be ours."""
    with suppress(OSError):
        if folder.lstat().st_uid != os.geteuid():
            return
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)  # which follows no link
        finally:
            os.close(lock)
