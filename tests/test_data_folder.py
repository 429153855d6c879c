"""The data folder: whose it is, what is left in it, and what is said where it cannot be used."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from backend.config import Config
from backend.data_folder import DataFolderError, make_run_folder, prepare
from backend.keys import Keys
from backend.meter import Meter
from tests.conftest import ECHO, write_models
from tests.serving import ROOT, wait_for_end


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def others_may(folder):
    """What is in a data folder, itself included, that others than its owner may touch."""
    paths = [folder, *folder.iterdir(), *folder.glob("run/*")]
    return [str(path) for path in paths if stat.S_IMODE(path.lstat().st_mode) & 0o077]


def fill(folder, **settings):
    """Have keys and quotas kept in a folder, as a service does; the stores stay open."""
    config = Config(data_dir=folder, **settings)
    keys, meter = Keys(config), Meter(config)
    keys.create(owner="a", tier="free")
    meter.look("somebody", config.tiers["free"])
    return keys, meter


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o177])
def test_what_the_service_keeps_is_for_its_own_eyes_whatever_the_umask(tmp_path, mask):
    folder = (tmp_path if mask == 0o177 else tmp_path / "deep") / "data"
    with umask(mask):
        keys, meter = fill(folder)
        with closing(keys), closing(meter):
            made = {path.name for path in folder.iterdir()}
            assert {"crane.db", "quota.db", "quota.db-wal", "quota.db-shm", "pepper"} <= made
            assert others_may(folder) == []
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not stat.S_IMODE(folder.parent.stat().st_mode) & 0o022


def test_what_others_could_read_since_an_older_start_they_cannot_any_more(tmp_path):
    folder = tmp_path / "data"
    keys, meter = fill(folder)
    with closing(keys), closing(meter):
        (folder / "engine").touch()
        (folder / "run").mkdir()
        for path in (folder, *folder.iterdir()):
            path.chmod(0o755)
        link = tmp_path / "link"
        link.symlink_to(folder)
        prepare(link)
        assert others_may(folder) == []


@pytest.mark.parametrize("store", [Keys, Meter])
def test_an_old_database_is_taken_from_others_by_whoever_opens_it(tmp_path, store):
    names = ("crane.db", "crane.db-wal", "quota.db", "quota.db-wal", "quota.db-shm")
    own = [tmp_path / name for name in names if name.startswith("crane") == (store is Keys)]
    for path in own:
        path.touch()
        path.chmod(0o666)
    config = Config(data_dir=tmp_path)
    with closing(store(config)) as opened:
        if store is Keys:
            opened.list()
        else:
            opened.look("somebody", config.tiers["free"])
        assert own
        assert [path for path in own if path.exists() and path.stat().st_mode & 0o077] == []


@pytest.mark.parametrize("other", ["notes.txt", "run.py", ".hidden"])
def test_a_folder_with_more_in_it_than_ours_keeps_its_mode(tmp_path, other):
    (tmp_path / other).touch()
    tmp_path.chmod(0o755)
    (tmp_path / "pepper").touch()
    (tmp_path / "pepper").chmod(0o644)
    (tmp_path / other).chmod(0o644)
    prepare(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / other).stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "pepper").stat().st_mode) == 0o600


def start(data_dir, models, **how):
    """What gunicorn says on its streams, and its exit code, where it does not start."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("CRANE_")}
    env |= {"CRANE_MODELS": str(models), "CRANE_DATA_DIR": str(data_dir)}
    env |= {"CRANE_BIND": "127.0.0.1:0", "CRANE_LOG_LEVEL": "WARNING"}
    done = subprocess.run(
        [sys.executable, "-m", "gunicorn", "wsgi:app"],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        **how,
    )
    return done.returncode, done.stdout


def a_file(folder):
    (folder / "data").write_text("")
    return folder / "data"


def below_a_file(folder):
    return a_file(folder) / "data"


def a_loop(folder):
    (folder / "data").symlink_to(folder / "data")
    return folder / "data"


def not_to_be_made(folder):
    return Path("/proc/crane/data")


BAD_FOLDERS = {
    "a-file": (a_file, "Not a directory"),
    "below-a-file": (below_a_file, "Not a directory"),
    "a-loop": (a_loop, ""),
    "not-to-be-made": (not_to_be_made, "No such file or directory"),
}


