"""Media that callers send: what is odd but sound is read, what is hostile is refused by name."""

from __future__ import annotations

import base64
import socket
import struct
import threading
import time
import zlib
from contextlib import ExitStack, suppress
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from backend.config import Config
from backend.errors import Overloaded
from backend.media.parts import ImageField, Source
from backend.media.reader import MediaReader
from tests.checkpoints import checkpoint
from tests.conftest import run
from tests.pictures import base64_of, difference, picture, read, written

__all__ = ["checkpoint"]

OPTIONS = {"num_inference_steps": 2, "width": 64, "height": 64, "seed": 1}


@pytest.fixture
def editor(make_app, checkpoint):
    """A client of an image model that may fetch from any public host, on any of two ports."""

    def make(port=443, **settings):
        entries = [
            {"id": "edit", "type": "image-to-image", "hf_model": checkpoint("stable_diffusion")}
        ]
        settings = {"media_hosts": ("*", f"*:{port}")} | settings
        return make_app(entries, **settings).test_client()

    return make


def edit(client, image, prompt="red"):
    return run(client, "edit", {"prompt": prompt, "image": image}, options=OPTIONS)


# A folder of hostile media.

PNG = written(picture(64, 64))
JPEG = written(picture(64, 64), "JPEG")
WEBP = written(picture(64, 64), "WEBP")
GIF = written(picture(64, 64), "GIF")
BMP = written(picture(64, 64), "BMP")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks, bits=8, colour=2, pixels=b""):
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *chunks, chunk(b"IDAT", zlib.compress(pixels))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def bomb():
    """400 megapixels of zeros in 50 kB."""
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(b"\0" * 2501) for _ in range(20_000)) + rows.flush()
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def patched(data, offset, value):
    return data[:offset] + value + data[offset + len(value) :]


def jpeg_sized(width, height):
    at = JPEG.index(b"\xff\xc0") + 5
    return patched(JPEG, at, struct.pack(">HH", height, width))


INFLATED = zlib.compress(b"\0" * 80_000_000)

