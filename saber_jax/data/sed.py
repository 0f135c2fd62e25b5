"""Structured evidence decomposition: the six-section target, the prompt, and parsing of answers.

A target lists what is seen, then what is heard, then the reasoning, each under its own heading:

    [video_desc] A man stands in a kitchen.
    [facial_exp_desc] He smiles.
    [body_lang_desc] ...
    [acoustic_feat] ...
    [speech_content] ...
    [sentiment_analysis] ... The emotion is contempt.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from saber_jax.data import chat, emotions
from saber_jax.data.records import FIELDS, LANGUAGES
from saber_jax.data.tokenizer import Tokenizer

TITLES = {
    "video_desc": "What is seen",
    "facial_exp_desc": "Face",
    "body_lang_desc": "Body",
    "acoustic_feat": "Voice",
    "speech_content": "Words",
    "sentiment_analysis": "Reasoning",
}
"""Titles of the sections, for display."""

_PROMPTS = {
    "en": (
        "You read emotion from video and audio.",
        "Describe what is seen, what is heard and what is said, then name the emotion.",
    ),
    "zh": ("你从画面和声音中理解情感。", "描述所见、所闻和所说，最后判断情感。"),
}
_SPELLED_OUT = {
    "en": (
        "Describe this clip in six sections, each on a line of its own that begins with its "
        "heading in square brackets, in this order: {headings}. They are: the scene and the "
        "people; the facial expression; posture and gestures; how the voice sounds; the "
        "words that are said; "
        "and last what all cues together mean. End the last section with one of these emotions: "
        "{emotions}."
    ),
    "zh": (
        "请分六个部分描述这段视频，每个部分占一行，以方括号中的标题开头，顺序如下：{headings}。"
        "依次是：场景和人物；面部表情；姿态和手势；声音特征；所说的话；最后是所有线索综合起来的含义。"
        "最后一个部分以下列情感之一结尾：{emotions}。"
    ),
}
_HEADING = re.compile(r"\[(" + "|".join(FIELDS) + r")\]")


def heading(field: str) -> str:
    """Section heading, the same in every language so that answers can be parsed."""
    return f"[{field}]"


def target_text(annotation: Mapping[str, str], sections: Sequence[str] = FIELDS) -> str:
    """The sections, by default all six, in training order, one line break between them.

    Line breaks inside a section become spaces: a section is one line of the answer.
    """
    lines = (f"{heading(field)} {' '.join(annotation[field].split())}" for field in sections)
    return "\n".join(lines)


def prompt(language: str) -> tuple[str, str]:
    """(system message, user instruction) for "en" or "zh"."""
    return _PROMPTS[_known(language)]


def spelled_out(language: str) -> str:
    """The request for a model without SED training, which lists the headings and emotions."""
    return _SPELLED_OUT[_known(language)].format(
        headings=" ".join(map(heading, FIELDS)),
        emotions=(", " if language == "en" else "、").join(emotions.words(language)),
    )


def messages(
    language: str, shown: Sequence[chat.Media], instruction: str | None = None
) -> list[chat.Message]:
    """The conversation before the answer: system message, media and instruction.

    `instruction` defaults to the one of `prompt`; `saber_jax.data.tasks` has others.
    """
    system, usual = prompt(language)
    return [
        chat.Message(role="system", content=(system,)),
        chat.Message(role="user", content=(*shown, usual if instruction is None else instruction)),
    ]


def prompt_text(
    language: str, has_video: bool, has_audio: bool, instruction: str | None = None
) -> str:
    """The chat up to the start of the answer, with placeholders that are not expanded yet."""
    shown: list[chat.Media] = [chat.Video(grid=(1, 2, 2), seconds_per_grid=1.0)] * has_video
    shown += [chat.Audio(frames=3)] * has_audio
    return chat.render(messages(language, shown, instruction))


def parse_response(text: str) -> dict[str, str]:
    """Sections of a generated answer: "" for a missing one, the first of repeated ones.

    Accepts any order, text before the first heading and special tokens at the end.
    """
    sections = dict.fromkeys(FIELDS, "")
    text = re.sub(r"<\|(?:im_end|endoftext)\|>.*", "", text, flags=re.DOTALL)
    matches = list(_HEADING.finditer(text))
    for index, match in enumerate(matches):
        end = matches[index + 1].start() if index + 1 < len(matches) else len(text)
        sections[match[1]] = sections[match[1]] or text[match.end() : end].strip()
    return sections


def conclusion(text: str, labels: Sequence[str] = ()) -> str | None:
    """The emotion that an answer concludes: the last one that its sentiment_analysis names.

    Returns one of `emotions.EMOTIONS` or of `labels`, which a data set has besides; None if the
    section is missing or names none of them.
    """
    return emotions.last_named(parse_response(text)["sentiment_analysis"], labels)


def section_of_tokens(
    tokenizer: Tokenizer, text: str
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Token ids of a target plus <|im_end|>, and the section of each, 1..6 in FIELDS order.

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


def encode_prompt(
    tokenizer: Tokenizer,
    language: str,
    shown: Sequence[chat.Media],
    instruction: str | None = None,
) -> chat.EncodedPrompt:
    """The encoded prompt of one clip with the media `shown`, in this order."""
    return chat.encode(tokenizer, messages(language, shown, instruction))


def _known(language: str) -> str:
    if language not in LANGUAGES:
        raise ValueError(f"Unknown language {language!r}; use one of {', '.join(LANGUAGES)}.")
    return language
