"""Films: bytes to frames, checked by content, and frames to bytes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from fractions import Fraction
from io import BytesIO
from typing import Any

import numpy as np

from backend.cores import all_cores
from backend.media import NO_MEMORY, Media, Refused
from backend.media.bounds import bound_matroska, bound_mp4
from backend.media.containers import matroska_cut_short, mp4_cut_short

logger = logging.getLogger("crane.media")

# What is written: the option `format`, and its media type.
VIDEO_FORMATS = {"mp4": "video/mp4"}

# What is read: the demuxer that is told from the first bytes, and what the film may be called.
_LABELS = {
    "mp4": ("video/mp4", "video/quicktime", "video/x-m4v"),
    "matroska": ("video/webm", "video/x-matroska", "video/matroska"),
}
_BOUND = {"mp4": bound_mp4, "matroska": bound_matroska}
_CUT_SHORT = {"mp4": mp4_cut_short, "matroska": matroska_cut_short}
# The boxes that an MP4 or QuickTime film may begin with.
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
# Fewer codecs are fewer parsers for a hostile file to meet.
_CODECS = ("h264", "hevc", "vp8", "vp9", "libdav1d", "av1", "mpeg4", "mjpeg", "prores")

# A decoder keeps up to 17 frames, whatever we keep; and every frame up to the last is decoded.
MAX_FRAME_PIXELS = 4096 * 2304
MAX_FILM_FRAMES = 10_000
MAX_FILM_PIXELS = 2**31  # half a minute of 1920 x 1080; some seconds of work

_BT709 = 1  # what browsers take a film for that does not say, at least from 720 lines on


@all_cores()
def encode_video(frames: np.ndarray, fps: float, check: Callable[[], None] = lambda: None) -> Media:
    """Write frames ``(n, height, width, 3)`` as an MP4 that browsers play, ``fps`` a second.

    ``check`` is called before each frame, and may raise.

    H.264 in yuv420p has even sides: an odd one is made longer by a pixel, its last one again.
    """
    import av

    count, height, width = frames.shape[:3]
    odd = ((0, height % 2), (0, width % 2), (0, 0))
    file = BytesIO()
    # The index before the film, so that it plays while it is fetched. `+faststart` would have to
    # open the file once more by its name, and this one has none: room is kept for it instead.
    room = {"moov_size": str(4096 + 64 * count)}
    with av.open(file, "w", format="mp4", options=room) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        # x264's mbtree reads a little past narrow frames: a film then differs from time to time.
        stream.options = {"crf": "18", "preset": "veryfast", "x264-params": "mbtree=0"}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = 1  # of television, as films have it
        for pixels in frames:
            check()
            if height % 2 or width % 2:
                pixels = np.pad(pixels, odd, mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Media(VIDEO_FORMATS["mp4"], file.getvalue())


@all_cores()
def decode_video(
    data: bytes, *, max_frames: int, mime_type: str | None, claim: Callable[[int], None]
) -> dict[str, Any]:
    """The frames of a film, upright as its metadata say: ``{"frames", "fps"}``.

    ``frames`` are uint8 ``(n, height, width, 3)``; of more than ``max_frames``, that many are
    kept, evenly spaced, the first and the last among them, and ``fps`` is the rate at which these
    last as long as the film. ``mime_type`` is what the caller says it is, if anything; ``claim``
    is asked for the pixels of all frames before any is kept. Raises ``Refused``.
    """
    kind = _kind(data)
    if mime_type not in (None, "application/octet-stream", *_LABELS[kind]):
        raise Refused(f"is {_LABELS[kind][0]}, and its label says {mime_type}")
    _BOUND[kind](data)
    if _CUT_SHORT[kind](data):
        raise Refused("is damaged or cut short")
    try:
        packets, width, height, fps = _survey(data, kind)
    except Refused:
        raise
    except MemoryError:
        raise Refused(NO_MEMORY) from None
    except Exception:  # a parser may stumble over a hostile file in any way
        logger.debug("a film's packets", exc_info=True)
        raise Refused("is damaged: what it is made of cannot be read") from None
    count = min(packets, max_frames)
    claim(count * width * height)
    kept = np.linspace(0, packets - 1, count).round().astype(int)
    try:
        frames = _frames(data, kind, set(kept.tolist()), (width, height))
    except Refused:
        raise
    except MemoryError:
        raise Refused(NO_MEMORY) from None
    except Exception:
        logger.debug("a film's frames", exc_info=True)
        raise Refused("is damaged or cut short") from None
    return {"frames": frames, "fps": fps * count / packets}


def _kind(data: bytes) -> str:
    if data[4:8] in _BOXES:
        return "mp4"
    if data.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    raise Refused("is no film of a kind that is read here: MP4, QuickTime, WebM, Matroska")


def _open(data: bytes, kind: str) -> Any:
    """The file, read by one demuxer, neither of which opens anything else."""
    import av

    return av.open(
        BytesIO(data),
        format=kind,
        options={
            "codec_whitelist": ",".join(_CODECS),
            "max_pixels": str(MAX_FRAME_PIXELS),  # looking for the streams' kinds decodes some
            "threads": "1",
        },
    )


def _stream(container: Any) -> Any:
    """The film among a file's streams; a song's cover is none."""
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise Refused("has no film in it")
    return streams[0]


def _survey(data: bytes, kind: str) -> tuple[int, int, int, float]:
    """How many frames a film has, how wide and high they are, and how many make a second.

    Nothing is decoded for it. Raises ``Refused`` for a film that is not whole, or too large.
    """
    with _open(data, kind) as container:
        stream = _stream(container)
        context = stream.codec_context
        if context is None or context.name not in _CODECS:
            raise Refused("has a codec that is not read here; H.264 in MP4 or VP9 in WebM is")
        width, height = context.width, context.height
        if not width or not height:
            raise Refused("is damaged: it does not say how large its frames are")
        _check_size(1, width, height)
        held = packets = 0
        for packet in container.demux(stream):
            held += bool(packet.size)
            packets += bool(packet.size) and not packet.is_discard  # which an edit cuts away
            _check_size(held, width, height)
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        if not packets:
            raise Refused("is damaged or cut short")
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise Refused("does not say how many frames make a second")
    return packets, width, height, fps


def _check_size(frames: int, width: int, height: int) -> None:
    if width * height > MAX_FRAME_PIXELS:
        size = f"is {width} x {height} pixels"
        raise Refused(f"{size}; at most {MAX_FRAME_PIXELS} a frame are read", too_large=True)
    if frames > MAX_FILM_FRAMES or frames * width * height > MAX_FILM_PIXELS:
        most = min(MAX_FILM_FRAMES, MAX_FILM_PIXELS // (width * height))
        what = f"more than {most} frames of {width} x {height} pixels"
        raise Refused(f"has {what}, the most that are read of that size", too_large=True)


def _frames(data: bytes, kind: str, kept: set[int], size: tuple[int, int]) -> np.ndarray:
    frames = []
    with _open(data, kind) as container:
        stream = _stream(container)
        context = stream.codec_context
        context.options = {"max_pixels": str(MAX_FRAME_PIXELS), "threads": "1"}
        for number, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise Refused("is damaged or cut short")
            if (frame.width, frame.height) != size:
                raise Refused("changes the size of its frames")
            if number in kept:
                pixels = frame.to_ndarray(format="rgb24")
                frames.append(np.rot90(pixels, round(frame.rotation / 90)))
    if len(frames) < len(kept):
        raise Refused("is damaged or cut short")
    return np.stack(frames)
