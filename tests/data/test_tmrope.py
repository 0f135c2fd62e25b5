import types

import numpy as np
import pytest

from saber_jax.data.tmrope import MediaIds, audio_tokens, tmrope

IDS = MediaIds(image=1, video=2, audio=3, vision_bos=4, audio_bos=5)
AUDIO_EOS, VISION_EOS, TEXT = 6, 7, 9


def test_text_counts_up_on_every_axis():
    np.testing.assert_array_equal(tmrope(np.full(4, TEXT), IDS), [[0, 1, 2, 3]] * 3)


def test_the_drawing_in_the_docstring():
    tokens = [TEXT, 2, 2, 2, 2, TEXT, 3, 3, TEXT]
    got = tmrope(
        np.array(tokens), IDS, grids=[(2, 2, 4)], seconds_per_grid=[0.08], audio_frames=[8]
    )
    expected = [
        [0, 1, 1, 3, 3, 4, 5, 6, 7],
        [0, 1, 1, 1, 1, 4, 5, 6, 7],
        [0, 1, 2, 1, 2, 4, 5, 6, 7],
    ]
    np.testing.assert_array_equal(got, expected)


def test_text_goes_on_after_the_largest_of_the_three_axes():
    wide = tmrope(np.array([2] * 5 + [TEXT]), IDS, grids=[(1, 2, 10)], seconds_per_grid=[1.0])
    long = tmrope(np.array([2] * 2 + [TEXT]), IDS, grids=[(2, 2, 2)], seconds_per_grid=[1.0])
    assert wide[:, -1].tolist() == [5, 5, 5]
    assert long[:, -1].tolist() == [26, 26, 26]


def test_seconds_become_positions_by_float32_truncation():
    # 3 * 0.08 * 25 is 6 exactly, but 5.9999999 or 6.0000005 in floating point.
    grids, seconds = [(4, 2, 2)], [0.08]
    got = tmrope(np.array([2] * 4), IDS, grids=grids, seconds_per_grid=seconds)
    exact = np.float32(3) * np.float32(0.08) * np.float32(25)
    assert got[0].tolist() == [0, 2, 4, int(exact)]


def test_sound_in_a_video_is_woven_in_every_two_seconds():
    # Four frame pairs a second apart, 3 s of sound: V(0 s, 1 s) A(0-2 s) V(2 s, 3 s) A(2-3 s).
    tokens = [4, 5] + [2, 2] + [3] * 50 + [2, 2] + [3] * 25 + [AUDIO_EOS, VISION_EOS, TEXT]
    got = tmrope(
        np.array(tokens),
        IDS,
        grids=[(4, 2, 2)],
        seconds_per_grid=[1.0],
        audio_frames=[300],
        use_audio_in_video=True,
    )[0]
    assert got[:4].tolist() == [0, 0, 1, 26]
    assert got[4:54].tolist() == list(range(1, 51))
    assert got[54:56].tolist() == [51, 76]
    assert got[56:81].tolist() == list(range(51, 76))
    # The end markers follow the last sound, 75, although the last picture is at 76.
    assert got[81:].tolist() == [76, 76, 77]


@pytest.mark.parametrize(
    ("frames", "tokens"),
    [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (6, 1), (7, 2), (200, 50)],
)
def test_a_second_of_sound_is_25_tokens(frames, tokens):
    assert audio_tokens(frames) == tokens


@pytest.mark.parametrize("token", [1, 2, 3])
def test_placeholders_without_media_are_refused(token):
    with pytest.raises(ValueError, match=r"more .* placeholders than media"):
        tmrope(np.array([TEXT, token]), IDS)


def test_placeholders_that_disagree_with_the_grid_are_refused():
    with pytest.raises(ValueError, match="12 positions for 11 tokens"):
        tmrope(np.array([2] * 11), IDS, grids=[(3, 4, 4)], seconds_per_grid=[1.0])


