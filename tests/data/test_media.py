import numpy as np
import pytest
from PIL import Image

from saber_jax.data import media

# (total frames, their rate, kept at fps=2 and at most 40): the rule worked out by hand.
SAMPLED = [
    (75, 25.0, 6),  # 3 s -> 6
    (2, 25.0, 2),  # Fewer than the least of four: all of them.
    (3, 25.0, 2),  # Only an even number of frames.
    (5, 25.0, 4),
    (25, 25.0, 4),  # 1 s -> 2, raised to the least of four.
    (250, 25.0, 20),
    (1500, 25.0, 40),  # 60 s -> 120, cut to 40.
    (70, 25.0, 4),  # 2.8 s -> 5.6, down to even.
]


@pytest.mark.parametrize(("total", "rate", "kept"), SAMPLED)
def test_frames_are_sampled_evenly_from_first_to_last(total, rate, kept):
    indices = media.frame_indices(total, rate, fps=2.0, max_frames=40)
    assert len(indices) == kept
    assert (indices[0], indices[-1]) == (0, total - 1)
    assert np.ptp(np.diff(indices)) <= 1


def test_a_higher_rate_keeps_more_frames():
    assert media.frame_indices(24, 12.0, fps=4).tolist() == [0, 3, 7, 10, 13, 16, 20, 23]


def test_a_single_frame_is_no_video():
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        media.frame_indices(1, 25.0)


# Sides of qwen_omni_utils 0.0.8 with the SABER settings: at least 100352, at most 105369 pixels.
RELEASE_SIZES = {
    (1080, 1920): (224, 420),
    (720, 1280): (224, 420),
    (480, 854): (224, 420),
    (480, 640): (280, 364),
    (240, 320): (280, 392),
    (512, 512): (308, 308),
    (224, 224): (336, 336),
}


@pytest.mark.parametrize(("before", "after"), RELEASE_SIZES.items())
def test_frame_sizes_equal_those_of_the_published_pipeline(before, after):
    assert media.smart_resize(*before, 100_352, 105_369) == after


def test_half_units_round_to_even():
    assert media.smart_resize(42, 70, 1, 10**9) == (56, 56)


def test_extreme_shapes_are_refused():
    with pytest.raises(ValueError, match="side ratio"):
        media.smart_resize(10, 2010, 1, 10**9)


