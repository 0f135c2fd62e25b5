"""Time is time, up is up, and the film is the film: what a player shows is what a record holds."""

import struct

import numpy as np
import pytest

from saber_jax.data import decode
from saber_jax.data.decode import FrameSampling, MediaError, decode_clip
from saber_jax.data.timeline import Timeline
from tests.media_files import copy_packets, gray_frames, tone, write_clip

TEN = FrameSampling(fps=10, min_pixels=84 * 84, max_pixels=84 * 84)
LOSSY = {"codecs": ("libx264", "aac"), "pixels": "yuv420p", "rate": 48_000}
FLASH = 3.0


def flashing(count: int, first: int) -> np.ndarray:
    """Black frames, white from number `first` on."""
    return (
        np.repeat(np.where(np.arange(count) < first, 0, 255), 84 * 84 * 3)
        .astype(np.uint8)
        .reshape(count, 84, 84, 3)
    )


def beeping(seconds: float, at: float) -> np.ndarray:
    sound = tone(seconds)
    sound[: int(at * 16_000)] = 0
    return sound


def flash_and_beep(clip: decode.DecodedClip) -> tuple[float, float]:
    """Seconds on the clip's own clock."""
    white = np.flatnonzero(clip.frames.mean(axis=(1, 2, 3)) > 128)[0]
    loud = np.flatnonzero(np.abs(clip.audio.astype(int)) > 2000)[0]
    return white * clip.seconds_per_grid / 2, loud / 16_000


UNEVEN = [0, 1, 2, *(3 + i / 10 for i in range(30))]
VARIABLE = [("a.mp4", LOSSY), ("a.mkv", LOSSY), ("a.mov", LOSSY), ("a.flv", LOSSY), ("a.ts", LOSSY)]


@pytest.mark.parametrize(("name", "settings"), VARIABLE)
def test_a_frame_of_variable_rate_stands_where_its_timestamp_says(tmp_path, name, settings):
    settings = settings | ({"rate": 44_100} if name.endswith("flv") else {})
    path = write_clip(
        tmp_path / name,
        frames=flashing(33, 3),
        audio=beeping(6, FLASH),
        times=UNEVEN,
        **settings,
    )
    clip = decode_clip(path, TEN)
    flash, beep = flash_and_beep(clip)
    assert flash == pytest.approx(FLASH, abs=0.06) and beep == pytest.approx(FLASH, abs=0.03)
    assert len(clip.frames) * clip.seconds_per_grid / 2 == pytest.approx(6.0, abs=0.1)
    assert clip.info["sampled_by"] == "time" and not clip.info["even"]


def test_a_last_frame_of_unknown_length_is_shown_for_as_long_as_most_others():
    track = Timeline(video=0, times=[], hidden=False, last=0.0, average=None, nominal=None)
    assert track.of(UNEVEN).seconds == pytest.approx(6.0)


def test_the_release_mode_counts_frames_and_the_record_says_so(tmp_path):
    frames = flashing(33, 3)
    path = write_clip(tmp_path / "a.mkv", frames=frames, audio=tone(6), times=UNEVEN)
    clip = decode_clip(path, decode.release_sampling())
    kept = np.round(np.linspace(0, 32, len(clip.frames))).astype(int)
    white = clip.frames.mean(axis=(1, 2, 3)) > 128
    np.testing.assert_array_equal(white, frames[kept].mean(axis=(1, 2, 3)) > 128)
    assert clip.info["sampled_by"] == "number"


@pytest.mark.parametrize("last", [1.0, 0.5])
def test_few_frames_are_shown_for_as_long_as_they_last(tmp_path, last):
    times = [0.0, 2.0, 2.0 + last]
    path = write_clip(
        tmp_path / "a.mp4", frames=gray_frames(3), audio=tone(3), times=times, **LOSSY
    )
    clip = decode_clip(path, TEN)
    levels = clip.frames.mean(axis=(1, 2, 3)).round()
    np.testing.assert_allclose(levels[:20], 0, atol=2)
    np.testing.assert_allclose(levels[20 : 20 + int(10 * last)], 5, atol=2)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.mov"])
@pytest.mark.parametrize("length", [0.1, 2.0])
def test_a_hole_in_the_sound_stays_a_hole(tmp_path, name, length):
    settings = {} if name == "a.mkv" else LOSSY | {"pixels": "yuv420p"}
    path = write_clip(
        tmp_path / name,
        frames=gray_frames(60),
        audio=beeping(4, 2.0),
        fps=10,
        hole=(1.0, length),
        **settings,
    )
    clip = decode_clip(path, TEN)
    beep = np.flatnonzero(np.abs(clip.audio.astype(int)) > 2000)[0] / 16_000
    assert beep == pytest.approx(2.0 + length, abs=0.03)
    assert clip.info["sound_holes"] == 1
    assert decode_clip(path, decode.release_sampling()).audio.size < 4.1 * 16_000


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mov", "cut.mkv"])
def test_what_a_lossless_trim_cuts_off_is_neither_seen_nor_heard(tmp_path, name):
    whole = write_clip(
        tmp_path / "whole.mp4", frames=flashing(60, 50), audio=beeping(6, 5), fps=10, **LOSSY
    )
    path = copy_packets(whole, tmp_path / name, shift=-2.0)
    clip = decode_clip(path, TEN)
    assert clip.frames.shape[0] == 40 and clip.seconds_per_grid == pytest.approx(0.2)
    assert len(clip.audio) == pytest.approx(4 * 16_000, abs=800)
    assert flash_and_beep(clip) == (pytest.approx(3.0, abs=0.06), pytest.approx(3.0, abs=0.03))


