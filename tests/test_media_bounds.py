"""What decoding may cost is bounded by counts, before anything is decoded."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from backend.media import Refused, bounds
from backend.media.audio import decode_audio
from backend.media.images import decode_image
from backend.media.video import decode_video
from tests import hostile
from tests.pictures import picture


def nothing(*amounts):
    """Grants every claim."""


def read_image(data, claim=nothing):
    return decode_image(data, mode="RGB", mime_type=None, claim=claim)


def read_audio(data, claim=nothing, **options):
    return decode_audio(data, rate=None, mime_type=None, claim=claim, **options)


def read_video(data, claim=nothing):
    return decode_video(data, max_frames=4, mime_type=None, claim=claim)


HOSTILE = {
    "scans of a JPEG": (read_image, hostile.jpeg_of_scans, bounds.MAX_SCANS),
    "segments of a JPEG": (read_image, hostile.jpeg_of_segments, bounds.MAX_SEGMENTS),
    "chunks of a PNG": (read_image, hostile.png_of_chunks, bounds.MAX_CHUNKS),
    "chunks of a WebP": (read_image, hostile.webp_of_chunks, bounds.MAX_CHUNKS),
    "blocks of a GIF": (read_image, hostile.gif_of_blocks, bounds.MAX_BLOCKS),
    "chunks of a WAV": (read_audio, hostile.wav_of_chunks, bounds.MAX_CHUNKS),
    "streams of an Ogg": (read_audio, hostile.ogg_of_chains, bounds.MAX_CHAINED),
    "boxes of a film": (read_video, hostile.mp4_of_boxes, bounds.MAX_BOXES),
    "boxes of a sound": (read_audio, hostile.mp4_of_boxes, bounds.MAX_BOXES),
    "boxes inside": (read_video, lambda n: hostile.mp4_of_boxes(n, b"moov"), bounds.MAX_BOXES),
    "boxes hidden": (read_video, hostile.mp4_with_boxes_hidden, bounds.MAX_BOXES),
    "boxes in one without an end": (
        read_video,
        lambda n: hostile.mp4_of_boxes(n, before=b"\0\0\0\0moov"),
        bounds.MAX_BOXES,
    ),
    "boxes behind one of 64 bits": (
        read_video,
        lambda n: hostile.mp4_of_boxes(n, before=b"\0\0\0\x01free\0\0\0\0\0\0\0\x10"),
        bounds.MAX_BOXES,
    ),
    "boxes behind an MP4's handler": (
        read_video,
        lambda n: hostile.mp4_of_boxes(n, b"meta", bytes(4) + hostile.HANDLER),
        bounds.MAX_BOXES,
    ),
    "boxes behind QuickTime's handler": (
        read_video,
        lambda n: hostile.mp4_of_boxes(n, b"meta", hostile.HANDLER),
        bounds.MAX_BOXES,
    ),
    "boxes behind a handler anywhere": (
        read_video,
        lambda n: hostile.mp4_of_boxes(n, b"meta", bytes(12) + hostile.HANDLER),
        bounds.MAX_BOXES,
    ),
    "boxes behind a broken one": (
        read_video,
        lambda n: hostile.mp4_of_boxes(n, before=b"\0\0\0\x10moov\0\0\0\4free"),
        bounds.MAX_BOXES,
    ),
    "boxes of a codec": (
        read_audio,
        lambda n: hostile.mp4_of_boxes(n, b"stsd", bytes(8) + b"\xff\xff\xff\xffmp4a" + bytes(28)),
        bounds.MAX_BOXES,
    ),
    "chunks of a list": (
        read_audio,
        lambda n: hostile.wav_of_chunks(n, listed=True),
        bounds.MAX_CHUNKS,
    ),
    "blocks behind a frame's colours": (
        read_image,
        lambda n: hostile.gif_of_blocks(n, colours=bytes(6)),
        bounds.MAX_BLOCKS,
    ),
    "streams of one page": (
        read_audio,
        lambda n: hostile.ogg_of_chains(n).replace(b"OggS\0\2", b"OggS\0\6"),
        bounds.MAX_CHAINED,
    ),
    "chunks hidden": (read_audio, hostile.wav_with_chunks_hidden, bounds.MAX_CHUNKS),
    "runs of a BMP": (read_image, hostile.bmp_of_runs, bounds.MAX_RUNS),
    "elements hidden": (
        read_video,
        lambda n: hostile.webm_of_elements(n, hidden=True),
        bounds.MAX_ELEMENTS,
    ),
    "elements of a film": (read_video, hostile.webm_of_elements, bounds.MAX_ELEMENTS),
    "elements of a sound": (read_audio, hostile.webm_of_elements, bounds.MAX_ELEMENTS),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_repeats_what_costs_time_is_refused_before_it_is_decoded(name):
    read, made, most = HOSTILE[name]

    def claim(*amounts):
        raise AssertionError("it was opened")

    with pytest.raises(Refused, match=f"more than {most} "):
        read(made(most + 1), claim)


@pytest.mark.parametrize(
    "name", ["scans of a JPEG", "segments of a JPEG", "blocks of a GIF", "chunks of a WAV"]
)
def test_a_file_within_the_bound_is_read(name):
    read, made, most = HOSTILE[name]
    assert len(read(made(most // 2)))


def test_boxes_that_say_they_end_later_than_what_they_are_in_are_counted_once():
    lies = struct.pack(">I4sI4s", 16, b"moov", 2**31 - 1, b"trak")
    bounds.bound_mp4(hostile.mp4_of_boxes(bounds.MAX_BOXES * 9 // 10, before=lies))


@pytest.mark.parametrize("before", [b"", bytes(4)], ids=["QuickTime", "MP4"])
def test_what_is_behind_a_handler_may_be_large(before):
    cover = struct.pack(">I4s", 2**20, b"covr") + bytes(2**20 - 8)
    boxes = before + hostile.HANDLER + struct.pack(">I4s", 8 + len(cover), b"ilst") + cover
    bounds.bound_mp4(hostile.mp4_of_boxes(9, b"meta", boxes))


def test_an_ogg_of_some_chained_streams_is_read():
    one = read_audio(hostile.ogg_of_chains(1))["samples"]
    assert len(read_audio(hostile.ogg_of_chains(5))["samples"]) > len(one)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": True}])
def test_pictures_as_encoders_make_them_are_read(format_, options):
    image = picture(300, 200)
    if options.pop("exif", None):
        exif = Image.Exif()
        exif[0x927C] = b"\xff\xda" * 20_000  # what looks like scans, in a segment
        options["exif"] = exif.tobytes()
    file = io.BytesIO()
    image.save(file, format_, **options)
    assert read_image(file.getvalue()).shape == (200, 300, 3)


COSTLY = {
    "eight channels of 192 kHz": ("flac", "flac", 192_000, 10.0, "7.1", {}),
    "frames of 2.5 ms": ("libopus", "ogg", 48_000, 10.0, "mono", {"frame_duration": "2.5"}),
    "frames of 16 samples": ("flac", "flac", 16_000, 10.0, "mono", {"frame_size": "16"}),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_sound_that_costs_more_than_its_seconds_is_held_to_what_it_costs(name):
    codec, format_, rate, seconds, layout, options = COSTLY[name]
    data = hostile.sound(codec, format_, rate, seconds, layout, **options)
    with pytest.raises(Refused, match="as long to decode") as refused:
        read_audio(data, max_cost_s=12.0)
    assert refused.value.too_large
    assert len(read_audio(data, max_cost_s=500.0)["samples"]) >= seconds * min(rate, 48_000)


@pytest.mark.parametrize(("rate", "layout"), [(16_000, "mono"), (48_000, "stereo")])
def test_a_usual_sound_costs_no_more_than_it_lasts(rate, layout):
    data = hostile.sound("flac", "flac", rate, 10.0, layout)
    assert len(read_audio(data, max_cost_s=10.0)["samples"]) == 10 * rate


@pytest.mark.parametrize("rate", [96_000, 192_000])
def test_a_sound_of_any_rate_is_kept_at_48_khz_at_most(rate):
    heard = read_audio(hostile.sound("flac", "flac", rate, 1.0))
    assert heard["rate"] == 48_000
    assert abs(len(heard["samples"]) - 48_000) < 100
    assert not np.any(heard["samples"])
