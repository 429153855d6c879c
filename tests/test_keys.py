"""API keys, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import backend.keys
from backend.config import Config
from backend.errors import KeysUnavailable
from backend.keys import KeyEnded, Keys, UnknownKey, looks_like_key
from tests.databases import racers

ROOT = Path(__file__).resolve().parent.parent


class Clock:
    def __init__(self):
        self.at = datetime(2030, 1, 1, 12, tzinfo=UTC)

    def __call__(self):
        return self.at


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def keys(database, clock):
    with closing(Keys(Config(**database), now=clock)) as opened:
        yield opened


def test_a_key_is_found_as_it_was_made(keys, clock):
    until = clock.at + timedelta(days=30)
    key, text = keys.create(owner="Ann Lee", tier="pro", expires_at=until, models=["b", "a"])
    assert re.fullmatch(r"crane_[a-z2-7]{12}_[A-Za-z0-9]{32}", text)
    assert text.split("_")[1] == key.id
    assert (key.owner, key.tier, key.models) == ("Ann Lee", "pro", {"a", "b"})
    assert (key.created_at, key.expires_at, key.revoked_at) == (clock.at, until, None)
    assert keys.find(text) == key
    assert looks_like_key(text)
    plain, other = keys.create(owner="Bob", tier="free")
    assert (plain.models, plain.expires_at) == (None, None)
    assert keys.find(other) == plain
    assert [found.id for found in keys.list()] == sorted([key.id, plain.id])


def test_times_are_the_same_moments_whatever_the_zone(keys, clock):
    zone = datetime.fromisoformat("2030-01-02T03:04:05.678901+05:30").tzinfo
    until = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=zone)
    keys.create(owner="a", tier="free", expires_at=until)
    [key] = keys.list()
    assert key.expires_at == until
    assert key.expires_at.utcoffset() == key.created_at.utcoffset() == timedelta(0)


HOSTILE = {
    "empty": lambda text, other: "",
    "prefix-only": lambda text, other: "crane_",
    "id-only": lambda text, other: text[:19],
    "huge": lambda text, other: text * 100_000,
    "not-ascii": lambda text, other: text[:-1] + "é",
    "other-digits": lambda text, other: text[:-1] + "٣",
    "surrogate": lambda text, other: text[:-1] + "\ud800",
    "nul": lambda text, other: text + "\0",
    "nul-inside": lambda text, other: text[:8] + "\0" + text[9:],
    "wrong-secret": lambda text, other: text[:-1] + ("a" if text[-1] != "a" else "b"),
    "secret-of-another": lambda text, other: text[:18] + other[18:],
    "id-of-another": lambda text, other: other[:18] + text[18:],
    "swapped-case": lambda text, other: text.swapcase(),
    "secret-in-other-case": lambda text, other: text[:19] + text[19:].swapcase(),
    "space-after": lambda text, other: text + " ",
    "newline-after": lambda text, other: text + "\n",
    "space-before": lambda text, other: " " + text,
    "one-short": lambda text, other: text[:-1],
    "one-long": lambda text, other: text + "a",
    "sql": lambda text, other: "crane_' OR 1=1 --_" + text[19:],
    "unknown-id": lambda text, other: "crane_" + "a" * 12 + text[18:],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_but_the_whole_key_is_the_key(keys, kind):
    _, text = keys.create(owner="a", tier="free")
    _, other = keys.create(owner="b", tier="free")
    for _ in range(2):  # before the key was looked up, and after
        assert keys.find(HOSTILE[kind](text, other)) is None
        assert keys.find(text).owner == "a"


def test_ids_that_do_not_exist_take_no_memory(keys, monkeypatch):
    monkeypatch.setattr(backend.keys, "CACHE_SIZE", 3)
    texts = [keys.create(owner="a", tier="free")[1] for _ in range(5)]
    for n in range(20):
        assert keys.find(f"crane_{'abcdefghijklmnopqrstuvwxyz'[n] * 12}_{'x' * 32}") is None
    assert len(keys._seen) == len(keys._used) == 0
    assert all(keys.find(text) for text in texts)
    assert len(keys._seen) == len(keys._used) == 3


def test_a_key_ends_when_it_expires_even_where_it_is_remembered(keys, clock):
    _, text = keys.create(owner="a", tier="free", expires_at=clock.at + timedelta(minutes=1))
    clock.at += timedelta(seconds=59.999)
    assert keys.find(text)
    clock.at += timedelta(seconds=0.001)
    assert keys.find(text) is None
    [key] = keys.list()
    assert key.state(clock.at) == "expired"
    with pytest.raises(KeyEnded, match="is expired"):
        keys.rotate(key.id)


def test_a_revoked_key_stops_and_stays_so(keys, clock):
    key, text = keys.create(owner="a", tier="free")
    assert keys.find(text)
    assert keys.revoke(key.id).revoked_at == clock.at
    assert keys.find(text) is None
    clock.at += timedelta(hours=1)
    assert keys.revoke(key.id).revoked_at == clock.at - timedelta(hours=1)
    with pytest.raises(KeyEnded, match="is revoked"):
        keys.rotate(key.id)
    assert keys.find(text) is None


def test_a_rotated_key_is_the_same_key_with_another_secret(keys):
    key, old = keys.create(owner="a", tier="pro", models=["m"])
    assert keys.find(old)
    rotated, new = keys.rotate(key.id)
    assert old != new
    assert old[:19] == new[:19]
    found = keys.find(new)
    assert (found.id, found.owner, found.tier, found.models) == (key.id, "a", "pro", {"m"})
    assert rotated.created_at == key.created_at
    assert keys.find(old) is None


def test_a_new_secret_works_at_once_where_the_old_one_is_remembered(keys, database):
    key, old = keys.create(owner="a", tier="free")
    assert keys.find(old)
    with closing(Keys(Config(**database))) as elsewhere:
        _, new = elsewhere.rotate(key.id)
    assert keys.find(new) == keys.find(new) != None  # noqa: E711
    assert keys.find(old) is None


@pytest.mark.parametrize("id_", ["", "nope", "x" * 100_000, "é", "a\0b", "' OR 1=1"])
def test_an_unknown_id_is_told(keys, id_):
    for change in (keys.revoke, keys.rotate):
        with pytest.raises(UnknownKey):
            change(id_)


def test_the_first_key_is_made_where_none_ever_was(keys):
    kept = []
    first = keys.create_first(owner="a", tier="free", keep=kept.append)
    [text] = kept
    assert keys.find(text) == first
    assert (first.owner, first.admin) == ("a", True)
    assert keys.create_first(owner="b", tier="free", keep=kept.append) is None
    keys.revoke(first.id)
    assert keys.create_first(owner="c", tier="free", keep=kept.append) is None
    assert len(keys.list()) == len(kept) == 1


def test_a_first_key_that_cannot_be_kept_is_not_made(keys):
    def refuse(text):
        raise OSError("the disk is full")

    with pytest.raises(KeysUnavailable) as caught:
        keys.create_first(owner="a", tier="free", keep=refuse)
    assert "the disk is full" in str(caught.value.__cause__)
    kept = []
    assert keys.create_first(owner="b", tier="free", keep=kept.append).owner == "b"
    assert keys.find(kept[0])


def test_the_last_use_is_written_down_once_a_minute(keys, clock, monkeypatch):
    ticks = [0.0]
    monkeypatch.setattr(backend.keys, "monotonic", lambda: ticks[0])
    _, text = keys.create(owner="a", tier="free")

    def last_used_after(seconds):
        clock.at += timedelta(seconds=seconds)
        ticks[0] += seconds
        assert keys.find(text)
        return keys.list()[0].last_used_at

    first = last_used_after(0)
    assert first == clock.at
    assert last_used_after(59) == first
    assert last_used_after(1) == clock.at


def test_a_use_that_cannot_be_written_down_fails_no_call(keys, monkeypatch, caplog):
    _, text = keys.create(owner="a", tier="free")
    keys.find(text)  # opens the store
    keys._used.clear()

    def refuse(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(keys._opened[0], "change_key", refuse)
    assert keys.find(text)
    assert "was not written down" in caplog.text


def test_a_key_that_was_found_is_looked_up_again_after_three_seconds_and_not_before(
    keys, monkeypatch
):
    ticks = [0.0]
    monkeypatch.setattr(backend.keys, "monotonic", lambda: ticks[0])
    _, text = keys.create(owner="a", tier="free")
    keys.find(text)
    reads = []
    store = keys._opened[0]
    monkeypatch.setattr(store, "keys", lambda ids, keys=store.keys: reads.append(ids) or keys(ids))
    ticks[0] = 3.0
    assert keys.find(text)
    assert reads == []
    ticks[0] = 3.01
    assert keys.find(text)
    assert len(reads) == 1


WATCH = """
import sys, time
from pathlib import Path
from backend.config import Config
from backend.keys import Keys
url, folder = sys.argv[1:]
keys = Keys(Config(data_dir=Path(folder), database_url=url or None))
text = sys.stdin.readline().strip()
assert keys.find(text)
print("found", flush=True)
while keys.find(text):
    time.sleep(0.01)
