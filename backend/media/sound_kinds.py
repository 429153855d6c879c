"""Kinds of sound files: told by their first bytes, and whether a file ends before it should."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from backend.media.bounds import bound_matroska, bound_mp4, bound_ogg, bound_riff
from backend.media.containers import matroska_cut_short, mp4_cut_short

_UNKNOWN_LENGTH = 0x7F000000  # and above: what programs write into a WAV's head before they know


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file: libav's demuxer, its media type, and the other names it goes by."""

    demuxer: str
    mime_type: str
    names: frozenset[str]
    cut_short: Callable[[bytes], bool]
    # Whether libav has the length from the file, and not from its first frames' bit rate.
    tells_length: bool = True
    # Refuses one that repeats what costs time more often than files do.
    bound: Callable[[bytes], None] = lambda data: None

    def is_called(self, mime_type: str) -> bool:
        return mime_type in self.names | {self.mime_type, "application/octet-stream"}


def find_kind(data: bytes) -> Kind | None:
    """The kind of a file by its content, or None where it is none that is read here."""
    head = data[_start(data) :][:16]
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return WAV
    if head[:4] == b"fLaC":
        return FLAC
    if head[:4] == b"OggS":
        return OGG
    if head[:4] == b"\x1aE\xdf\xa3":
        return WEBM
    if head[4:8] == b"ftyp":
        return MP4
    if len(head) >= 4 and head[0] == 0xFF:
        if head[1] & 0xF6 == 0xF0:
            return AAC
        if head[1] & 0xE6 == 0xE2:  # eleven bits of sync, and layer III
            return MP3
    return None


def _start(data: bytes) -> int:
    """Where the sound begins: after an ID3v2 tag, if there is one."""
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    size = 0
    for byte in data[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size + (10 if data[5] & 0x10 else 0)


def _wav_cut_short(data: bytes) -> bool:
    at = 12
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name == b"data":
            return at + 8 + size > len(data) and size < _UNKNOWN_LENGTH
        at += 8 + size + size % 2
    return True


def _mp3_cut_short(data: bytes) -> bool:
    """By the count of bytes in a Xing or Info header, where there is one."""
    start = _start(data)
    found = re.search(rb"Xing|Info", data[start : start + 64])
    if found is None:
        return False
    at = start + found.end()
    flags = int.from_bytes(data[at : at + 4], "big")
    if not flags & 2:
        return False
    at += 8 if flags & 1 else 4
    return int.from_bytes(data[at : at + 4], "big") > len(data) - start


def _aac_cut_short(data: bytes) -> bool:
    at = _start(data)
    while at + 7 <= len(data) and data[at] == 0xFF and data[at + 1] & 0xF6 == 0xF0:
        size = (data[at + 3] & 3) << 11 | data[at + 4] << 3 | data[at + 5] >> 5
        at += max(size, 7)
    return at > len(data)


def _ogg_cut_short(data: bytes) -> bool:
    at = data.rfind(b"OggS")
    table = data[at + 27 :][: data[at + 26]] if at + 27 <= len(data) else b""
    return at + 27 > len(data) or at + 27 + data[at + 26] + sum(table) > len(data)


def _never(data: bytes) -> bool:
    return False  # its frames are counted: see decode_audio


WAV = Kind(
    "wav",
    "audio/wav",
    frozenset(("audio/x-wav", "audio/wave", "audio/vnd.wave", "audio/x-pn-wav")),
    _wav_cut_short,
    bound=bound_riff,
    tells_length=False,  # a recorder's guess, see _UNKNOWN_LENGTH; what is there is short enough
)
MP3 = Kind(
    "mp3",
    "audio/mpeg",
    frozenset(("audio/mp3", "audio/x-mp3", "audio/mpeg3", "audio/x-mpeg", "audio/x-mpeg-3")),
    _mp3_cut_short,
    tells_length=False,
)
FLAC = Kind("flac", "audio/flac", frozenset(("audio/x-flac",)), _never)
OGG = Kind(
    "ogg",
    "audio/ogg",
    frozenset(("application/ogg", "video/ogg", "audio/opus", "audio/vorbis", "audio/x-ogg")),
    _ogg_cut_short,
    bound=bound_ogg,
)
MP4 = Kind(
    "mp4",
    "audio/mp4",
    frozenset(
        ("audio/m4a", "audio/x-m4a", "audio/aac", "audio/mp4a-latm", "video/mp4", "video/quicktime")
    ),
    mp4_cut_short,
    bound=bound_mp4,
)
AAC = Kind(
    "aac",
    "audio/aac",
    frozenset(("audio/aacp", "audio/x-aac", "audio/x-hx-aac-adts", "audio/m4a", "audio/x-m4a")),
    _aac_cut_short,
    tells_length=False,
)
WEBM = Kind(
    "matroska",
    "audio/webm",
    frozenset(("video/webm", "audio/x-matroska", "video/x-matroska", "audio/matroska")),
    matroska_cut_short,
    bound=bound_matroska,
)
