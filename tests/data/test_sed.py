import re

import numpy as np
import pytest

from saber_jax.data import chat, emotions, media, records, sed
from saber_jax.data.tokenizer import train_sentencepiece

ENGLISH = dict(
    zip(
        records.FIELDS,
        ["A kitchen.", "She smiles.", "", "High\nand loud.", "Go on!", "A mask. Emotion: unease"],
        strict=True,
    )
)
CHINESE = dict(
    zip(
        records.FIELDS,
        ["厨房。", "她微笑。", "", "音调高。", "继续！", "表情开心，声音愤怒。情绪：轻蔑"],
        strict=True,
    )
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    out = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    texts = [sed.target_text(ENGLISH), sed.target_text(CHINESE)]
    symbols = [sed.heading(field) for field in records.FIELDS]
    return train_sentencepiece(texts, out, vocab_size=400, symbols=symbols)


def test_a_target_lists_sight_then_sound_then_reasoning():
    assert sed.target_text(ENGLISH).splitlines() == [
        "[video_desc] A kitchen.",
        "[facial_exp_desc] She smiles.",
        "[body_lang_desc] ",
        "[acoustic_feat] High and loud.",
        "[speech_content] Go on!",
        "[sentiment_analysis] A mask. Emotion: unease",
    ]


@pytest.mark.parametrize("annotation", [ENGLISH, CHINESE])
def test_a_target_parses_back(annotation):
    flat = {field: " ".join(text.split()) for field, text in annotation.items()}
    assert sed.parse_response(sed.target_text(annotation)) == flat


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("", {}),
        ("no headings at all", {}),
        ("[video_desc]", {}),
        ("Sure! [video_desc]x", {"video_desc": "x"}),
        ("[speech_content] b\n[video_desc] a", {"video_desc": "a", "speech_content": "b"}),
        ("[video_desc] a\nb\n\n[speech_content] c", {"video_desc": "a\nb", "speech_content": "c"}),
        ("[video_desc] a [video_desc] b", {"video_desc": "a"}),
        ("[video_desc] [unknown] a", {"video_desc": "[unknown] a"}),
        ("[video_desc] a<|im_end|>\n[speech_content] b", {"video_desc": "a"}),
        ("[video_desc] a<|endoftext|>", {"video_desc": "a"}),
    ],
)
def test_malformed_answers_give_what_they_hold(response, found):
    assert sed.parse_response(response) == {**dict.fromkeys(records.FIELDS, ""), **found}


def test_the_conclusion_is_what_the_reasoning_names_last():
    text = "[video_desc] sad 愤怒\n[sentiment_analysis] A happy face. Emotion: Contempt."
    assert sed.conclusion(text) == "contempt"
    assert sed.conclusion(text.replace("Contempt", "boredom")) == "happy"
    assert sed.conclusion(text.replace("Contempt", "Boredom"), ["boredom", "sad"]) == "boredom"


def test_there_is_no_conclusion_without_the_reasoning_section():
    assert sed.conclusion("[video_desc] She is happy") is None


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_emotions_that_a_request_spells_out_are_read_back(language):
    asked = sed.spelled_out(language)
    listed = re.split(": |：", asked)[-1] if language == "en" else asked.split("结尾：")[-1]
    words = re.split("[,、] ?", listed.rstrip(".。"))
    found = [sed.conclusion(f"[sentiment_analysis] x {word}。") for word in words]
    assert found == list(emotions.EMOTIONS)


def test_unknown_languages_are_refused():
    with pytest.raises(ValueError, match="'fr'"):
        sed.prompt("fr")


@pytest.mark.parametrize("annotation", [ENGLISH, CHINESE])
def test_every_token_knows_its_section(tokenizer, annotation):
    text = sed.target_text(annotation)
    ids, sections = sed.section_of_tokens(tokenizer, text)
    assert tokenizer.decode(ids[:-1]) == text
    assert (ids[-1], sections[-1]) == (tokenizer.id("<|im_end|>"), 6)
    assert np.all(np.diff(sections) >= 0)
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        stop = -1 if number == 6 else None
        assert tokenizer.decode(ids[sections == number][:stop]) == line


