import gc
import weakref

import numpy as np
import pytest

from saber_jax.data import decode, media
from saber_jax.data.decode import FrameSampling, MediaError, decode_clip
from tests.media_files import gray_frames, tone, write_clip

SMALL = FrameSampling(fps=4, min_pixels=84 * 84, max_pixels=84 * 84)


def refused(path, sampling=SMALL) -> MediaError:
    with pytest.raises(MediaError) as error:
        decode_clip(path, sampling)
    assert path.name in error.value.detail
    return error.value


def test_a_lossless_clip_comes_back_exactly(tmp_path):
    path = write_clip(tmp_path / "a.mkv", frames=gray_frames(24), audio=tone(2))
    clip = decode_clip(path, SMALL)
    assert clip.frames.shape == (8, 84, 84, 3)
    assert clip.frames[:, 0, 0, 0].tolist() == [5 * i for i in (0, 3, 7, 10, 13, 16, 20, 23)]
    assert np.ptp(clip.frames, axis=(1, 2, 3)).max() == 0
    np.testing.assert_array_equal(clip.audio, tone(2))
    assert clip.seconds_per_grid == pytest.approx(0.5, abs=1e-3)
    assert (clip.info["frames"], clip.info["height"]) == (24, 84)


@pytest.mark.parametrize(
    ("name", "codecs", "rate"),
    [
        ("a.mp4", ("libx264", "aac"), 16_000),
        ("a.mov", ("libx264", "aac"), 44_100),
        ("a.mkv", ("libx264", "libopus"), 48_000),
        ("a.webm", ("libvpx", "libopus"), 48_000),
        ("a.avi", ("mpeg4", "libmp3lame"), 44_100),
        ("a.mpg", ("mpeg1video", "mp2"), 44_100),
    ],
)
def test_every_container_gives_the_same_clip(tmp_path, name, codecs, rate):
    path = write_clip(
        tmp_path / name,
        frames=gray_frames(50),
        audio=tone(2),
        fps=25,
        codecs=codecs,
        pixels="yuv420p",
        rate=rate,
    )
    clip = decode_clip(path, SMALL)
    assert clip.frames.shape == (8, 84, 84, 3)
    expected = 5 * np.round(np.linspace(0, 49, 8))
    np.testing.assert_allclose(clip.frames.mean(axis=(1, 2, 3)), expected, atol=4)
    assert clip.seconds_per_grid == pytest.approx(0.5, abs=0.015)  # AVI skips a tick
    # Codecs pad the sound to whole frames; the tone itself must start within 30 ms of the picture.
    assert abs(len(clip.audio) - 32_000) < 3000
    assert np.abs(clip.audio[500:1500].astype(int)).max() > 6000
    spectrum = np.abs(np.fft.rfft(clip.audio[8000:24_000]))
    assert abs(np.argmax(spectrum) - 440) <= 1


@pytest.mark.parametrize("start", [0.5, 0.0])
def test_sound_that_starts_late_is_led_in_by_silence(tmp_path, start):
    path = write_clip(tmp_path / "a.mkv", frames=gray_frames(24), audio=tone(1), audio_start=start)
    lead = round(start * 16_000)
    exact = decode_clip(path, SMALL).audio
    np.testing.assert_array_equal(exact, np.concatenate([np.zeros(lead, np.int16), tone(1)]))
    release = decode_clip(path, decode.release_sampling()).audio
    np.testing.assert_array_equal(release, tone(1))


def test_sound_before_the_first_frame_is_cut_off(tmp_path):
    times = [0.25 + i / 12 for i in range(24)]
    path = write_clip(tmp_path / "a.mkv", frames=gray_frames(24), audio=tone(2), times=times)
    np.testing.assert_array_equal(decode_clip(path, SMALL).audio, tone(2)[4000:])


