import math
from fractions import Fraction

import av
import numpy as np
import pytest

from saber_jax.data import sound
from saber_jax.data.decode import FrameSampling, MediaError, decode_sound
from tests.media_files import tone, write_clip


def frames(samples: int, rate: int, layout: str, *, start: float = 0.0, value: int = 1000):
    """Decoded frames of a constant sound, a tenth of a second each."""
    channels = av.AudioLayout(layout).nb_channels
    for low in range(0, samples, rate // 10):
        size = min(rate // 10, samples - low)
        data = np.full((1, size * channels), value, np.int16)
        frame = av.AudioFrame.from_ndarray(data, "s16", layout)
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = round(start * rate) + low
        yield frame


def heard(*parts, max_seconds: float = 300.0) -> sound.Track:
    track = sound.Track(max_seconds)
    for part in parts:
        for frame in part:
            track.hear(frame)
    return track


@pytest.mark.parametrize("layout", ["mono", "5.1", "7.1", "5.1.4", "hexadecagonal", "22.2"])
def test_any_number_of_channels_becomes_their_mean(layout):
    placed = heard(frames(16_000, 16_000, layout)).placed(0.0)
    np.testing.assert_array_equal(placed, np.full(16_000, 1000, np.int16))


@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
def test_planes_of_eight_channels_and_more_are_read_from_files(tmp_path, codec):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        track = out.add_stream(codec, rate=48_000, layout="7.1")
        resampler = av.AudioResampler(track.format, "7.1", 48_000, frame_size=1024)
        for frame in frames(48_000, 48_000, "7.1"):
            for part in resampler.resample(frame):
                out.mux(track.encode(part))
        out.mux(track.encode())
    assert abs(len(decode_sound(path, FrameSampling())) - 16_000) < 800


def test_layout_and_rate_may_change_on_the_way():
    parts = [
        frames(44_100, 44_100, "mono"),
        frames(44_100, 44_100, "stereo", start=1.0),
        frames(48_000, 48_000, "5.1", start=2.0),
        frames(8000, 8000, "mono", start=3.0),
    ]
    placed = heard(*parts).placed(0.0)
    assert len(placed) == 64_000
    inside = placed.reshape(4, 16_000)[:, 500:-500].astype(int)  # Filters ring at the ends.
    assert np.abs(inside - 1000).max() < 5


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("samples", [4410, 12_345])
def test_resampled_sound_is_as_long_as_librosas(rate, samples):
    assert len(sound.resample(np.zeros(samples), rate)) == math.ceil(samples * 16_000 / rate)


@pytest.mark.parametrize("sample", [math.nan, -math.inf])
def test_samples_that_are_not_numbers_are_refused(sample):
    data = np.zeros((1, 1600), np.float32)
    data[0, 800] = sample
    frame = av.AudioFrame.from_ndarray(data, "flt", "mono")
    frame.sample_rate, frame.time_base, frame.pts = 16_000, Fraction(1, 16_000), 0
    with pytest.raises(MediaError, match="samples that are not numbers"):
        heard([frame])


def test_small_differences_of_timestamps_are_rounding_and_large_ones_are_holes():
    near = heard(frames(16_000, 16_000, "mono"), frames(16_000, 16_000, "mono", start=1.015))
    assert len(near.placed(0.0)) == 32_000 and near.holes == 0
    far = heard(frames(16_000, 16_000, "mono"), frames(16_000, 16_000, "mono", start=1.5))
    placed = far.placed(0.0)
    assert far.holes == 1 and len(placed) == 40_000
    assert not placed[16_000:24_000].any() and placed[24_000:].all()
    assert len(far.joined()) == 32_000


def test_of_what_overlaps_the_later_counts():
    first = frames(32_000, 16_000, "mono", value=1000)
    placed = heard(first, frames(8000, 16_000, "mono", start=0.5, value=2000)).placed(0.0)
    np.testing.assert_array_equal(placed, np.repeat(np.array([1000, 2000], np.int16), 8000))


def test_a_wild_timestamp_costs_neither_memory_nor_the_rest():
    track = heard(frames(1600, 16_000, "mono"), frames(1600, 16_000, "mono", start=1e9))
    assert len(track.placed(0.0)) == 300 * 16_000


def test_sound_starts_where_it_is_asked_to():
    track = heard(frames(16_000, 16_000, "mono", start=0.5))
    assert not track.placed(0.0)[:8000].any() and track.placed(0.0)[8000:].all()
    assert len(track.placed(1.0)) == 8000


def test_no_more_is_kept_than_may_be_used():
    track = heard(frames(20 * 16_000, 16_000, "mono"), max_seconds=2.0)
    assert len(track.placed(0.0)) == len(track.joined()) == 32_000
    assert sum(len(piece) for run in track._runs for piece in run.pieces) < 2.3 * 16_000


def test_a_sound_that_is_too_long_is_refused_while_it_is_read(tmp_path):
    path = write_clip(tmp_path / "a.wav", frames=None, audio=tone(4), codecs=("", "pcm_s16le"))
    with pytest.raises(MediaError, match="allowed are 3 s") as error:
        decode_sound(path, FrameSampling(max_seconds=3))
    assert error.value.reason == "too_long"
    # A header that says nothing about the length: only reading tells.
    raw = write_clip(tmp_path / "a.aac", frames=None, audio=tone(4), codecs=("", "aac"))
    with pytest.raises(MediaError, match="allowed are 3 s"):
        decode_sound(raw, FrameSampling(max_seconds=3))