def test_text_before_the_first_heading_belongs_to_section_one(tokenizer):
    ids, sections = sed.section_of_tokens(tokenizer, "Well: [speech_content] hi")
    assert sections[0] == 1 or sections[0] == 5
    assert tokenizer.decode(ids[:-1]) == "Well: [speech_content] hi"


def test_the_prompt_is_qwens_chat_template():
    system, instruction = sed.prompt("en")
    assert sed.prompt_text("en", True, True) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
        "<|vision_bos|><|VIDEO|><|vision_eos|><|audio_bos|><|AUDIO|><|audio_eos|>"
        f"{instruction}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("language", records.LANGUAGES)
def test_a_prompt_expands_to_one_token_per_unit_of_media(tokenizer, language):
    encoded = encode(tokenizer, language, grids=[(4, 6, 10)], audio_frames=517)
    text = sed.prompt_text(language, True, True)
    parts = text.replace("<|VIDEO|>", "<|VIDEO|>" * 60).replace("<|AUDIO|>", "<|AUDIO|>" * 129)
    assert encoded.tokens.tolist() == tokenizer.encode(parts)
    assert (encoded.media_kind == chat.VISION).sum() == 60
    assert (encoded.media_kind == chat.AUDIO).sum() == 129
    video = encoded.tokens == tokenizer.id("<|VIDEO|>")
    np.testing.assert_array_equal(video, encoded.media_kind == chat.VISION)


def encode(tokenizer, language="en", *, grids=(), audio_frames=0, seconds_per_grid=1.0):
    shown = [chat.Video(grid=grid, seconds_per_grid=seconds_per_grid) for grid in grids]
    shown += [chat.Audio(frames=audio_frames)] if audio_frames else []
    return sed.encode_prompt(tokenizer, language, shown)


def test_vision_slots_follow_the_towers_window_order(tokenizer):
    grid = (2, 6, 10)  # 3 x 5 units: windows of 3 x 4 and 3 x 1.
    encoded = encode(tokenizer, grids=[grid], audio_frames=0)
    slots = encoded.media_slot[encoded.media_kind == chat.VISION]
    np.testing.assert_array_equal(slots, media.vision_layout(grid).unit_slot)
    first_frame = [[0, 1, 2, 3, 12], [4, 5, 6, 7, 13], [8, 9, 10, 11, 14]]
    np.testing.assert_array_equal(slots[:15].reshape(3, 5), first_frame)


def test_slots_of_a_second_video_continue_after_the_first(tokenizer):
    encoded = encode(tokenizer, grids=[(1, 2, 2), (1, 2, 4)], audio_frames=0)
    assert encoded.media_slot[encoded.media_kind == chat.VISION].tolist() == [0, 1, 2]
    assert encoded.tokens.tolist().count(tokenizer.id("<|vision_bos|>")) == 2


def test_audio_slots_count_fifty_to_a_chunk(tokenizer):
    encoded = encode(tokenizer, grids=[], audio_frames=430)
    chunks = media.audio_chunks(np.zeros((430, 128), np.float32))[1]
    expected = [
        chunk * media.CHUNK_TOKENS + position
        for chunk, length in enumerate(chunks)
        for position in range(media.audio_tokens(int(length)))
    ]
    assert encoded.media_slot[encoded.media_kind == chat.AUDIO].tolist() == expected


def test_text_goes_on_after_the_media_clock(tokenizer):
    encoded = encode(tokenizer, grids=[(2, 2, 2)], audio_frames=0, seconds_per_grid=2.0)
    video = encoded.positions[:, encoded.media_kind == chat.VISION]
    np.testing.assert_array_equal(video[0] - video[0, 0], [0, 50])
    after = int(np.flatnonzero(encoded.media_kind == chat.VISION)[-1]) + 1
    np.testing.assert_array_equal(encoded.positions[:, after], [video[0, 1] + 1] * 3)


def test_an_answer_goes_on_from_the_text_before_it(tokenizer):
    video = chat.Video(grid=(2, 4, 6), seconds_per_grid=1.9)
    woven = chat.AudioInVideo(video=video, audio=chat.Audio(frames=50))
    encoded = sed.encode_prompt(tokenizer, "en", [woven], "Sarcasm?")
    # The text goes on after the sound, and ends before the last frame.
    assert encoded.positions[0, -1] < encoded.positions[0].max()
    assert encoded.next_position == encoded.positions[0, -1] + 1