@pytest.mark.parametrize("size", [(30, 40), (120, 50), (56, 84), (17, 200), (60, 72)])
def test_resizing_agrees_with_pillow_within_its_own_rounding(size):
    # Smooth pictures: Pillow rounds between its two passes and clips there, this code does not.
    y, x = np.mgrid[:60, :72]
    waves = np.stack([np.sin(x / 9 + y / 7), np.cos(x / 5), np.sin(y / 8)], -1)
    frame = np.rint(127 + 90 * waves).astype(np.uint8)
    ours = media.resize_bicubic(frame[None], *size)[0].astype(int)
    theirs = Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC)
    difference = np.abs(ours - np.asarray(theirs, int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.2


def test_resizing_equals_torchs_antialiased_bicubic_but_for_rounding():
    torch = pytest.importorskip("torch")
    frames = np.random.default_rng(0).integers(0, 256, (2, 90, 130, 3), np.uint8)
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    for size in [(28, 56), (112, 140), (84, 196)]:
        resized = torch.nn.functional.interpolate(
            tensor, size=size, mode="bicubic", antialias=True, align_corners=False
        )
        theirs = resized.round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
        difference = np.abs(theirs - media.resize_bicubic(frames, *size))
        assert difference.max() <= 1
        assert (difference > 0).mean() <= 5e-4


def test_a_frame_of_the_right_size_is_left_alone():
    frames = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
    assert media.resize_bicubic(frames, 28, 28) is frames


def test_patches_come_in_merge_blocks_with_channels_first():
    t, height, width = 4, 56, 84
    frames = np.random.default_rng(0).integers(0, 256, (t, height, width, 3), np.uint8)
    patches = media.patchify(frames)
    assert patches.shape == (2 * 4 * 6, 1176)
    row = 0
    for pair in range(2):
        for unit_y in range(2):
            for unit_x in range(3):
                for y in (2 * unit_y, 2 * unit_y + 1):
                    for x in (2 * unit_x, 2 * unit_x + 1):
                        cut = frames[2 * pair : 2 * pair + 2, 14 * y : 14 * y + 14]
                        cut = cut[:, :, 14 * x : 14 * x + 14]
                        expected = cut.transpose(3, 0, 1, 2).reshape(-1)
                        np.testing.assert_array_equal(patches[row], expected)
                        row += 1


@pytest.mark.parametrize("shape", [(3, 28, 28, 3), (2, 30, 28, 3), (2, 28, 14, 3), (2, 28, 28, 1)])
def test_frames_that_do_not_divide_into_units_are_refused(shape):
    with pytest.raises(ValueError, match="even number of RGB frames"):
        media.patchify(np.zeros(shape, np.uint8))


def test_windows_of_a_frame_that_is_not_whole_windows():
    layout = media.vision_layout((1, 10, 12))  # 5 x 6 units: windows 4x4, 4x2, 1x4, 1x2.
    windows = layout.window[layout.unit_slot * 4].reshape(5, 6)
    expected = np.array([[1, 1, 1, 1, 2, 2]] * 4 + [[3, 3, 3, 3, 4, 4]])
    np.testing.assert_array_equal(windows, expected)


def test_frame_pairs_share_no_window():
    layout = media.vision_layout((3, 2, 10))
    assert layout.frame.reshape(3, -1).tolist() == [[1] * 20, [2] * 20, [3] * 20]
    assert layout.window.reshape(3, -1)[:, [0, -1]].tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("grid", [(1, 2, 2), (2, 6, 6), (1, 16, 30), (3, 10, 26), (2, 8, 8)])
def test_the_tower_order_is_a_permutation_that_keeps_places(grid):
    layout = media.vision_layout(grid)
    patches = np.prod(grid)
    np.testing.assert_array_equal(np.sort(layout.order), np.arange(patches))
    # Patch rows carry (t, y, x) in merge-block order; the layout must say the same of each.
    t, h, w = grid
    place = np.stack(np.indices(grid), -1).reshape(t, h // 2, 2, w // 2, 2, 3)
    place = place.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3)
    np.testing.assert_array_equal(place[layout.order][:, 1:], layout.hw)
    np.testing.assert_array_equal(place[layout.order][:, 0] + 1, layout.frame)
    np.testing.assert_array_equal(layout.order[4 * layout.unit_slot] // 4, np.arange(patches // 4))
    assert np.all(np.diff(layout.window) >= 0)


@pytest.mark.parametrize("grid", [(2, 6, 6), (1, 16, 30), (3, 10, 26), (2, 8, 8), (1, 2, 18)])
def test_windows_equal_those_of_transformers(grid):
    torch = pytest.importorskip("torch")
    vision = pytest.importorskip("transformers.vision_utils")
    index, bounds = vision.get_vision_window_index(
        torch.tensor([grid]), spatial_merge_size=2, window_size=112, patch_size=14
    )
    layout = media.vision_layout(grid)
    np.testing.assert_array_equal(layout.order[::4] // 4, index.numpy())
    starts = np.flatnonzero(np.diff(layout.window, prepend=0))
    np.testing.assert_array_equal(np.unique(bounds.numpy())[:-1], starts)


def test_a_shared_layout_cannot_be_overwritten():
    with pytest.raises(ValueError, match="read-only"):
        media.vision_layout((1, 2, 2)).order[0] = 1


@pytest.mark.parametrize("grid", [(0, 2, 2), (1, 3, 2), (1, 2, 0)])
def test_impossible_grids_are_refused(grid):
    with pytest.raises(ValueError, match="grid"):
        media.vision_layout(grid)


def sound(samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / media.SAMPLE_RATE
    tone = 0.4 * np.sin(2 * np.pi * 440 * time) + 0.02 * rng.standard_normal(samples)
    return np.round(tone * 32767).clip(-32768, 32767).astype(np.int16)


@pytest.mark.parametrize("samples", [1, 80, 159, 160, 161, 399, 400, 16_000, 47_648, 32_001])
def test_log_mel_equals_whispers(samples):
    pytest.importorskip("torch")
    whisper = pytest.importorskip("transformers").WhisperFeatureExtractor(
        feature_size=128, sampling_rate=16_000, hop_length=160, n_fft=400, chunk_length=5
    )
    pcm = sound(samples)
    wave = pcm.astype(np.float32) / 32768
    batch = whisper(wave, sampling_rate=16_000, return_attention_mask=True, return_tensors="np")
    valid = int(batch["attention_mask"].sum())
    got = media.log_mel(pcm)
    assert got.shape == (valid, 128) == (-(-samples // 160), 128)
    padded = np.pad(wave, (0, 5 * 16_000 - samples))
    exact = whisper._np_extract_fbank_features(padded[None], "cpu")  # In float64.
    np.testing.assert_allclose(got, exact[0, :, :valid].T, atol=1e-6)
    # The extractor itself works in float32 and is off by this much in its quietest bins.
    np.testing.assert_allclose(got, batch["input_features"][0, :, :valid].T, atol=1e-4)


@pytest.mark.parametrize("left_out", [330, 30, 0, -16_000])
@pytest.mark.parametrize("loud", [True, False])
def test_log_mel_equals_whispers_up_to_300_s(left_out, loud):
    pytest.importorskip("torch")
    whisper = pytest.importorskip("transformers").WhisperFeatureExtractor(
        feature_size=128, sampling_rate=16_000, hop_length=160, n_fft=400, chunk_length=300
    )
    most = 300 * 16_000
    pcm = sound(most - left_out)
    if not loud:  # But in its last moment, which a frame after 300 s would be centred on.
        pcm[: most - max(left_out, 0) - 20] = 0
    wave = (pcm.astype(np.float32) / 32768)[:most]
    exact = whisper._np_extract_fbank_features(np.pad(wave, (0, most - len(wave)))[None], "cpu")
    got = media.log_mel(pcm)
    assert len(got) == min(30_000, -(-len(pcm) // 160))
    np.testing.assert_allclose(got, exact[0, :, : len(got)].T, atol=1e-6)


def test_silence_has_the_floor_everywhere():
    np.testing.assert_allclose(media.log_mel(np.zeros(3200, np.int16)), -1.5)


def test_no_sound_gives_no_frames():
    assert media.log_mel(np.zeros(0, np.int16)).shape == (0, 128)


def test_floats_and_integers_are_the_same_sound():
    pcm = sound(5000)
    np.testing.assert_array_equal(media.log_mel(pcm), media.log_mel(pcm / np.float32(32768)))


def test_sound_after_five_minutes_is_cut():
    assert len(media.log_mel(np.zeros(301 * 16_000, np.int16))) == 30_000


@pytest.mark.parametrize(
    ("frames", "lengths"), [(0, []), (1, [1]), (200, [200]), (401, [200, 200, 1])]
)
def test_chunks_are_two_seconds_with_the_rest_padded(frames, lengths):
    mel = np.random.default_rng(0).standard_normal((frames, 128)).astype(np.float32)
    chunks, got = media.audio_chunks(mel)
    assert got.tolist() == lengths
    assert chunks.shape == (len(lengths), 200, 128)
    flat = chunks.reshape(-1, 128)
    np.testing.assert_array_equal(flat[:frames], mel)
    assert not flat[frames:].any()
    assert sum(map(media.audio_tokens, lengths)) == media.audio_tokens(frames)