FILES = {
    "empty": b"",
    "one byte": b"\x89",
    "text": b"not a picture at all",
    "html": b"<html><script>alert(1)</script></html>",
    "svg that names a file": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/>',
    "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file\n",
    "zip": b"PK\x03\x04" + b"\0" * 64,
    "elf": b"\x7fELF" + b"\0" * 64,
    "wav": b"RIFF\x24\0\0\0WAVEfmt " + b"\0" * 32,
    "mp4": b"\0\0\0\x18ftypmp42" + b"\0" * 32,
    "tiff": written(picture(8, 8), "TIFF"),
    "ico": written(picture(16, 16), "ICO"),
    "ppm of many pixels": b"P6 60000 60000 255\n",
    "png of a signature alone": PNG[:8],
    "png of a head alone": PNG[:33],
    "png cut in its pixels": PNG[: len(PNG) // 2],
    "png without pixels": png(64, 64),
    "png with a wrong checksum": patched(PNG, 29, b"\0\0\0\0"),
    "png with wrong pixels": patched(PNG, 60, b"\xff" * 40),
    "png of no width": png(0, 64, pixels=b"\0"),
    "png of most pixels": png(2**31 - 1, 2**31 - 1),
    "png bomb": bomb(),
    "png text bomb": png(8, 8, chunk(b"zTXt", b"a\0\0" + INFLATED), pixels=b"\0" * 200),
    "png international text bomb": png(
        8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + INFLATED), pixels=b"\0" * 200
    ),
    "jpeg of a head alone": JPEG[:20],
    "jpeg cut in its pixels": JPEG[: len(JPEG) * 2 // 3],
    "jpeg of many pixels": jpeg_sized(65_000, 65_000),
    "jpeg of no size": jpeg_sized(0, 0),
    "webp of a head alone": WEBP[:16],
    "webp cut in its pixels": WEBP[: len(WEBP) // 2],
    "gif of a head alone": GIF[:10],
    "gif cut in its pixels": GIF[: len(GIF) // 2],
    "gif of many pixels": patched(GIF, 6, struct.pack("<HH", 65_000, 65_000)),
    "bmp of a head alone": BMP[:30],
    "bmp cut in its pixels": BMP[: len(BMP) // 2],
    "bmp of many pixels": patched(BMP, 18, struct.pack("<ii", 2**30, 2**30)),
    "bmp of many pixels upside down": patched(BMP, 18, struct.pack("<ii", -64, -(2**31))),
}


@pytest.fixture
def listener():
    """A socket on this machine that nothing may connect to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield server
        with pytest.raises(BlockingIOError):
            server.accept()


def refused(answer, path):
    """The fault of a refused field, where the answer is a 4xx that names it."""
    assert answer.status_code in (400, 413), answer.json
    assert list(answer.json["error"]["details"]) == [path]
    return answer.json["error"]["details"][path]


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_however_it_comes(editor, name):
    client = editor()
    started = time.monotonic()
    plain = edit(client, base64_of(FILES[name]))
    form = client.post(
        "/crane/run",
        data={
            "model_id": "edit",
            "input.prompt": "red",
            "input.image": (BytesIO(FILES[name]), "boat.png", "application/octet-stream"),
        },
        content_type="multipart/form-data",
    )
    assert refused(plain, "input.image") == refused(form, "input.image")
    labelled = edit(client, f"data:image/png;base64,{base64_of(FILES[name])}")
    assert refused(labelled, "input.image")
    assert time.monotonic() - started < 15
    many = "many pixels" in name or name in ("png bomb", "png of most pixels")
    assert (plain.status_code == 413) == (many and "ppm" not in name)


HOSTILE_TEXTS = [
    "",
    "not base64!",
    "iVBORw0KGgo=====",
    "iVBORw0KGgo",
    "%89PNG",
    "/etc/passwd",
    "/etc/hostname/..",
    "../../../../etc/passwd",
    "~/.ssh/id_rsa",
    "C:\\Windows\\win.ini",
    "\\\\server\\share\\x.png",
    "data:",
    "data:image/png;base64",
    "data:image/png;base64,",
    "data:image/png;base64,***",
    "data:image/png,plain",
    f"data:image/jpeg;base64,{base64_of(PNG)}",
    f"data:audio/wav;base64,{base64_of(PNG)}",
    f"data:text/html;base64,{base64_of(PNG)}",
]

HOSTILE_URLS = [
    "http://127.0.0.1:{port}/x.png",
    "http://[::1]:{port}/x.png",
    "http://localhost:{port}/x.png",
    "https://127.0.0.1:{port}/x.png",
    "https://[::1]:{port}/x.png",
    "https://localhost:{port}/x.png",
    "https://2130706433:{port}/x.png",
    "https://0177.0.0.1:{port}/x.png",
    "https://0x7f.0.0.1:{port}/x.png",
    "https://0x7f000001:{port}/x.png",
    "https://127.1:{port}/x.png",
    "https://0:{port}/x.png",
    "https://0.0.0.0:{port}/x.png",
    "https://[::]:{port}/x.png",
    "https://[::ffff:127.0.0.1]:{port}/x.png",
    "https://[::ffff:7f00:1]:{port}/x.png",
    "https://[::127.0.0.1]:{port}/x.png",
    "https://[64:ff9b::7f00:1]:{port}/x.png",
    "https://[2002:7f00:1::]:{port}/x.png",
    "https://[fe80::1%25lo]:{port}/x.png",
    "https://[fc00::1]:{port}/x.png",
    "https://10.0.0.1:{port}/x.png",
    "https://172.16.0.1:{port}/x.png",
    "https://192.168.0.1:{port}/x.png",
    "https://100.64.0.1:{port}/x.png",
    "https://169.254.169.254/latest/meta-data/",
    "https://user@127.0.0.1:{port}/x.png",
    "https://example.com@127.0.0.1:{port}/x.png",
    "https://127.0.0.1:{port}\\@example.com/x.png",
    "https://127.0.0.1:0/x.png",
    "https://127.0.0.1:99999/x.png",
    "https:///x.png",
    "https://",
    "HTTPS://LOCALHOST:{port}/x.png",
    " https://127.0.0.1:{port}/x.png",
    "file:///etc/passwd",
    "file://localhost/etc/passwd",
    "ftp://127.0.0.1:{port}/x.png",
    "gopher://127.0.0.1:{port}/x.png",
    "jar:https://127.0.0.1:{port}/x.png!/x",
    "javascript:alert(1)",
]


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_a_text_that_is_no_picture_is_refused(editor, text):
    fault = refused(edit(editor(), text), "input.image")
    assert "passwd" not in fault


@pytest.mark.parametrize("url", HOSTILE_URLS)
def test_a_url_that_leads_inside_is_refused_and_nothing_is_fetched(editor, listener, url):
    port = listener.getsockname()[1]
    refused(edit(editor(port), url.format(port=port)), "input.image")


def test_no_url_is_fetched_unless_a_host_is_allowed(editor, listener):
    url = f"https://127.0.0.1:{listener.getsockname()[1]}/x.png"
    fault = refused(edit(editor(media_hosts=()), url), "input.image")
    assert "CRANE_MEDIA_HOSTS" in fault


def test_all_urls_of_a_call_share_its_time(editor, monkeypatch):
    never = threading.Event()

    def silent(*asked, **how):
        never.wait(20)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    client = editor(request_timeout_s=0.5)
    inputs = [{"prompt": "red", "image": f"https://{place}.example.com/"} for place in range(4)]
    started = time.monotonic()
    answer = run(client, "edit", inputs)
    assert time.monotonic() - started < 1.9
    never.set()
    details = answer.json["error"]["details"]
    assert details == {f"input[{place}].image": "took too long" for place in range(4)}


@pytest.mark.parametrize("value", [5, None, True, ["x"], {"url": "x"}])
def test_a_picture_is_a_text_or_a_file(editor, value):
    fault = refused(edit(editor(), value), "input.image")
    assert "a picture: base64, a data: URL, an https URL, or a file" in fault


# What is counted.


def test_the_pixels_of_a_call_are_counted_together(editor):
    client = editor(max_pixels=6000)
    image = {"prompt": "red", "image": base64_of(picture(64, 64))}
    assert run(client, "edit", image, options=OPTIONS).status_code == 200
    assert run(client, "edit", [image], options=OPTIONS).status_code == 200
    answer = run(client, "edit", [image, image], options=OPTIONS)
    assert answer.status_code == 413
    told = "has 4096 pixels after 4096 in this call; at most 6000 are allowed in a call"
    assert answer.json["error"]["details"] == {"input[1].image": told}


def test_every_fault_of_a_call_is_named(editor):
    good = {"prompt": "red", "image": base64_of(PNG)}
    inputs = [good, {**good, "image": "?"}, good, {**good, "image": base64_of(PNG[:40])}]
    answer = run(editor(), "edit", inputs)
    assert list(answer.json["error"]["details"]) == ["input[1].image", "input[3].image"]


def test_what_a_process_holds_is_bounded_and_given_back():
    reader = MediaReader(Config(max_pixels=4096, max_audio_s=0.1))
    source = Source(base64_of(PNG), ImageField())
    for _ in range(3):
        with ExitStack() as held:
            for _ in range(8):
                held.enter_context(reader.reading()).read(source, "input")
            with reader.reading() as ninth, pytest.raises(Overloaded, match="as many pictures"):
                ninth.read(source, "input")
        with suppress(ZeroDivisionError), reader.reading() as reading:
            reading.read(source, "input")
            raise ZeroDivisionError


def test_a_picture_longer_than_a_text_may_be_is_read(editor):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    image = base64_of(Image.fromarray(noise))
    assert len(image) > 5000
    client = editor(max_text=5000)
    assert edit(client, image).status_code == 200
    long_prompt = edit(client, image, prompt="red " * 2000)
    assert refused(long_prompt, "input.prompt") == ("has 8000 characters; at most 5000 are allowed")


# What is odd but sound.


def pixels_of(image):
    """What the service makes of a picture."""
    reader = MediaReader(Config())
    with reader.reading() as reading:
        return reading.read(Source(base64_of(image), ImageField()), "input")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_as_its_exif_says(orientation):
    upright = picture(40, 24)
    # How a camera stores it: the inverse of what a viewer does.
    stored = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = written(stored, "PNG", exif=exif.tobytes())
    assert difference(pixels_of(data), np.asarray(upright)) == 0


def test_a_turned_picture_is_edited_upright(editor):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = written(picture(96, 64), "JPEG", exif=exif.tobytes())
    answer = run(
        editor(),
        "edit",
        {"prompt": "red", "image": base64_of(data)},
        options={"num_inference_steps": 2},
    )
    assert read(answer.json["output"]).shape == (96, 64, 3)


ODD = {
    "grey": lambda image: image.convert("L"),
    "grey with alpha": lambda image: image.convert("LA"),
    "black and white": lambda image: image.convert("1"),
    "palette": lambda image: image.convert("P"),
    "alpha": lambda image: image.convert("RGBA"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_picture_of_another_kind_of_pixels_is_read(kind):
    image = ODD[kind](picture(20, 10))
    expected = np.asarray(image.convert("RGB"))
    assert difference(pixels_of(image), expected) == 0


def test_a_palette_with_transparent_entries_is_read_without_a_warning():
    image = picture(20, 10).convert("P")
    data = written(image, transparency=bytes(range(256)))
    assert difference(pixels_of(data), np.asarray(image.convert("RGB"))) == 0


def test_sixteen_bits_are_read_as_their_upper_eight():
    deep = (np.arange(200, dtype=np.uint16).reshape(10, 20) * 300).astype(np.uint16)
    data = written(Image.fromarray(deep))
    assert np.array_equal(pixels_of(data)[:, :, 1], deep >> 8)


def test_cmyk_and_moving_pictures_are_read():
    cmyk = picture(16, 16).convert("CMYK")
    assert pixels_of(written(cmyk, "JPEG")).shape == (16, 16, 3)
    frames = [picture(16, 16, seed) for seed in range(3)]
    for format_ in ("GIF", "WEBP", "PNG"):
        how = {"lossless": True} if format_ == "WEBP" else {}
        data = written(frames[0], format_, save_all=True, append_images=frames[1:], **how)
        most = 60 if format_ == "GIF" else 0
        assert difference(pixels_of(data), np.asarray(frames[0])) <= most


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_breaks_nothing():
    for junk in (b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"\xff" * 100, b""):
        data = written(picture(16, 16), "JPEG", exif=junk)
        assert pixels_of(data).shape == (16, 16, 3)


def test_a_data_url_may_be_spelled_as_the_standard_allows():
    data = base64.b64encode(PNG).decode()
    for head in ("data:image/PNG;base64,", "DATA:;base64,", "data:image/png;x=y;base64,"):
        with MediaReader(Config()).reading() as reading:
            pixels = reading.read(Source(head + data, ImageField()), "input")
        assert pixels.shape == (64, 64, 3)