def check_refusal(code, output, folder, fault):
    assert code == 1
    [line] = output.strip().splitlines()
    assert line.startswith(f"Crane cannot keep its data in CRANE_DATA_DIR={folder}: ")
    assert fault in line


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_data_folder_that_cannot_be_used_stops_the_start_in_a_line(tmp_path, kind):
    make, fault = BAD_FOLDERS[kind]
    folder = make(tmp_path)
    check_refusal(*start(folder, write_models(tmp_path, [ECHO])), folder, fault)


def no_room_for_files():
    # As on a full disk: what is written fails, with another number.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


def test_a_disk_without_room_stops_the_start_in_a_line(tmp_path):
    folder = tmp_path / "data"
    answer = start(folder, write_models(tmp_path, [ECHO]), preexec_fn=no_room_for_files)
    check_refusal(*answer, folder, "File too large")


AS_NOBODY = """
import os, sys
from pathlib import Path
import backend.data_folder
if os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
try:
    backend.data_folder.prepare(Path(sys.argv[1]))
except backend.data_folder.DataFolderError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["folder", "parent", "file"])
def test_what_the_services_user_may_not_write_is_told(kind):
    # Not below tmp_path, into which nobody else may look.
    top = Path(tempfile.mkdtemp())
    folder = top / "data"
    try:
        top.chmod(0o755)
        folder.mkdir()
        (folder / "quota.db").touch()
        if kind == "file":
            (folder / "quota.db").chmod(0o400)
            folder.chmod(0o777)
        elif kind == "parent":
            shutil.rmtree(folder)
            top.chmod(0o555)
        else:
            (folder / "quota.db").chmod(0o666)
            folder.chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(folder)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        top.chmod(0o700)
        with suppress(FileNotFoundError):
            folder.chmod(0o700)
        shutil.rmtree(top)
    [line] = done.stdout.strip().splitlines()
    wrong = "quota.db: is not ours to read and write" if kind == "file" else "Permission denied"
    assert wrong in line
    if os.geteuid() == 0:
        assert " is root's, and the service runs as nobody)" in line


# What is left of services that were killed.


def run_folders(data_dir):
    return {path.name for path in (Path(data_dir) / "run").iterdir()}


@pytest.fixture
def short_path():
    """A folder whose path leaves room for a socket's, which may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="crane-") as folder:
        yield Path(folder)


def test_what_a_killed_service_left_is_removed_by_the_next_start(gunicorn, short_path):
    data = short_path / "kept"
    killed, living = gunicorn(CRANE_DATA_DIR=data), gunicorn(CRANE_DATA_DIR=data)
    both = run_folders(data)
    assert len(both) == 2
    processes = killed.processes()
    killed.kill()
    assert wait_for_end(processes, 20) == []
    assert run_folders(data) == both
    again = gunicorn(CRANE_DATA_DIR=data)
    now = run_folders(data)
    assert len(now) == 2
    assert len(now & both) == 1
    assert living.run()[0] == again.run()[0] == 200
    assert others_may(data) == []
    for server in (living, again):
        server.stop()
    assert run_folders(data) == set()


def test_a_run_folder_lives_as_long_as_any_process_has_its_lock(tmp_path):
    folder, lock = make_run_folder(tmp_path)
    inherited = os.dup(lock)
    os.close(lock)
    other, other_lock = make_run_folder(tmp_path)
    assert run_folders(tmp_path) == {folder.name, other.name}
    os.close(inherited)
    last, last_lock = make_run_folder(tmp_path)
    assert run_folders(tmp_path) == {other.name, last.name}
    os.close(other_lock)
    os.close(last_lock)


@pytest.mark.parametrize("kind", ["no-lock", "a-link", "a-locks-link"])
def test_what_is_not_known_to_be_a_service_s_stays(tmp_path, kind):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    (elsewhere / "crane.lock").touch()
    left = run / "crane-left"
    if kind == "a-link":
        left.symlink_to(elsewhere)
    else:
        left.mkdir()
    if kind == "a-locks-link":
        (left / "crane.lock").symlink_to(elsewhere / "crane.lock")
    os.close(make_run_folder(tmp_path)[1])
    assert left.exists()
    assert (elsewhere / "crane.lock").exists()


def test_a_run_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(DataFolderError, match="Not a directory"):
        make_run_folder(tmp_path)
