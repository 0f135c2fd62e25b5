"""Structured Evidence Decomposition: the six-section target, the prompt, and reading answers back.

A target lists what is seen, then what is heard, then the reasoning, each under its own heading:

    [video_desc] A man stands in a kitchen.
    [facial_exp_desc] He smiles.
    [body_lang_desc] ...
    [acoustic_feat] ...
    [speech_content] ...
    [sentiment_analysis] ... The emotion is contempt.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from saber_jax.data import media, tmrope
from saber_jax.data.records import FIELDS, LANGUAGES
from saber_jax.data.tokenizer import Tokenizer

TEXT, VISION, AUDIO = 0, 1, 2
"""Values of `Prompt.media_kind`."""

EMOTIONS = ("happy", "sad", "angry", "neutral", "contempt", "sorrow", "unease")
_CHINESE = ("开心", "悲伤", "愤怒", "平静", "轻蔑", "哀伤", "不安")
_LEXICON = {
    "en": {word: word for word in EMOTIONS},
    "zh": dict(zip(_CHINESE, EMOTIONS, strict=True)),
}
_PATTERNS = {
    # (?![A-Za-z]) rather than \b: Chinese characters count as word characters.
    "en": re.compile(rf"(?<![A-Za-z])(?:{'|'.join(EMOTIONS)})(?![A-Za-z])", re.IGNORECASE),
    "zh": re.compile("|".join(_CHINESE)),
}
_PROMPTS = {
    "en": (
        "You read emotion from video and audio.",
        "Describe what is seen, what is heard and what is said, then name the emotion.",
    ),
    "zh": ("你从画面和声音中理解情感。", "描述所见、所闻和所说，最后判断情感。"),
}
_HEADING = re.compile(r"\[(" + "|".join(FIELDS) + r")\]")


def heading(field: str) -> str:
    """Section heading, the same in every language so that answers can be parsed."""
    return f"[{field}]"


def emotion_word(emotion: str, language: str) -> str:
    """The word for a canonical emotion as it ends an annotation in `language`."""
    words = {canonical: word for word, canonical in _LEXICON[_known(language)].items()}
    if emotion not in words:
        raise ValueError(f"Unknown emotion {emotion!r}; the known ones are {', '.join(EMOTIONS)}.")
    return words[emotion]


def target_text(annotation: Mapping[str, str], sections: Sequence[str] = FIELDS) -> str:
    """The sections, by default all six, in training order, one line break between them.

    Line breaks inside a section become spaces: a section is one line of the answer.
    """
    lines = (f"{heading(field)} {' '.join(annotation[field].split())}" for field in sections)
    return "\n".join(lines)


def prompt(language: str) -> tuple[str, str]:
    """(system message, user instruction) for "en" or "zh"."""
    return _PROMPTS[_known(language)]


def prompt_text(
    language: str, has_video: bool, has_audio: bool, instruction: str | None = None
) -> str:
    """The whole chat up to where the answer starts, in Qwen2.5-Omni's template.

    `instruction` defaults to the one of `prompt`; `saber_jax.data.tasks` has others.
    """
    system, usual = prompt(language)
    instruction = usual if instruction is None else instruction
    video = "<|vision_bos|><|VIDEO|><|vision_eos|>" if has_video else ""
    audio = "<|audio_bos|><|AUDIO|><|audio_eos|>" if has_audio else ""
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        f"<|im_start|>user\n{video}{audio}{instruction}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def parse_response(text: str) -> dict[str, str]:
    """Sections of a generated answer; "" for a missing one, the first wins if repeated.

    Tolerates any order, text before the first heading and special tokens at the end.
    """
    sections = dict.fromkeys(FIELDS, "")
    text = re.sub(r"<\|(?:im_end|endoftext)\|>.*", "", text, flags=re.DOTALL)
    matches = list(_HEADING.finditer(text))
    for index, match in enumerate(matches):
        end = matches[index + 1].start() if index + 1 < len(matches) else len(text)
        sections[match[1]] = sections[match[1]] or text[match.end() : end].strip()
    return sections


def conclusion(text: str, language: str | None = None) -> str | None:
    """The emotion an answer ends on: the last known word of its sentiment_analysis section.

    Returns one of EMOTIONS, or None if the section is missing or names none of them. `language`
    restricts the lexicon to "en" or "zh"; by default both are searched.
    """
    section = parse_response(text)["sentiment_analysis"]
    found = []
    for name in [_known(language)] if language else LANGUAGES:
        found += [(hit.start(), _LEXICON[name][hit[0].lower()]) for hit in _find(name, section)]
    return max(found)[1] if found else None


def section_of_tokens(
    tokenizer: Tokenizer, text: str
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Token ids of a target plus <|im_end|>, and each one's section 1..6 in FIELDS order.

    A heading and the line break after a section belong to that section, <|im_end|> to the last one.
    Text before the first heading counts as section 1; without any heading, <|im_end|> is section 6.

        text     [video_desc] Hi \\n [facial_exp_desc] ... [sentiment_analysis] Sad <|im_end|>
        section       1       1  1         2                       6            6       6
    """
    matches = list(_HEADING.finditer(text))
    starts = [0] + [match.start() for match in matches[1:]]
    ends = [*starts[1:], len(text)]
    names = [FIELDS.index(match[1]) + 1 for match in matches] or [1]
    ids: list[int] = []
    sections: list[int] = []
    for start, end, name in zip(starts, ends, names, strict=True):
        part = tokenizer.encode(text[start:end])
        ids += part
        sections += [name] * len(part)
    ids.append(tokenizer.id("<|im_end|>"))
    sections.append(names[-1] if matches else len(FIELDS))
    return np.asarray(ids, np.int32), np.asarray(sections, np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """An encoded prompt with its media placeholders expanded.

    `media_slot` is a unit index in the vision tower's (window) order within the clip, or
    chunk * 50 + pooled position of the audio tower within the clip, or 0 for text.
    Response token i sits at position next_position + i on all three axes.
    """

    tokens: Int[np.ndarray, " n"]
    positions: Int[np.ndarray, "3 n"]
    media_kind: Int[np.ndarray, " n"]
    media_slot: Int[np.ndarray, " n"]
    next_position: int


def encode_prompt(
    tokenizer: Tokenizer,
    language: str,
    *,
    grids: Sequence[tuple[int, int, int]],
    seconds_per_grid: float,
    audio_frames: int,
    instruction: str | None = None,
) -> Prompt:
    """Prompt of one clip: a video block per grid (t, h, w in patches), then its audio block.

    `audio_frames` counts 10 ms mel frames; fewer than three make no audio token, so the clip is
    then treated as silent.
    """
    ids = media_ids(tokenizer)
    heard = media.audio_tokens(audio_frames)
    layouts = [media.vision_layout(tuple(grid)) for grid in grids]
    text = prompt_text(language, bool(layouts), heard > 0, instruction)
    block = "<|vision_bos|><|VIDEO|><|vision_eos|>"
    text = text.replace(block, block * len(layouts))
    counts = iter([len(layout.unit_slot) for layout in layouts])
    tokens: list[int] = []
    for token in tokenizer.encode(text):
        repeat = next(counts) if token == ids.video else heard if token == ids.audio else 1
        tokens += [token] * repeat
    row = np.asarray(tokens, np.int32)
    positions = tmrope.tmrope(
        row,
        ids,
        grids=grids,
        seconds_per_grid=[seconds_per_grid] * len(layouts),
        audio_frames=[audio_frames],
    )
    kind = np.where(row == ids.video, VISION, np.where(row == ids.audio, AUDIO, TEXT))
    slot = np.zeros(len(row), np.int32)
    slot[kind == VISION] = _clip_slots(layouts)
    # Every full chunk of 200 frames pools to exactly 50 tokens, so chunk * 50 + position counts up.
    slot[kind == AUDIO] = np.arange(heard)
    return Prompt(
        tokens=row,
        positions=positions.astype(np.int32),
        media_kind=kind.astype(np.int8),
        media_slot=slot,
        next_position=int(positions.max()) + 1,
    )


def media_ids(tokenizer: Tokenizer) -> tmrope.MediaIds:
    """The media token ids of a vocabulary."""
    return tmrope.MediaIds(
        image=tokenizer.id("<|IMAGE|>"),
        video=tokenizer.id("<|VIDEO|>"),
        audio=tokenizer.id("<|AUDIO|>"),
        vision_bos=tokenizer.id("<|vision_bos|>"),
        audio_bos=tokenizer.id("<|audio_bos|>"),
    )


def _clip_slots(layouts: Sequence[media.VisionLayout]) -> Int[np.ndarray, " units"]:
    starts = np.cumsum([0] + [len(layout.unit_slot) for layout in layouts])
    slots = [layout.unit_slot + start for layout, start in zip(layouts, starts, strict=False)]
    return np.concatenate(slots) if slots else np.zeros(0, np.int32)


def _find(language: str, text: str):
    return _PATTERNS[language].finditer(text)


def _known(language: str) -> str:
    if language not in LANGUAGES:
        raise ValueError(f"Unknown language {language!r}; use one of {', '.join(LANGUAGES)}.")
    return language
