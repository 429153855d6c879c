"""Small files that ask for much work: each repeats what costs a decoder time."""

from __future__ import annotations

import io
import struct
import zlib

import av
import numpy as np
from PIL import Image


def _bits(text):
    """Entropy-coded bits of a JPEG, padded with ones and with stuffing."""
    text += "1" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8).replace(b"\xff", b"\xff\0")


def jpeg_of_scans(scans, width=64, height=64):
    """A progressive JPEG of so many empty scans, each of which goes through the whole picture."""
    blocks = ((width + 7) // 8) * ((height + 7) // 8)
    data = b"\xff\xd8\xff\xdb" + struct.pack(">H", 67) + b"\0" + b"\x01" * 64
    data += b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\0"
    # One code of one bit in each table: for DC the symbol 0, for AC the end of 2^14 blocks.
    for table, symbol in ((b"\x00", b"\x00"), (b"\x10", b"\xe0")):
        data += b"\xff\xc4" + struct.pack(">H", 20) + table + bytes([1] + [0] * 15) + symbol
    data += b"\xff\xda" + struct.pack(">HB", 8, 1) + b"\x01\x00" + b"\0\0\0" + _bits("0" * blocks)
    runs, left = "", blocks
    while left > 0:
        run = max(0, min(left, 32767) - 16384)
        runs, left = f"{runs}0{run:014b}", left - 16384 - run
    scan = b"\xff\xda" + struct.pack(">HB", 8, 1) + b"\x01\x00" + b"\x01\x3f\x00" + _bits(runs)
    return data + scan * scans + b"\xff\xd9"


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of_chunks(count):
    head = struct.pack(">IIBBBBB", 10, 10, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(31 * 10))
    chunks = png_chunk(b"tEXt", b"a\0b") * count
    end = png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + chunks + end


def gif_of_blocks(count, colours=b""):
    """A GIF with so many blocks before its frame, or behind one that has colours of its own."""
    file = io.BytesIO()
    Image.new("RGB", (10, 10)).save(file, "GIF")
    data = file.getvalue()
    at = data.index(b"\x2c")
    frame = b"\x2c" + bytes(8) + bytes([0x80]) + colours + b"\x02\0" if colours else b""
    return data[:at] + frame + b"\x21\xfe" + b"\x01c" * count + b"\0" + data[at:]


def jpeg_of_segments(count):
    file = io.BytesIO()
    Image.new("RGB", (10, 10)).save(file, "JPEG")
    data = file.getvalue()
    return data[:2] + b"\xff\xe9\0\2" * count + data[2:]


def webp_of_chunks(count):
    file = io.BytesIO()
    Image.new("RGB", (10, 10)).save(file, "WEBP")
    data = file.getvalue()[12:] + b"junk\0\0\0\0" * count
    return b"RIFF" + struct.pack("<I", 4 + len(data)) + b"WEBP" + data


def wav_of_chunks(count, listed=False):
    samples = bytes(1000)
    form = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
    junk = b"junk\0\0\0\0" * count
    if listed:
        junk = b"LIST" + struct.pack("<I", 4 + len(junk)) + b"INFO" + junk
    chunks = form + junk + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def sound(codec, format_, rate=16_000, seconds=1.0, layout="mono", **options):
    """Silence, which takes little room however long it is."""
    file = io.BytesIO()
    with av.open(file, "w", format=format_) as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        stream.options = options
        stream.codec_context.format = av.AudioFormat("flt" if codec == "libopus" else "s16")
        left, channels = int(rate * seconds), stream.codec_context.layout.nb_channels
        while left > 0:
            block = np.zeros((1, min(left, rate) * channels), np.int16)
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout=layout)
            frame.sample_rate = rate
            out.mux(stream.encode(frame))
            left -= rate
        out.mux(stream.encode(None))
    return file.getvalue()


def ogg_of_chains(count):
    return sound("libopus", "ogg", 48_000, 0.1) * count


MP4 = struct.pack(">I", 16) + b"ftypisom\0\0\0\0"
HANDLER = struct.pack(">I", 33) + b"hdlr" + bytes(25)


def mp4_of_boxes(count, name=b"", before=b""):
    """A film of so many boxes, in one of that name behind some other bytes."""
    boxes = before + b"\0\0\0\x08free" * count
    return MP4 + (struct.pack(">I", 8 + len(boxes)) + name if name else b"") + boxes


def mp4_with_boxes_hidden(count):
    """Behind one that says it goes on beyond the box that it is in."""
    lies = struct.pack(">I", 16) + b"moov" + struct.pack(">I", 2**31 - 1) + b"free"
    return MP4 + lies + b"\0\0\0\x08free" * count


def wav_with_chunks_hidden(count):
    """Behind one that says it goes on beyond the list that it is in."""
    data = wav_of_chunks(count)
    lies = b"LIST" + struct.pack("<I", 12) + b"INFOINAM" + struct.pack("<I", 2**31 - 1)
    return data[:12] + lies + data[12:]


def bmp_of_runs(count):
    head = struct.pack("<IiiHHIIiiII", 40, 1000, 1000, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 1078) + head + bytes(1024) + b"\x01\0" * count


def webm_of_elements(count, hidden=False):
    voids = b"\xec\x80" * count
    if hidden:  # behind one that says it goes on beyond the cluster that it is in
        voids = b"\x1f\x43\xb6\x75\x82\xec\x88" + voids
    return (
        b"\x1aE\xdf\xa3\x87\x42\x82\x84webm\x18\x53\x80\x67\x10" + struct.pack(">I", len(voids))[1:]
    ) + voids
