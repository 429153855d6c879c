"""Films as bytes: what is written plays, what is read is what was written, hostile ones are not."""

from __future__ import annotations

import base64
from io import BytesIO

import av
import numpy as np
import pytest
from av.stream import Disposition

from backend.media import Refused
from backend.media import video as video_module
from backend.media.video import decode_video, encode_video
from tests.pictures import picture

FPS = (1, 7, 8, 12.5, 24000 / 1001, 25, 30, 60)


def film(count=9, width=64, height=48):
    """A smooth picture that goes by, a pixel a frame."""
    whole = np.asarray(picture(width + count, height))
    return np.stack([whole[:, at : at + width] for at in range(count)])


def grey(count=40, width=64, height=48):
    """Each frame as light as its number says."""
    levels = np.linspace(20, 235, count).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def written(frames, kind="webm", codec="libvpx-vp9", rate=25, **options):
    """A film by PyAV itself, not by what is tested."""
    file = BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def sound(kind="mp4", codec="aac", cover=False):
    file = BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=48000, layout="mono")
        if cover:
            picture = container.add_stream("png", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "rgb24"
            picture.disposition = Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame.from_ndarray(film(1)[0], format="rgb24")))
            container.mux(picture.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def read(data, max_frames=64, mime_type=None, claim=lambda pixels: None):
    return decode_video(data, max_frames=max_frames, mime_type=mime_type, claim=claim)


def off(one, other):
    """The mean difference of all channels of all pixels."""
    return np.abs(one.astype(int) - other.astype(int)).mean()


# What is written.


def test_a_film_is_written_as_browsers_play_it():
    media = encode_video(film(), 8)
    assert media.mime_type == "video/mp4"
    assert 0 < media.data.index(b"moov") < media.data.index(b"mdat")  # plays while it is fetched
    with av.open(BytesIO(media.data)) as container:
        [stream] = container.streams
        context = stream.codec_context
        assert (context.name, context.pix_fmt, context.profile) == ("h264", "yuv420p", "High")
        assert (stream.average_rate, stream.frames) == (8, 9)
        assert (context.colorspace, context.color_range) == (1, 1)  # BT.709, as said in the file
        times = [frame.time for frame in container.decode(stream)]
    assert times == [number / 8 for number in range(9)]


@pytest.mark.parametrize("fps", FPS)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_film_that_is_read_again_has_its_frames_and_its_rate(fps, count):
    frames = film(count)
    again = read(encode_video(frames, fps).data, mime_type="video/mp4")
    assert again["frames"].shape == frames.shape
    assert again["frames"].dtype == np.uint8
    assert again["fps"] == pytest.approx(fps, rel=1e-4)


@pytest.mark.parametrize(
    "colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50), (0, 0, 0), (255, 255, 255)]
)
def test_colours_come_back(colour):
    frames = np.full((3, 720, 64, 3), colour, np.uint8)
    again = read(encode_video(frames, 8).data)["frames"]
    assert np.abs(again.astype(int) - frames).max() <= 2


def test_nobody_sees_what_is_lost():
    frames = np.asarray(picture(256, 256).convert("L").convert("RGB"))[None].repeat(5, axis=0)
    assert off(read(encode_video(frames, 8).data)["frames"], frames) < 1


@pytest.mark.parametrize(("width", "height"), [(33, 48), (32, 47), (33, 47)])
def test_odd_sides_become_longer_by_their_last_pixel(width, height):
    frames = film(4, width, height)
    again = read(encode_video(frames, 8).data)["frames"]
    assert again.shape == (4, height + height % 2, width + width % 2, 3)
    assert off(again[:, :height, :width], frames) < 8
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    assert encode_video(even, 8).data == encode_video(frames, 8).data


def test_the_same_frames_are_always_the_same_film():
    """Whatever was in the memory that the codec is given."""
    frames, files = film(9), set()
    for number in range(40):
        written(grey(3, 64 + 2 * (number % 30)), "mp4", "libx264")
        files.add(encode_video(frames, 8).data)
    assert len(files) == 1


def test_the_codec_says_nothing(capfd):
    read(encode_video(film(), 8).data)
    with pytest.raises(Refused):
        read(encode_video(film(), 8).data[:-9])
    assert capfd.readouterr() == ("", "")


def test_a_long_films_index_fits_before_it():
    frames = np.random.default_rng(0).integers(0, 256, (900, 16, 16, 3), dtype=np.uint8)
    data = encode_video(frames, 60).data
    assert data.index(b"moov") < data.index(b"mdat")
    assert len(read(data, max_frames=1000)["frames"]) == 900


# What is read.


@pytest.mark.parametrize(
    ("kind", "codec", "label"),
    [
        ("webm", "libvpx-vp9", "video/webm"),
        ("webm", "libvpx", "video/webm"),
        ("matroska", "libx264", "video/x-matroska"),
        ("mp4", "libx264", "video/mp4"),
        ("mp4", "mpeg4", "video/mp4"),
        ("mp4", "libvpx-vp9", "application/octet-stream"),
        ("mov", "libx264", "video/quicktime"),
        ("mov", "mjpeg", None),
    ],
)
def test_films_of_many_kinds_are_read(kind, codec, label):
    frames = grey(12)
    again = read(written(frames, kind, codec), mime_type=label)
    assert again["fps"] == 25
    assert again["frames"].shape == frames.shape
    assert off(again["frames"], frames) < 4


def test_of_a_long_film_frames_are_kept_evenly():
    frames = grey(40)
    again = read(encode_video(frames, 10).data, max_frames=4)
    assert off(again["frames"], frames[[0, 13, 26, 39]]) < 2
    assert again["fps"] == 1  # they last as long as the film


def test_pixels_are_claimed_before_frames_are_kept(monkeypatch):
    claimed = []
    data = encode_video(film(20), 8).data
    read(data, max_frames=5, claim=claimed.append)
    assert claimed == [5 * 64 * 48]

    def refuse(pixels):
        raise Refused("is too much", too_large=True)

    monkeypatch.setattr(video_module, "_frames", None)  # not reached
    with pytest.raises(Refused, match="is too much"):
        read(data, claim=refuse)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_film_that_was_taken_sideways_is_read_upright(quarters):
    frames = film(3)
    level = written(frames, "mp4", "libx264")
    data = bytearray(level)
    # The matrix of the track's head says how it is turned: clockwise, in 16.16.
    a, b = {1: (0, 1), 2: (-1, 0), 3: (0, -1)}[quarters]
    at = data.index(b"tkhd") + 4 + 40
    for place, number in enumerate((a, b, 0, -b, a)):
        where = at + 4 * place
        data[where : where + 4] = (number << 16).to_bytes(4, signed=True)
    again = read(bytes(data))["frames"]
    assert np.array_equal(again, np.rot90(read(level)["frames"], -quarters, (1, 2)))


def test_a_film_that_was_sent_live_is_read():
    """As a browser's recorder writes it, its segment has no size and no duration."""
    frames = grey(12)
    file = BytesIO()
    with av.open(file, "w", format="webm", options={"live": "1"}) as container:
        stream = container.add_stream("libvpx", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert len(read(file.getvalue())["frames"]) == 12


# What is refused.

MP4 = encode_video(film(25), 25).data
KINDS = {
    "mp4": MP4,
    "mov": written(film(25), "mov", "libx264"),
    "webm": written(film(25), "webm", "libvpx-vp9"),
    "mkv": written(film(25), "matroska", "libx264"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [1, 12, 60, 0.1, 0.5, 0.9, 0.99, -1])
def test_a_film_that_is_cut_short_is_refused(kind, left):
    data = KINDS[kind]
    with pytest.raises(Refused, match=r"cut short|damaged|no film"):
        read(data[: int(left * len(data)) if isinstance(left, float) else left])


def with_a_box_of(size):
    """A film whose last box, of nothing, writes its length as ``size``."""
    return MP4 + size[:4] + b"free" + size[4:]


def test_a_film_may_say_its_lengths_in_every_way_the_format_has():
    frames = read(MP4)["frames"]
    ways = {
        "to the end": with_a_box_of(bytes(4)) + bytes(100),
        "in 8 bytes": with_a_box_of((1).to_bytes(4) + (116).to_bytes(8)) + bytes(100),
        "of nothing": with_a_box_of((8).to_bytes(4)),
    }
    for way, data in ways.items():
        assert np.array_equal(read(data)["frames"], frames), way
    webm = KINDS["webm"]
    at = webm.index(b"\x18\x53\x80\x67")
    void = b"\xec\x40\x64" + bytes(100)  # which may be anywhere
    again = read(webm[:at] + void + webm[at:])
    assert np.array_equal(again["frames"], read(webm)["frames"])


@pytest.mark.parametrize(
    "data",
    [
        with_a_box_of((7).to_bytes(4)),
        with_a_box_of((9).to_bytes(4)),
        with_a_box_of((1).to_bytes(4) + (15).to_bytes(8)),
        with_a_box_of((1).to_bytes(4) + (17).to_bytes(8)),
        with_a_box_of((1).to_bytes(4) + b"\xff" * 8),
        with_a_box_of((1).to_bytes(4)),
        MP4 + (8).to_bytes(4),
        b"\x1aE\xdf\xa3",
        b"\x1aE\xdf\xa3\xff" + KINDS["webm"],
        b"\x1aE\xdf\xa3\x80" + bytes(100),
        b"\x1aE\xdf\xa3\x80\x18\x53\x80\x67",
        b"\x1aE\xdf\xa3\x80\x18\x53\x80\x67\x10\x00",
    ],
)
def test_a_film_whose_parts_do_not_end_with_it_is_refused(data):
    with pytest.raises(Refused, match="damaged or cut short"):
        read(data)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_film_with_noise_in_it_comes_nothing_but_a_refusal_or_frames(kind):
    for seed in range(60):
        draw = np.random.default_rng(seed)
        data = np.frombuffer(KINDS[kind], np.uint8).copy()
        count = draw.integers(1, 30)
        data[draw.integers(0, len(data), count)] = draw.integers(0, 256, count)
        try:
            again = read(data.tobytes())
        except Refused:
            continue
        assert again["frames"].ndim == 4


def test_what_a_decoder_guesses_is_refused():
    """Of 60 films with one bad byte, two happen to mean another film; none has fewer frames."""
    film = encode_video(grey(25), 25).data
    refused = 0
    for seed in range(60):
        data = bytearray(film)
        data[np.random.default_rng(seed).integers(film.index(b"mdat") + 700, len(data))] ^= 0xFF
        try:
            assert len(read(bytes(data))["frames"]) == 25
        except Refused:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("without", range(50, 1500, 50))
def test_an_mp4_whose_frames_lie_outside_it_is_refused(without):
    data = MP4[:-without]
    at = data.index(b"mdat") - 4
    whole = data[:at] + (len(data) - at).to_bytes(4) + data[at + 4 :]  # its boxes agree
    with pytest.raises(Refused, match="damaged or cut short"):
        read(whole)


def test_frames_that_an_edit_cuts_away_are_not_read():
    frames = grey(25)
    data = bytearray(written(frames, "mp4", "libx264"))
    at = data.index(b"elst") + 16
    assert int.from_bytes(data[at : at + 4]) == 1024
    data[at : at + 4] = (1024 + 5 * 512).to_bytes(4)  # five frames later
    again = read(bytes(data))["frames"]
    assert len(again) == 20
    assert off(again, frames[5:]) < 3


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"once upon a time there was a film", "no film of a kind"),
        (base64.b64encode(MP4), "no film of a kind"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "no film of a kind"),
        (b"\x00\x00\x00\x18ftypmp42" + bytes(12), "is damaged"),
        (b"\x1aE\xdf\xa3" + bytes(40), "is damaged"),
        (sound(), "no film in it"),
        (sound("webm", "libopus"), "no film in it"),
        (written(film(2), "mp4", "libx264").replace(b"avc1", b"zzzz"), "codec that is not read"),
        (written(film(2), "matroska", "ffv1"), "codec that is not read"),
        (sound(cover=True), "no film in it"),
    ],
)
def test_what_is_no_film_is_refused(data, told):
    with pytest.raises(Refused, match=told):
        read(data)