def test_a_recording_cut_before_a_key_frame_begins_at_the_first_frame_that_decodes(tmp_path):
    whole = write_clip(
        tmp_path / "whole.ts",
        frames=flashing(100, 75),
        audio=beeping(4, FLASH),
        fps=25,
        codecs=("mpeg2video", "aac"),
        pixels="yuv420p",
        rate=48_000,
    )
    cut = copy_packets(whole, tmp_path / "cut.ts", shift=0, skip=5)
    clip = decode_clip(cut, TEN)
    flash, beep = flash_and_beep(clip)
    # Key frames are twelve frames apart, so seven more are lost.
    assert clip.info["start_lost"] == pytest.approx(7 / 25, abs=0.01)
    assert flash == pytest.approx(FLASH - 12 / 25, abs=0.06)
    assert beep == pytest.approx(FLASH - 12 / 25, abs=0.03)
    assert decode_clip(whole, TEN).info["start_lost"] == 0


@pytest.mark.parametrize("name", ["late.mkv", "late.mp4", "late.ts", "late.flv"])
def test_a_file_that_starts_late_is_a_whole_clip(tmp_path, name):
    rate = {"rate": 44_100} if name.endswith("flv") else {}
    whole = write_clip(
        tmp_path / "whole.mp4",
        frames=flashing(60, 30),
        audio=beeping(6, FLASH),
        fps=10,
        **(LOSSY | rate),
    )
    clip = decode_clip(copy_packets(whole, tmp_path / name, shift=600.0), TEN)
    assert clip.frames.shape[0] == 60
    assert flash_and_beep(clip) == (pytest.approx(FLASH, abs=0.06), pytest.approx(FLASH, abs=0.03))


def test_pictures_of_an_avi_that_stamps_in_order_of_decoding_keep_their_order(tmp_path):
    settings = LOSSY | {"codecs": ("libx264", "libmp3lame")}
    path = write_clip(tmp_path / "a.avi", frames=gray_frames(50), audio=tone(5), fps=10, **settings)
    levels = decode_clip(path, TEN).frames.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(levels, 5 * np.arange(50), atol=4)


def test_two_files_put_together_are_one_clip(tmp_path):
    settings = {"codecs": ("mpeg1video", "mp2"), "pixels": "yuv420p"}
    parts = [
        write_clip(
            tmp_path / f"{rate}.mpg",
            frames=flashing(75, 75 - 75 * part),
            audio=beeping(3, 3 - 3 * part)[: 3 * 16_000],
            fps=25,
            rate=rate,
            **settings,
        )
        for part, rate in enumerate((44_100, 48_000))
    ]
    joined = tmp_path / "joined.mpg"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    clip = decode_clip(joined, TEN)
    assert flash_and_beep(clip) == (pytest.approx(3.0, abs=0.2), pytest.approx(3.0, abs=0.2))
    assert len(clip.audio) == pytest.approx(6 * 16_000, abs=4000)


