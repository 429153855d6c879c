"""What decoding a file may cost, bounded before any of it is spent.

A file of a few kilobytes can ask for hours: a JPEG whose every scan goes through the whole picture,
an MP4 of millions of empty boxes. What such files repeat is counted here, by steps that are as few
as the bound. Encoders stay far below all of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from backend.media import Refused

MAX_SCANS = 100  # of a JPEG: encoders make 10 or so; of 32 megapixels, each takes 20 ms
MAX_SEGMENTS = 10_000  # of a JPEG
MAX_CHUNKS = 65_536  # of a PNG, a WebP or a WAV: libpng's own have 8 KiB, so 512 MiB
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
_FULL = {b"meta", b"dref", b"stsd"}  # and those with a head of their own before them
_FULL_HEAD = 8
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


def bound_image(data: bytes) -> None:
    """Refuse a picture that would take longer than its pixels explain; raises ``Refused``."""
    if data.startswith(b"\xff\xd8"):
        _bound_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _count(_chunks(data, 8, "big", 4), MAX_CHUNKS, "chunks")
    elif data.startswith(b"RIFF"):
        bound_riff(data)
    elif data.startswith(b"GIF8"):
        _count(_gif_blocks(data), MAX_BLOCKS, "blocks")


def bound_riff(data: bytes) -> None:
    """Refuse a WAV of too many chunks; raises ``Refused``."""
    _count(_chunks(data, 12, "little", 0), MAX_CHUNKS, "chunks")


def bound_ogg(data: bytes) -> None:
    """Refuse an Ogg file of too many streams, beside or after each other; raises ``Refused``."""
    # Bit 1 of a page's fifth byte: a stream begins.
    _count(re.finditer(rb"OggS\x00[\x02\x03\x06\x07]", data), MAX_CHAINED, "streams")


def bound_mp4(data: bytes) -> None:
    """Refuse an MP4 or QuickTime file of too many boxes; raises ``Refused``."""
    _count(_boxes(data), MAX_BOXES, "boxes")


def bound_matroska(data: bytes) -> None:
    """Refuse a Matroska or WebM file of too many elements; raises ``Refused``."""
    _count(_elements(data), MAX_ELEMENTS, "elements")


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


def _chunks(data: bytes, at: int, order: str, after: int) -> Iterator[int]:
    """Chunks of a PNG (size, name, ``after`` bytes of checksum) or a RIFF file (name, size)."""
    while at + 8 <= len(data):
        yield at
        if order == "big":
            at += 8 + int.from_bytes(data[at : at + 4]) + after
        else:
            size = int.from_bytes(data[at + 4 : at + 8], "little")
            # The list that the others may be in is gone through, not passed over.
            at += 12 if data[at : at + 4] == b"LIST" else 8 + size + size % 2


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


def _boxes(data: bytes) -> Iterator[int]:
    """Every box, in those that hold others too: a walk, for boxes may not be nested evenly."""
    at = 0
    while at + 8 <= len(data):
        yield at
        size, name = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        head = 16 if size == 1 else 8
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16])
        if name in _HOLD:
            at += head
        elif name in _FULL:
            at += head + _FULL_HEAD
        elif size < head:  # to the end, or damaged
            return
        else:
            at += size


def _elements(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        yield at
        name_end = at + _width(data[at], 4)
        name = data[at:name_end]
        if name_end >= len(data):
            return
        end = name_end + _width(data[name_end], 8)
        most = (1 << 7 * (end - name_end)) - 1
        size = int.from_bytes(data[name_end:end]) & most
        # What is left open holds others, or else is damaged.
        at = end if name in _MASTERS or size == most else end + size


def _width(first: int, most: int) -> int:
    """The bytes of a number that begins so; of one that is none, as few as there can be."""
    width = 9 - first.bit_length()
    return width if width <= most else 1
