"""What decoding a file may cost, bounded before any of it is spent.

A file of a few kilobytes can ask for hours: a JPEG whose every scan goes through the whole picture,
an MP4 of millions of empty boxes. What such files repeat is counted here, by steps that are as few
as the bound. Encoders stay far below all of these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from backend.media import Refused

MAX_SCANS = 100  # of a JPEG: encoders make 10 or so; of 32 megapixels, each takes 20 ms
MAX_SEGMENTS = 10_000  # of a JPEG
MAX_CHUNKS = 65_536  # of a PNG, a WebP or a WAV: libpng's own have 8 KiB, so 512 MiB
MAX_RUNS = 2**21  # bytes of a BMP's runs, which Pillow reads in Python, a microsecond for each
MAX_BLOCKS = 500_000  # of a GIF, of up to 255 bytes each
MAX_BOXES = 50_000  # of an MP4: a film in fragments of a second has eight a second
MAX_ELEMENTS = 200_000  # of a Matroska file: each frame is one
MAX_CHAINED = 64  # streams of an Ogg file: each starts its decoder anew, for 20 ms

_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # neither stuffing nor a restart
_BARE = {0x01, 0xD8, 0xD9, 0xFF}  # markers that nothing follows
_SCAN = 0xDA
# Boxes of an MP4 that hold others, as far as libav looks into them.
_HOLD = {
    *(b"moov", b"trak", b"mdia", b"minf", b"stbl", b"dinf", b"edts", b"udta", b"moof", b"traf"),
    *(b"mvex", b"mfra", b"ilst", b"tref", b"gmhd", b"wave", b"sinf", b"schi", b"iprp", b"ipco"),
}
# And those that have fields before the boxes in them, of a length that depends on much. They are
# small, so each counts for as many boxes as may be in it: one for every 8 bytes.
_MAY_HOLD = {b"stsd", b"dref", b"strf", b"vexu"}
_MASTERS = {
    b"\x18\x53\x80\x67",  # Segment
    b"\x1f\x43\xb6\x75",  # Cluster
    b"\x16\x54\xae\x6b",  # Tracks
    b"\xae",  # TrackEntry
    b"\x1c\x53\xbb\x6b",  # Cues
    b"\x12\x54\xc3\x67",  # Tags
    b"\x10\x43\xa7\x70",  # Chapters
    b"\x11\x4d\x9b\x74",  # SeekHead
    b"\xa0",  # BlockGroup
}

# Of a part at a place: where its body begins, where it ends, and what tells this of the parts in
# it, if it holds any; None where there is no part.
_Head = Callable[[bytes, int], "tuple[int, int, _Head | None] | None"]


def bound_image(data: bytes) -> None:
    """Refuse a picture that would take longer than its pixels explain; raises ``Refused``."""
    if data.startswith(b"\xff\xd8"):
        _bound_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _count(_walk(data, 8, _png_chunk), MAX_CHUNKS, "chunks")
    elif data.startswith(b"RIFF"):
        bound_riff(data)
    elif data.startswith(b"GIF8"):
        _count(_gif_blocks(data), MAX_BLOCKS, "blocks")
    elif data.startswith(b"BM") and data[30:31] in (b"\x01", b"\x02") and len(data) > MAX_RUNS:
        raise Refused(f"is run-length encoded, and has more than {MAX_RUNS} bytes; write it as PNG")


def bound_riff(data: bytes) -> None:
    """Refuse a WAV of too many chunks; raises ``Refused``."""
    _count(_walk(data, 12, _riff_chunk), MAX_CHUNKS, "chunks")


def bound_ogg(data: bytes) -> None:
    """Refuse an Ogg file of too many streams, beside or after each other; raises ``Refused``."""
    # Bit 1 of a page's fifth byte: a stream begins.
    _count(re.finditer(rb"OggS\x00[\x02\x03\x06\x07]", data), MAX_CHAINED, "streams")


def bound_mp4(data: bytes) -> None:
    """Refuse an MP4 or QuickTime file of too many boxes; raises ``Refused``."""
    _count(_walk(data, 0, _box), MAX_BOXES, "boxes")


def bound_matroska(data: bytes) -> None:
    """Refuse a Matroska or WebM file of too many elements; raises ``Refused``."""
    _count(_walk(data, 0, _element), MAX_ELEMENTS, "elements")


def _count(parts: Iterator[object], most: int, what: str) -> None:
    for number, _ in enumerate(parts):
        if number == most:
            raise Refused(f"has more than {most} {what}; write it anew with fewer")


def _bound_jpeg(data: bytes) -> None:
    scans = at = 0
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None:
            return
        at = found.end()
        marker = data[at - 1]
        if marker in _BARE:
            continue
        scans += marker == _SCAN
        if scans > MAX_SCANS:
            raise Refused(f"has more than {MAX_SCANS} scans; write it anew with fewer")
        at += max(2, int.from_bytes(data[at : at + 2]))
    raise Refused(f"has more than {MAX_SEGMENTS} segments; write it anew with fewer")


def _walk(data: bytes, at: int, head: _Head) -> Iterator[int]:
    """Every part of a file, in those that hold others too.

    A part that says it ends after the one that it is in ends with that, as libav has it: else a
    file could hide others behind it, or be counted twice.
    """
    within = [(len(data), head)]
    while within:
        last, head = within[-1]
        found = head(data, at) if at < last else None
        if found is None:
            at, _ = within.pop()
            continue
        yield at
        body, end, inner = found
        end = min(end, last)
        if inner is not None:
            within.append((end, inner))
        at = end if inner is None else body


def _png_chunk(data: bytes, at: int) -> tuple[int, int, None] | None:
    if at + 8 > len(data):
        return None
    return at + 8, at + 12 + int.from_bytes(data[at : at + 4]), None


def _riff_chunk(data: bytes, at: int) -> tuple[int, int, _Head | None] | None:
    if at + 8 > len(data):
        return None
    size = int.from_bytes(data[at + 4 : at + 8], "little")
    holds = data[at : at + 4] == b"LIST"
    return at + (12 if holds else 8), at + 8 + size + size % 2, _riff_chunk if holds else None


def _gif_blocks(data: bytes) -> Iterator[int]:
    at = 13 + _colours(data, 10)
    while at < len(data):
        yield at
        if data[at] == 0x21:  # an extension
            at += 2
        elif data[at] == 0x2C:  # a frame
            at += 10 + _colours(data, at + 9) + 1
        else:
            return
        while at < len(data) and data[at]:
            yield at
            at += 1 + data[at]
        at += 1


def _colours(data: bytes, at: int) -> int:
    flags = data[at] if at < len(data) else 0
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _box(data: bytes, at: int) -> tuple[int, int, _Head | None] | None:
    size, name = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
    body = at + 8
    if size == 1:
        size, body = int.from_bytes(data[body : body + 8]), body + 8
    end = at + size if size else len(data)
    if end < body or body > len(data):
        return None
    if name == b"meta":
        # Its first box is a handler, in MP4 behind 4 bytes and in QuickTime not; libav looks for it
        # anywhere.
        for first in (body, body + 4):
            if data[first + 4 : first + 8] == b"hdlr":
                return first, end, _box
        return body, end, _eight_bytes
    if name in _MAY_HOLD:
        return body, end, _eight_bytes
    return body, end, _box if name in _HOLD else None


def _eight_bytes(data: bytes, at: int) -> tuple[int, int, None]:
    return at + 8, at + 8, None


def _element(data: bytes, at: int) -> tuple[int, int, _Head | None] | None:
    size_at = at + _width(data[at], 4)
    if size_at >= len(data):
        return None
    body = size_at + _width(data[size_at], 8)
    most = (1 << 7 * (body - size_at)) - 1
    size = int.from_bytes(data[size_at:body]) & most
    # What is left open holds others, or else is damaged.
    end = len(data) if size == most else body + size
    return body, end, _element if size == most or data[at:size_at] in _MASTERS else None


def _width(first: int, most: int) -> int:
    """The bytes of a number that begins so; of one that is none, as few as there can be."""
    width = 9 - first.bit_length()
    return width if width <= most else 1