def reference(ids: MediaIds = IDS):
    """The position method of transformers, without building a model around it."""
    torch = pytest.importorskip("torch")
    omni = pytest.importorskip("transformers.models.qwen2_5_omni.modeling_qwen2_5_omni")
    base = omni.Qwen2_5OmniPreTrainedModelForConditionalGeneration
    config = types.SimpleNamespace(
        image_token_id=ids.image,
        video_token_id=ids.video,
        audio_token_id=ids.audio,
        vision_start_token_id=ids.vision_bos,
        audio_start_token_id=ids.audio_bos,
        position_id_per_seconds=25,
        seconds_per_chunk=2,
    )
    model = types.SimpleNamespace(config=config, spatial_merge_size=2)
    for name in ("get_llm_pos_ids_for_vision", "get_chunked_index"):
        setattr(model, name, types.MethodType(getattr(base, name), model))

    def positions(row, *, woven):
        grids = torch.tensor(row.grids) if row.grids else None
        images = torch.tensor(row.images) if row.images else None
        result, _ = base.get_rope_index(
            model,
            torch.tensor([row.tokens]),
            images,
            grids,
            torch.ones(1, len(row.tokens), dtype=torch.long),
            woven,
            torch.tensor(row.audios) if row.audios else None,
            torch.tensor(row.seconds) if row.seconds else None,
        )
        return result[:, 0].numpy()

    return positions


class Row:
    """A random prompt with media, built up block by block."""

    def __init__(self, rng: np.random.Generator, *, woven: bool):
        self.rng = rng
        self.tokens, self.grids, self.images, self.seconds, self.audios = [], [], [], [], []
        blocks = (
            [self.image, self.audio, self.woven] if woven else [self.image, self.audio, self.video]
        )
        self.text()
        for _ in range(rng.integers(1, 5)):
            blocks[rng.integers(len(blocks))]()
            self.text()

    def text(self):
        self.tokens += [TEXT] * int(self.rng.integers(1, 6))

    def grid(self, t: int) -> tuple[int, int, int]:
        h, w = (2 * int(side) for side in self.rng.integers(1, 7, 2))
        return t, h, w

    def image(self):
        self.images.append(self.grid(1))
        self.tokens += [4] + [1] * (np.prod(self.images[-1]) // 4) + [VISION_EOS]

    def audio(self):
        self.audios.append(int(self.rng.integers(3, 900)))
        self.tokens += [5] + [3] * audio_tokens(self.audios[-1]) + [AUDIO_EOS]

    def add_video(self):
        self.grids.append(self.grid(int(self.rng.integers(1, 9))))
        self.seconds.append(float(self.rng.choice([1.0, 0.5, 2.0, 2 / 3, 4.0, 0.4, 0.6, 0.08])))
        return [2] * (np.prod(self.grids[-1]) // 4)

    def video(self):
        self.tokens += [4, *self.add_video(), VISION_EOS]

    def woven(self):
        # Positions depend only on how many placeholders there are, not on how they are woven.
        video = self.add_video()
        self.audios.append(int(self.rng.integers(3, 900)))
        sound = [3] * audio_tokens(self.audios[-1])
        self.tokens += [4, 5, *video, *sound, AUDIO_EOS, VISION_EOS]


@pytest.mark.parametrize("woven", [False, True])
def test_positions_equal_those_of_transformers(woven):
    positions = reference()
    compared = 0
    for seed in range(150):
        row = Row(np.random.default_rng(seed), woven=woven)
        if not (row.grids or row.images):
            continue  # transformers then takes another path, which also needs no media.
        got = tmrope(
            np.array(row.tokens),
            IDS,
            grids=row.grids,
            seconds_per_grid=row.seconds,
            audio_frames=row.audios,
            image_grids=row.images,
            use_audio_in_video=woven,
        )
        np.testing.assert_array_equal(got, positions(row, woven=woven))
        compared += 1
    assert compared > 100
