import types

import numpy as np
import pytest

from saber_jax.data import media, tmrope
from saber_jax.data.chat import (
    AUDIO,
    VISION,
    Audio,
    AudioInVideo,
    Image,
    Message,
    Video,
    encode,
    render,
)

VIDEO = Video(grid=(4, 2, 2), seconds_per_grid=1.0)
SOUND = Audio(frames=300)


def woven(video: Video, audio: Audio) -> AudioInVideo:
    return AudioInVideo(video=video, audio=audio)


def user(*content) -> Message:
    return Message(role="user", content=content)


def test_a_conversation_without_a_system_message_gets_the_released_one():
    assert render([user("Hi")]).startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>"
    )
    assert render([Message(role="system", content=("Be brief.",)), user("Hi")]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def names(tokenizer, prompt) -> str:
    """The media part of a prompt as the module's docstring draws it."""
    letters = {"VIDEO": "V", "AUDIO": "A", "vision_bos": "v", "audio_bos": "a"}
    letters |= {"vision_eos": "/v", "audio_eos": "/a"}
    ids = {tokenizer.id(f"<|{name}|>"): letter for name, letter in letters.items()}
    return " ".join(ids[token] for token in prompt.tokens.tolist() if token in ids)


def test_the_drawing_in_the_docstring(tokenizer):
    apart = encode(tokenizer, [user(VIDEO, SOUND)])
    drawn = names(tokenizer, apart).replace(" A" * 25, " .")
    assert drawn.replace(".", "A") == "v V V V V /v a A A A /a"
    woven = encode(tokenizer, [user(AudioInVideo(video=VIDEO, audio=SOUND))])
    drawn = names(tokenizer, woven).replace(" A" * 25, " .")
    assert drawn.replace(".", "A") == "v a V V A A V V A /a /v"


def test_media_of_several_turns_take_slots_in_the_order_they_stand(tokenizer):
    first = AudioInVideo(video=Video(grid=(1, 2, 4), seconds_per_grid=1.0), audio=Audio(frames=203))
    prompt = encode(
        tokenizer,
        [
            user(Image(grid=(1, 2, 2)), "What is this?", first),
            Message(role="assistant", content=("A face.",)),
            user(Audio(frames=9), woven(VIDEO, SOUND)),
        ],
    )
    seen = prompt.media_slot[prompt.media_kind == VISION]
    heard = prompt.media_slot[prompt.media_kind == AUDIO]
    assert seen.tolist() == list(range(1 + 2 + 4))
    # 203 frames fill one chunk and begin a second, so the next sound starts in the third.
    assert heard[:53].tolist() == [*range(51), 100, 101]


def test_every_slot_exists_in_the_joined_layout():
    grids = [(1, 6, 10), (2, 4, 4)]
    parts = [media.vision_layout(grid) for grid in grids]
    joined = media.join_layouts(parts)
    assert sorted(joined.order.tolist()) == list(range(60 + 32))
    assert sorted(joined.unit_slot.tolist()) == list(range(15 + 8))
    assert joined.window.max() == parts[0].window.max() + parts[1].window.max()
    assert joined.frame[60:].min() == parts[0].frame.max() + 1
    np.testing.assert_array_equal(joined.order[4 * joined.unit_slot] // 4, np.arange(23))


def test_woven_and_plain_videos_in_one_conversation_are_refused(tokenizer):
    both = [user(woven(VIDEO, SOUND), "and"), user(VIDEO, SOUND)]
    with pytest.raises(ValueError, match="interleave all of them or none"):
        encode(tokenizer, both)
    picture = Image(grid=(1, 2, 2))
    encode(tokenizer, [user(woven(VIDEO, SOUND), picture, SOUND, woven(VIDEO, SOUND))])


@pytest.mark.parametrize("text", ["<|VIDEO|>", "say <|audio_bos|>", "no <|im_end|>"])
def test_text_that_would_be_read_as_media_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match="would be read as media"):
        encode(tokenizer, [user(VIDEO, text)])


@pytest.mark.parametrize("frames", [0, 1, 2])
def test_a_sound_too_short_for_a_token_is_refused(tokenizer, frames):
    with pytest.raises(ValueError):
        encode(tokenizer, [user(Audio(frames=frames))])


def test_woven_tokens_stand_in_the_order_of_the_released_processor():
    pytest.importorskip("torch")
    omni = pytest.importorskip("transformers.models.qwen2_5_omni.processing_qwen2_5_omni")
    processor = types.SimpleNamespace(
        audio_bos_token="",
        audio_eos_token="",
        video_token="V",
        audio_token="A",
        video_processor=types.SimpleNamespace(merge_size=2),
    )
    method = omni.Qwen2_5OmniProcessor
    processor.get_chunked_index = types.MethodType(method.get_chunked_index, processor)
    rng = np.random.default_rng(0)
    for _ in range(300):
        grid = (int(rng.integers(1, 20)), *(2 * rng.integers(1, 4, 2)).tolist())
        # Rates in eighths of a frame a second, among them those whose cuts float32 moves.
        seconds, heard = 2 / (rng.integers(4, 240) / 8), int(rng.integers(1, 900))
        expected = method.replace_video_with_audio_token(
            processor,
            {"video_grid_thw": np.array([grid]), "video_second_per_grid": [seconds]},
            0,
            {"num_audio_tokens": np.array([heard])},
            0,
            position_id_per_seconds=25,
            seconds_per_chunk=2.0,
        )
        got = "".join("VA"[kind] for kind in tmrope.woven(grid, seconds, heard).astype(int))
        assert got == expected, (grid, seconds, heard)
