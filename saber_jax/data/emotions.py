"""The emotions that an answer may conclude, and the words that name them in a text.

Annotators and models write the same emotion in several forms: "sad", "sadness", "伤心". The forms
are inflections and the names that labels of public corpora use. Adverbs are none ("he smiles
happily"): they say how something is done, and would be taken for what is concluded.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence

_FORMS = {
    "happy": ("happy happiness joy joyful joyous", "开心 高兴 快乐 喜悦 愉快"),
    "sad": ("sad sadness", "悲伤 难过 伤心"),
    "angry": ("angry anger", "愤怒 生气 气愤"),
    "neutral": ("neutral neutrality", "平静 中性 中立"),
    "contempt": ("contempt contemptuous", "轻蔑 蔑视 鄙视"),
    "sorrow": ("sorrow sorrowful", "哀伤"),
    "unease": ("unease uneasy uneasiness", "不安"),
    "fear": ("fear fearful", "恐惧 害怕"),
    "disgust": ("disgust disgusted", "厌恶"),
    "surprise": ("surprise surprised", "惊讶 吃惊"),
    "worried": ("worried worry", "担忧 担心"),
}
EMOTIONS = tuple(_FORMS)
"""SABER's seven emotions, and those that other corpora label."""

LABELS = ("emotion", "face", "voice", "words")
"""Keys of labels.jsonl that name an emotion; `words` may have a valence instead."""

_EMOTION_OF = {
    form: emotion for emotion, both in _FORMS.items() for forms in both for form in forms.split()
}
_NEGATION = re.compile(
    r"(?:\b(?:no|not(?!\s+(?:only|just|merely))|without|never|hardly|nor)(?:\s+\w+)?|n't(?:\s+\w+)?"
    r"|没有?|不(?:太|是|怎么|够)?|并非|无)\s*$",
    re.IGNORECASE,
)


def words(language: str) -> list[str]:
    """The usual word for each of EMOTIONS in "en" or "zh"."""
    place = ("en", "zh").index(language)
    return [both[place].split()[0] for both in _FORMS.values()]


def canonical(name: str) -> str:
    """The one of EMOTIONS that a label names in any form; any other label as it is."""
    return _EMOTION_OF.get(name.strip().lower(), name)


def canonical_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels of a clip, with `canonical` names of emotions."""
    return {key: canonical(name) if key in LABELS else name for key, name in labels.items()}


def in_labels(labels: Iterable[Mapping[str, str]]) -> list[str]:
    """Every emotion that the labels of these clips name. A valence, such as positive, is none."""
    kinds = [kind for kind in LABELS if kind != "words"]
    return sorted({canonical(each[kind]) for each in labels for kind in kinds if each.get(kind)})


def negated(text: str, at: int) -> bool:
    """Whether a negation ends at most one word before the word at text[at]: "not very happy"."""
    return _NEGATION.search(text, 0, at) is not None


def last_named(text: str, labels: Sequence[str] = ()) -> str | None:
    """The last emotion that a text names and does not negate: one of EMOTIONS, or of `labels`,
    which a data set has besides, in its spelling. None if it names none."""
    pattern, label_of = _known(tuple(labels))
    found = [hit[0] for hit in pattern.finditer(text) if not negated(text, hit.start())]
    return label_of[found[-1].lower()] if found else None


@functools.cache
def _known(labels: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """A pattern of all words, and the emotion of each."""
    label_of = {label.lower(): label for label in labels} | _EMOTION_OF
    longest_first = sorted(label_of, key=len, reverse=True)
    # (?![A-Za-z]) rather than \b: Chinese characters count as word characters.
    parts = [
        rf"(?<![A-Za-z]){re.escape(word)}(?![A-Za-z])" if word.isascii() else re.escape(word)
        for word in longest_first
    ]
    return re.compile("|".join(parts), re.IGNORECASE), label_of