print("gone", flush=True)
"""


@pytest.mark.parametrize("end", ["revoke", "rotate"])
def test_a_key_that_ends_stops_in_every_process_within_five_seconds(keys, database, end):
    key, text = keys.create(owner="a", tier="free")
    arguments = [database.get("database_url", ""), str(database["data_dir"])]
    watching = [
        subprocess.Popen(
            [sys.executable, "-c", WATCH, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for process in watching:
            process.stdin.write(text + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "found\n"
        getattr(keys, end)(key.id)
        ended = time.monotonic()
        for process in watching:
            assert process.stdout.readline() == "gone\n"
            assert process.wait(10) == 0
        assert time.monotonic() - ended < 5
    finally:
        for process in watching:
            process.kill()
            process.communicate()


def test_of_many_processes_that_start_at_once_one_makes_the_first_key(tmp_path, postgres):
    tries = [{"data_dir": tmp_path / f"sqlite-{n}"} for n in range(10)]
    tries += [
        {"data_dir": tmp_path / f"postgresql-{n}", "database_url": postgres.new_url()}
        for n in range(5)
    ]
    with racers() as race:
        for settings in tries:
            [text] = [text for text in race(settings) if text is not None]
            with closing(Keys(Config(**settings))) as keys:
                assert keys.find(text)
                assert len(keys.list()) == 1


def test_no_secret_is_in_any_repr_or_log_line(keys, database, caplog):
    caplog.set_level(logging.DEBUG)
    key, text = keys.create(owner="a", tier="free")
    found = keys.find(text)
    keys.find(text[:-1] + "0")
    _, new = keys.rotate(key.id)
    keys.find(new)
    pepper = (database["data_dir"] / "pepper").read_text().strip()
    macs = [seen.mac for seen in keys._seen.values()]
    assert len(macs) == 1
    shown = repr((key, found, keys, keys._seen, keys._config, keys.list())) + caplog.text
    for secret in (text[19:], new[19:], pepper, *macs):
        assert secret not in shown


def test_a_key_of_another_pepper_is_not_found_and_the_log_says_why(keys, database, caplog):
    key, text = keys.create(owner="a", tier="free")
    with closing(Keys(Config(**database, key_pepper="another pepper of enough letters"))) as other:
        for _ in range(2):
            assert other.find(text) is None
    [line] = [r.getMessage() for r in caplog.records if r.name == "crane.keys"]
    assert line.startswith(f"key {key.id} was made with another pepper")


def test_keys_that_are_not_used_open_nothing(tmp_path):
    keys = Keys(Config(data_dir=tmp_path / "data"))
    assert keys.find("sk-something-else") is None
    keys.close()
    assert not (tmp_path / "data").exists()


def test_a_pepper_that_cannot_be_used_makes_keys_unavailable(tmp_path):
    (tmp_path / "pepper").write_text("short\n")
    with pytest.raises(KeysUnavailable) as caught:
        Keys(Config(data_dir=tmp_path)).create(owner="a", tier="free")
    assert "at least 16 characters" in str(caught.value.__cause__)
    assert caught.value.retry_after_s