@pytest.mark.parametrize(
    ("kind", "label"), [("mp4", "video/webm"), ("webm", "video/mp4"), ("mp4", "image/png")]
)
def test_a_label_that_contradicts_the_film_is_refused(kind, label):
    with pytest.raises(Refused, match=f"its label says {label}"):
        read(KINDS[kind], mime_type=label)


def test_frames_that_are_too_large_are_refused_before_they_are_decoded(monkeypatch):
    data = written(np.zeros((2, 2312, 4096, 3), np.uint8), "mp4", "libx264", preset="ultrafast")
    monkeypatch.setattr(video_module, "_frames", None)  # not reached
    with pytest.raises(Refused, match="4096 x 2312") as refused:
        read(data)
    assert refused.value.too_large
    assert len(data) < 100_000


def test_a_head_that_tells_of_smaller_frames_does_not_help():
    """The size in the container is a small one, that in the codec's own data is not."""
    data = bytearray(written(np.zeros((2, 2312, 4096, 3), np.uint8), "mp4", "libx264"))
    at = data.index(b"avc1", data.index(b"stsd")) + 28
    assert int.from_bytes(data[at : at + 2]) == 4096
    data[at : at + 4] = (64).to_bytes(2) + (48).to_bytes(2)
    with pytest.raises(Refused):
        read(bytes(data))


