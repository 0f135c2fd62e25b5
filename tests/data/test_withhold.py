import numpy as np
import pytest

from saber_jax.data import examples, sed
from saber_jax.data.records import FIELDS, Record
from saber_jax.data.tokenizer import train_sentencepiece
from saber_jax.data.withhold import has_modality, withhold

RECORD = Record(
    clip_id="a",
    language="en",
    frames=np.arange(2 * 28 * 28 * 3, dtype=np.uint64).astype(np.uint8).reshape(2, 28, 28, 3),
    seconds_per_grid=0.5,
    audio=np.arange(1, 3201, dtype=np.int16),
    annotation=dict.fromkeys(FIELDS, "x"),
    labels={"face": "happy"},
    provenance={},
)


def test_withheld_audio_is_silence_of_the_same_length_and_the_video_stays():
    muted = withhold(RECORD, "audio")
    np.testing.assert_array_equal(muted.audio, np.zeros(3200, np.int16))
    np.testing.assert_array_equal(muted.frames, RECORD.frames)
    assert RECORD.audio.any()


def test_withheld_video_is_mid_grey_of_the_same_size_and_the_audio_stays():
    blanked = withhold(RECORD, "video")
    np.testing.assert_array_equal(blanked.frames, np.full((2, 28, 28, 3), 128, np.uint8))
    np.testing.assert_array_equal(blanked.audio, RECORD.audio)


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_the_prompt_is_the_same_with_and_without_a_modality(modality, tmp_path):
    prompt = sed.prompt_text("en", True, True)
    tokenizer = train_sentencepiece([prompt], tmp_path / "t.model", vocab_size=400, symbols=[])
    whole, hidden = (
        examples.encode_record(record, tokenizer, responses=()).prompt
        for record in (RECORD, withhold(RECORD, modality))
    )
    for name in ("tokens", "positions", "media_kind", "media_slot"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(hidden, name))


def test_an_absent_modality_stays_absent():
    silent = withhold(Record(**{**vars(RECORD), "audio": np.zeros(0, np.int16)}), "audio")
    assert not has_modality(silent, "audio")
    assert has_modality(silent, "video")


def test_anything_else_cannot_be_withheld():
    with pytest.raises(ValueError, match="audio, video"):
        withhold(RECORD, "text")
