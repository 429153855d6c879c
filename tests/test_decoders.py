"""Media are decoded in processes that can be ended, and whose end harms nobody."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
from PIL import Image

from backend import cores
from backend.config import Config
from backend.errors import ClientClosedRequest, DeadlineExceeded, PayloadTooLarge
from backend.media import Refused
from backend.media.decoder import in_blocks
from backend.media.decoders import MAX_DECODERS, Caller, Decoders
from backend.media.fetch import MAX_RESOLVERS, fetch
from backend.media.parts import AudioField, ImageField, Source
from backend.media.reader import MediaReader
from tests.hostile import jpeg_of_scans, sound
from tests.pictures import base64_of, picture, written
from tests.serving import ROOT, wait_for, wait_for_end

PNG = written(picture(64, 48))
SLOW = jpeg_of_scans(99, 8192, 4096)  # some seconds of work, and within every bound
MEMORY = 2**31


@pytest.fixture
def decoders():
    made = Decoders(memory=MEMORY, max_message=2**30)
    yield made
    made.close()


def caller(name="", timeout_s=60.0, connection=None):
    return Caller(time.monotonic() + timeout_s, name, connection)


def decode(decoders, data=PNG, claim=lambda pixels: None, **who):
    return decoders.decode(
        "image", data, claim=claim, caller=caller(**who), mode="RGB", mime_type=None
    )


def children():
    found = []
    for one in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if "backend.media.decoder" in one.cmdline():
                found.append(one)
    return found


@pytest.fixture
def begun(decoders):
    """The processes that a test's decoders have started."""
    before = {one.pid for one in children()}
    return lambda: [one for one in children() if one.pid not in before]


def test_a_process_is_used_again(decoders, begun):
    for _ in range(3):
        assert np.array_equal(decode(decoders), np.asarray(picture(64, 48)))
    assert len(begun()) == 1
    decoders.close()
    assert begun() == []


def test_a_file_that_takes_too_long_is_given_up_at_the_deadline(decoders, begun):
    decode(decoders)
    with pytest.raises(DeadlineExceeded, match="could not be read in time"):
        decode(decoders, SLOW, timeout_s=0.3)
    assert begun() == []
    assert decode(decoders).shape == (48, 64, 3)


def test_a_call_is_answered_at_its_deadline_whatever_its_picture_does(editor):
    client = editor(request_timeout_s=0.4)
    answer = client.post("/crane/run", json={"model_id": "sees", "input": base64_of(SLOW)})
    assert (answer.status_code, answer.json["error"]["code"]) == (504, "TIMEOUT_ERROR")


@pytest.fixture
def editor(make_app):
    def make(**settings):
        # Its weights are never loaded: the picture comes first.
        entry = {"id": "sees", "type": "image-classification", "hf_model": "nobody/nothing"}
        return make_app([entry], **settings).test_client()

    return make


def test_a_caller_who_leaves_ends_what_was_decoded_for_them(decoders, begun):
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ClientClosedRequest):
        decode(decoders, SLOW, lambda pixels: theirs.close(), connection=ours)
    assert begun() == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_decoder_that_dies_costs_its_file_and_no_more(decoders, begun, how):
    def die(pixels):
        [process] = begun()
        process.send_signal(how)
        process.wait(20)

    with pytest.raises(Refused, match="could not be decoded"):
        decode(decoders, claim=die)
    assert decode(decoders).shape == (48, 64, 3)


def test_a_claim_that_is_not_granted_ends_the_work_on_its_file(decoders, begun):
    def deny(pixels):
        assert pixels == 8192 * 4096
        raise ZeroDivisionError

    decode(decoders)
    [process] = begun()
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            decode(decoders, SLOW, deny)
    assert decode(decoders).shape == (48, 64, 3)
    assert begun() == [process]  # to start another costs more than most files


def test_a_decoder_maps_no_more_memory_than_it_may():
    decoders = Decoders(memory=700 * 2**20, max_message=2**30)
    try:
        assert decode(decoders).shape == (48, 64, 3)
        with pytest.raises(Refused, match="more memory"):
            decode(decoders, written(Image.new("1", (16384, 16384))))
        assert decode(decoders).shape == (48, 64, 3)
    finally:
        decoders.close()


def test_a_decoder_has_no_secret_of_ours_and_all_cores(decoders, begun, monkeypatch):
    monkeypatch.setenv("CRANE_KEY_PEPPER", "p" * 20)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(cores, "_all", None)
    allowed = cores.allowed()

    def on_one_core():
        cores.stay_on(min(allowed))
        decode(decoders)

    thread = threading.Thread(target=on_one_core)  # whose affinity ends with it
    thread.start()
    thread.join(30)
    [process] = begun()
    assert not {"CRANE_KEY_PEPPER", "HF_TOKEN"} & process.environ().keys()
    assert set(process.cpu_affinity()) == allowed