def test_odd_sizes_are_resized_to_whole_units(tmp_path):
    frames = gray_frames(12, 63, 117)
    path = write_clip(tmp_path / "a.mkv", frames=frames, audio=tone(1))
    exact = decode_clip(path, FrameSampling(fps=2, max_pixels=84 * 84, min_pixels=28 * 28))
    assert exact.frames.shape == (4, 56, 112, 3)
    assert exact.frames[-1, 0, 0, 0] == 55


def test_the_release_mode_repeats_the_published_settings(tmp_path):
    path = write_clip(tmp_path / "a.mkv", frames=gray_frames(12, 240, 320), audio=tone(1))
    clip = decode_clip(path, decode.release_sampling())
    assert clip.seconds_per_grid == 1.0  # True would be 0.5.
    assert clip.frames.shape == (4, 280, 392, 3)


def test_a_limit_on_pixels_is_inert_in_the_release_mode_only():
    release = decode.release_sampling()
    assert release.frame_size(720, 1280, 20) == (224, 420)
    exact = FrameSampling(min_pixels=28 * 28, max_pixels=50_176)
    assert exact.frame_size(720, 1280, 20) == (168, 280)


def test_the_total_of_all_frames_is_limited_too():
    height, width = FrameSampling().frame_size(1080, 1920, 768)
    assert height * width <= decode.TOTAL_PIXELS / 768 * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "fast"}, "fast"),
        ({"min_pixels": 9000, "max_pixels": 8000}, "exceeds"),
        ({"fps": 0}, "positive"),
        ({"max_frames": 1}, "at least 2"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FrameSampling(**settings)


def test_a_clip_without_sound_is_refused(tmp_path):
    path = write_clip(tmp_path / "mute.mkv", frames=gray_frames(24), audio=None)
    assert refused(path).reason == "no_audio"


def test_sound_without_pictures_is_refused(tmp_path):
    path = write_clip(tmp_path / "dark.mkv", frames=None, audio=tone(1))
    assert refused(path).reason == "no_video"


def test_a_still_picture_is_refused(tmp_path):
    path = write_clip(tmp_path / "still.mkv", frames=gray_frames(1), audio=tone(1))
    assert refused(path).reason == "too_short"


def test_a_film_is_refused_without_decoding_it(tmp_path, monkeypatch):
    times = [0.0, 4 * 3600.0]
    path = write_clip(
        tmp_path / "film.mp4",
        frames=gray_frames(2),
        audio=tone(1),
        times=times,
        codecs=("libx264", "aac"),
        pixels="yuv420p",
    )
    monkeypatch.setattr(decode, "_decoded", lambda *_: pytest.fail("decoded"))
    error = refused(path)
    assert error.reason == "too_long"
    assert "allowed are 300 s" in error.detail


def test_only_resized_frames_are_in_memory(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mkv", frames=gray_frames(48, 240, 320), audio=tone(4))
    large, most = [], []
    resize = media.resize_bicubic

    def watched(frames, *size):
        gc.collect(0)
        large.append(weakref.ref(frames if frames.base is None else frames.base))
        most.append(sum(one() is not None for one in large))
        return resize(frames, *size)

    monkeypatch.setattr(media, "resize_bicubic", watched)
    assert len(decode_clip(path, SMALL).frames) == len(most) == 16
    assert max(most) <= 2


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "zero.mp4"
    path.write_bytes(b"")
    assert refused(path).reason == "empty_file"


@pytest.mark.parametrize("content", [b"not a video at all" * 50, b"\x00" * 4096])
def test_a_file_that_is_no_video_is_refused(tmp_path, content):
    path = tmp_path / "text.mp4"
    path.write_bytes(content)
    assert refused(path).reason in ("unreadable", "no_video")


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv"])
def test_a_download_that_was_cut_off_is_refused(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (48, 84, 84, 3), np.uint8)
    path = write_clip(
        tmp_path / name, frames=noise, audio=tone(4), codecs=("libx264", "aac"), pixels="yuv420p"
    )
    decode_clip(path, SMALL)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refused(path).reason == "unreadable"