def test_a_film_of_too_many_frames_is_refused(monkeypatch):
    monkeypatch.setattr(video_module, "MAX_FILM_FRAMES", 24)
    with pytest.raises(Refused, match="more than 24 frames of 64 x 48") as refused:
        read(MP4)
    assert refused.value.too_large


def test_a_film_of_too_many_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(video_module, "MAX_FILM_PIXELS", 10 * 64 * 48)
    with pytest.raises(Refused, match="more than 10 frames of 64 x 48") as refused:
        read(MP4, max_frames=2)
    assert refused.value.too_large


@pytest.mark.parametrize(
    ("size", "told"),
    [
        pytest.param((128, 96), "changes the size", id="seen once it is decoded"),
        pytest.param((4096, 2312), "damaged", id="so large that it is not decoded"),
    ],
)
def test_frames_that_change_their_size_are_refused(size, told):
    """A second film's packets in the first one's track."""
    file = BytesIO()
    quick = {"deadline": "realtime", "cpu-used": "8"}
    films = [written(grey(2, *one), "matroska", "libvpx", **quick) for one in ((64, 48), size)]
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libvpx", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        number = 0
        for one in films:
            with av.open(BytesIO(one)) as source:
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts = packet.dts = 40 * number
                        packet.stream = stream
                        container.mux(packet)
                        number += 1
    with pytest.raises(Refused, match=told):
        read(file.getvalue())
