"""Files of boxes and elements: whether one ends before it says it does.

libav reads what is there of a file that was cut short and says nothing; a caller wants to know.
"""

from __future__ import annotations

_SEGMENT = b"\x18\x53\x80\x67"
_MOST_BEFORE_THE_SEGMENT = 16  # a head, and room that was left; a hostile file has millions


def mp4_cut_short(data: bytes) -> bool:
    """Whether an MP4's or a QuickTime film's last box ends anywhere but where the data do."""
    at = 0
    while at + 8 <= len(data):
        size, head = int.from_bytes(data[at : at + 4]), 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16]), 16
        elif size == 0:  # to the end, wherever that is
            return False
        if size < head:
            return True
        at += size
    return at != len(data)


def matroska_cut_short(data: bytes) -> bool:
    """Whether the segment of a Matroska or WebM file ends after the data do.

    A recorder that was never told the end leaves the size open; such a file never is.
    """
    at = 0
    for _ in range(_MOST_BEFORE_THE_SEGMENT):
        name = data[at : at + 4]
        _, at = _number(data, at)
        size, at = _number(data, at)
        if name == _SEGMENT:
            return at + (size or 0) > len(data)
        if size is None:
            break
        at += size
    return True


def _number(data: bytes, at: int) -> tuple[int | None, int]:
    """The number that is written at a place, None if it is left open, and the place after it."""
    width = 9 - data[at].bit_length() if at < len(data) else 9
    if width > 8:  # there is no such number
        return None, len(data) + 1
    most = (1 << 7 * width) - 1
    number = int.from_bytes(data[at : at + width]) & most
    return None if number == most else number, at + width