def corner(width: int = 112, height: int = 56) -> np.ndarray:
    """Twelve dark frames whose top left quarter is white."""
    frames = np.zeros((12, height, width, 3), np.uint8)
    frames[:, : height // 2, : width // 2] = 255
    return frames


ONE = 1 << 16
UPRIGHT = {  # Display matrix (a, b, c, d): where the white quarter goes, and the shape.
    "as it is": ((1, 0, 0, 1), (0, 0), (56, 112)),
    "quarter to the left": ((0, -1, 1, 0), (1, 0), (112, 56)),
    "quarter to the right": ((0, 1, -1, 0), (0, 1), (112, 56)),
    "upside down": ((-1, 0, 0, -1), (1, 1), (56, 112)),
    "mirrored": ((-1, 0, 0, 1), (0, 1), (56, 112)),
    "flipped": ((1, 0, 0, -1), (1, 0), (56, 112)),
    "transposed": ((0, 1, 1, 0), (0, 0), (112, 56)),
}


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("name", UPRIGHT)
def test_pictures_stand_as_a_player_shows_them(tmp_path, name, codec):
    (a, b, c, d), (row, column), shape = UPRIGHT[name]
    path = write_clip(
        tmp_path / "a.mp4",
        frames=corner(),
        audio=tone(1),
        matrix=(a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30),
        **(LOSSY | {"codecs": (codec, "aac")}),
    )
    clip = decode_clip(path, FrameSampling(min_pixels=56 * 112, max_pixels=56 * 112))
    assert clip.frames.shape[1:3] == shape
    quarter = clip.frames[0].reshape(2, shape[0] // 2, 2, shape[1] // 2, 3).mean(axis=(1, 3, 4))
    assert np.unravel_index(quarter.argmax(), (2, 2)) == (row, column)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("cover_first", [True, False])
def test_a_cover_picture_without_its_mark_is_not_the_film(tmp_path, suffix, cover_first):
    film = write_clip(tmp_path / "f.mp4", frames=flashing(60, 30), audio=tone(6), fps=10, **LOSSY)
    settings = {"codecs": ("mjpeg", ""), "pixels": "yuvj420p"}
    cover = write_clip(tmp_path / "c.mp4", frames=gray_frames(1), audio=None, **settings)
    order = (cover, film) if cover_first else (film, cover)
    path = copy_packets(order[1], tmp_path / f"a{suffix}", shift=0.0, first=order[0])
    clip = decode_clip(path, TEN)
    assert len(clip.frames) == 60 and flash_and_beep(clip)[0] == pytest.approx(3.0, abs=0.06)


@pytest.mark.parametrize("first", ["broken", "whole"])
def test_a_sound_track_without_a_decoder_is_passed_over(tmp_path, first):
    film = write_clip(tmp_path / "f.mp4", frames=gray_frames(12), audio=tone(1), **LOSSY)
    other = write_clip(tmp_path / "o.mp4", frames=None, audio=tone(1), codecs=("", "alac"))
    order = (other, film) if first == "broken" else (film, other)
    path = copy_packets(order[1], tmp_path / "a.mp4", shift=0.0, first=order[0])
    path.write_bytes(path.read_bytes().replace(b"alac", b"apac"))
    clip = decode_clip(path, TEN)
    assert np.abs(clip.audio.astype(int)).max() > 6000


def test_sound_that_ends_before_the_film_begins_is_no_sound(tmp_path):
    times = [5 + n / 12 for n in range(24)]
    path = write_clip(tmp_path / "a.mkv", frames=gray_frames(24), audio=tone(2.0), times=times)
    with pytest.raises(MediaError, match="the sound ends before the first frame"):
        decode_clip(path, FrameSampling())
    assert decode_clip(path, decode.release_sampling()).audio.size


@pytest.mark.parametrize("default", [0, 1])
def test_the_default_sound_track_is_the_one_that_is_heard(tmp_path, default):
    quiet, loud = (
        write_clip(tmp_path / f"{gain}.mkv", frames=None, audio=gain * tone(1)) for gain in (0, 1)
    )
    sounds = copy_packets(loud, tmp_path / "sounds.mkv", shift=0.0, first=quiet, default=default)
    film = write_clip(tmp_path / "film.mkv", frames=gray_frames(12), audio=None)
    path = copy_packets(film, tmp_path / "a.mkv", shift=0.0, first=sounds)
    assert decode_clip(path, TEN).audio.any() == bool(default)


def test_a_name_with_a_zero_byte_is_refused_by_name():
    with pytest.raises(MediaError, match="null"):
        decode_clip("a\0.mp4", TEN)


def test_damage_anywhere_is_a_clip_or_a_refusal(tmp_path):
    whole = write_clip(tmp_path / "w.mp4", frames=gray_frames(24), audio=tone(2), **LOSSY)
    raw, rng = whole.read_bytes(), np.random.default_rng(0)
    path, refused = tmp_path / "damaged.mp4", 0
    for _ in range(60):
        damaged = bytearray(raw)
        for place in rng.integers(0, len(raw), 12):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            clip = decode_clip(path, TEN)
            assert len(clip.frames) % 2 == 0 and clip.seconds_per_grid > 0
        except MediaError as error:
            assert path.name in str(error)
            refused += 1
    assert refused > 0


def test_a_file_with_nothing_but_tracks_without_a_decoder_says_so(tmp_path):
    path = write_clip(
        tmp_path / "a.mp4",
        frames=gray_frames(12),
        audio=tone(1),
        **(LOSSY | {"codecs": ("libx264", "alac")}),
    )
    path.write_bytes(path.read_bytes().replace(b"alac", b"apac"))
    with pytest.raises(MediaError, match=r"no decoder .*a\.mp4: the sound"):
        decode_clip(path, TEN)


def test_a_frame_too_thin_or_too_large_is_refused_by_name(tmp_path):
    thin = write_clip(tmp_path / "t.mkv", frames=gray_frames(4, 1000, 4), audio=tone(1))
    with pytest.raises(MediaError, match=r"t\.mkv: 4 x 1000") as error:
        decode_clip(thin, TEN)
    assert error.value.reason == "too_thin"
    large = write_clip(tmp_path / "l.mkv", frames=gray_frames(4), audio=tone(1))
    # The header promises 100,000 pixels in either direction.
    raw = large.read_bytes()
    for tag in (b"\xb0", b"\xba"):
        raw = raw.replace(tag + b"\x81\x54", tag + b"\x83" + struct.pack(">I", 100_000)[1:])
    large.write_bytes(raw)
    with pytest.raises(MediaError):
        decode_clip(large, TEN)