ORPHAN = """
import sys, time
from backend.media.decoders import Caller, Decoders
from tests.hostile import jpeg_of_scans
from tests.pictures import picture, written
def claim(pixels): print("decoding", flush=True)
decoders = Decoders(memory=2**31, max_message=2**30)
data = jpeg_of_scans(99, 16384, 16384) if sys.argv[1] == "busy" else written(picture(64, 48))
while True:
    decoders.decode("image", data, claim=claim, caller=Caller(time.monotonic() + 60),
                    mode="RGB", mime_type=None)
    if sys.argv[1] == "idle":
        print("idle", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_no_decoder_outlives_the_process_that_started_it(state):
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, state], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout.readline() == "decoding\n"
        if state == "idle":
            assert parent.stdout.readline() == "idle\n"
        [decoder] = psutil.Process(parent.pid).children()
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(20)
        assert wait_for_end([decoder], 5) == []  # the file takes longer


class Gates:
    """Files of some callers, each held in its claim until its gate opens."""

    def __init__(self, decoders):
        self.decoders, self.order, self.threads = decoders, [], []
        self.gate = threading.Event()
        self._changed = threading.Condition()

    def start(self, name):
        def claim(pixels):
            with self._changed:
                self.order.append(name)
                self._changed.notify_all()
            self.gate.wait(30)

        thread = threading.Thread(
            target=decode,
            args=(
                self.decoders,
                PNG,
                claim,
            ),
            kwargs={"name": name},
        )
        thread.start()
        self.threads.append(thread)

    def begun(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.order) >= count, 30)
        return self.order

    def end(self):
        self.gate.set()
        for thread in self.threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self.threads)


def test_one_callers_files_never_hold_all_decoders(decoders):
    gates = Gates(decoders)
    for _ in range(MAX_DECODERS + 3):
        gates.start("greedy")
    assert gates.begun(MAX_DECODERS - 1) == ["greedy"] * (MAX_DECODERS - 1)
    gates.start("other")
    assert gates.begun(MAX_DECODERS)[-1] == "other"
    assert len(gates.order) == MAX_DECODERS
    gates.end()
    assert len(gates.order) == MAX_DECODERS + 4
    assert not decoders._held
    assert not decoders._waiting


def test_who_waits_for_a_decoder_waits_no_longer_than_the_deadline(decoders):
    gates = Gates(decoders)
    for number in range(MAX_DECODERS):
        gates.start(str(number))
    gates.begun(MAX_DECODERS)
    with pytest.raises(DeadlineExceeded):
        decode(decoders, timeout_s=0.1)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.close()
        with pytest.raises(ClientClosedRequest):
            decode(decoders, connection=ours)
    gates.end()
    assert not decoders._waiting


def test_samples_are_claimed_in_blocks_and_never_beyond_what_is_left():
    claimed = []
    claim = in_blocks(lambda samples, rate: claimed.append(samples), 100.0)
    for _ in range(99):
        claim(1000, 1000)
    assert len(claimed) < 10
    assert 99_000 <= sum(claimed) <= 100_000
    claim(2000, 1000)
    assert sum(claimed) == 101_000


@pytest.mark.parametrize("codec", [("flac", "flac"), ("pcm_s16le", "wav")])
def test_what_was_claimed_beyond_a_sounds_end_is_given_back(codec):
    reader = MediaReader(Config(max_audio_s=3.0))
    data = base64_of(sound(*codec, seconds=1.0))
    field = AudioField()
    with reader.reading() as reading:
        for _ in range(3):
            assert len(reading.read(Source(data, field), "input")["samples"]) == 16_000
        assert reading.bytes == 3 * 4 * 16_000
        with pytest.raises(PayloadTooLarge, match="at most 3 s"):
            reading.read(Source(data, field), "input")
    reader.take(reader.config.max_media_bytes)  # none of it is lost


def test_media_are_counted_before_any_name_is_looked_up(editor, monkeypatch):
    looked_up = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: looked_up.append(args))
    client = editor(max_batch=4, media_hosts=("*",))
    urls = [f"https://host-{number}.example.com/" for number in range(9)]
    reader = client.application.extensions["crane"].media
    with (
        reader.reading() as reading,
        pytest.raises(PayloadTooLarge, match="9 media; a call may have 8"),
    ):
        reading.read([Source(url, ImageField()) for url in urls], "input")
    assert looked_up == []


def test_names_are_looked_up_by_a_bounded_number_of_threads(monkeypatch):
    gate, count = threading.Event(), threading.Semaphore(0)

    def slow(*args, **kwargs):
        count.release()
        gate.wait(30)
        raise OSError

    def ask():
        with pytest.raises(Refused, match=r"took too long|public address"):
            fetch(
                "https://slow.example.com/",
                hosts=("*",),
                max_bytes=1000,
                deadline=time.monotonic() + 1.0,
            )

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    threads = [threading.Thread(target=ask) for _ in range(MAX_RESOLVERS + 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    resolvers = [one for one in threading.enumerate() if one.name == "media resolver"]
    assert len(resolvers) == MAX_RESOLVERS
    gate.set()
    for one in resolvers:
        one.join(30)
    ask()  # there are some again
    wait_for(lambda: not [o for o in threading.enumerate() if o.name == "media resolver"])
