"""A small lexicon of words that indicate an emotion, in English and Chinese.

It is made for the embedded corpus and for plain descriptions of faces and voices. It does not cover
idioms, irony or other languages. Functions return None for a text without known words.
"""

import re
from collections.abc import Iterator
from typing import Literal

from saber_jax.data import emotions

Channel = Literal["face", "voice", "words"]

# Groups of emotions that annotators do not reliably distinguish; the names of the groups are ours.
FAMILIES = {
    "happy": "joy",
    "neutral": "neutral",
    "surprise": "surprise",
    "sad": "grief",
    "sorrow": "grief",
    "angry": "hostility",
    "contempt": "hostility",
    "disgust": "hostility",
    "fear": "fear",
    "unease": "fear",
    "worried": "fear",
}
VALENCES = {"joy": 1, "neutral": 0, "surprise": 0, "grief": -1, "hostility": -1, "fear": -1}

_FACE = {
    "joy": r"smil|grin|laugh|beam|raised cheeks|cheeks raised|笑|嘴角上扬|脸颊抬起|喜悦",
    "grief": r"corners? (?:turned )?down|inner brows raised|tear|cry|weep|sob|downcast|drooping|"
    r"嘴角下垂|眉头抬起|流泪|泪|哭|低头|垂头",
    "hostility": r"bared teeth|brows pulled down|glar|scowl|frown|clench|sneer|smirk|"
    r"roll\w* (?:his|her|their) eyes|wrinkled nose|curled lip|露出牙齿|眉头压低|皱眉|瞪|咬牙|冷笑|"
    r"翻白眼|撇嘴",
    "fear": r"wide(?:ned)? eyes|wide-eyed|flinch|shrink|trembl|bit\w* (?:his|her|their) lip|"
    r"睁大|退缩|颤抖|发抖|咬着嘴唇",
    "surprise": r"jaw drop|gap(?:es|ing)|raised eyebrows|eyebrows raised|张大嘴|挑眉",
    "neutral": r"level mouth|flat brows|expressionless|blank|no expression|relaxed face|嘴巴平直|"
    r"眉毛平直|面无表情",
}
_VOICE = {
    "joy": r"high pitch|bright|cheer|lively|laugh|chuckl|warm|音调高|音色亮|欢快|轻快|笑声",
    "grief": r"low pitch|slow|soft|dull|sigh|sob|weary|choked|音调低|语速慢|音量小|音色暗|"
    r"叹气|哽咽|抽泣",
    "hostility": r"strong pitch|loud|harsh|shout|yell|sharp|growl|mocking|sarcastic|sneering|"
    r"音调强|音量大|音色粗|大喊|吼|尖锐|嘲讽",
    "fear": r"trembl|shak|quiver|unsteady|stammer|stutter|hesita|falter|颤抖|发抖|结巴|犹豫",
    "surprise": r"gasp|exclaim|惊呼|倒吸",
    "neutral": r"middle pitch|even\b|medium|plain|calm|steady|monoton|音调中|语速平|"
    r"音量中|音色普通|平稳",
}
_WORDS = {
    "joy": r"lovely|love|adore|enjoy|celebrat|great|won\b|\bwins?\b|well|good|fun\b|thank|glad|"
    r"wonderful|happy|真好|赢|很好|喜欢|热爱|庆祝|太棒|谢谢|高兴",
    "grief": r"lost|bad|broken|broke|missed|mourn|hurt|sorry|terrible|afraid|丢|太糟|坏了|"
    r"迟到|疼|打破|想念|失去|对不起",
    "hostility": r"hate|curse|despise|讨厌|痛骂",
}
_TABLES: dict[Channel, dict[str, str]] = {"face": _FACE, "voice": _VOICE, "words": _WORDS}
_CUES = {
    modality: {family: re.compile(cues, re.IGNORECASE) for family, cues in table.items()}
    for modality, table in _TABLES.items()
}
_NAMES: dict[Channel, re.Pattern[str]] = {
    "face": re.compile(r"fac(?:e|ial)|expression|表情|脸|面部|神情", re.IGNORECASE),
    "voice": re.compile(r"voice|vocal|tone|声音|语气|语调|嗓音", re.IGNORECASE),
    "words": re.compile(r"words|say|said|speech|话语|话|台词", re.IGNORECASE),
}
# "Voice: sad" is one clause; elsewhere a colon ends one.
_HEADED = re.compile(rf"({'|'.join(name.pattern for name in _NAMES.values())})\s*[:：]", re.I)
_SIGNS = {
    "joy": re.compile(r"positive|积极", re.IGNORECASE),
    "grief": re.compile(r"negative|消极", re.IGNORECASE),
}
_CLAUSE = re.compile(r"[,;.:!?，；。：！？]|\b(?:and|but|while|yet|whereas|although)\b|但|却|而")
_CONFLICT = re.compile(
    r"conflict|contradict|despite|although|though|\bbut\b|however|\byet\b|whereas|mask|"
    r"hid(?:e|es|ing)|conceal|suppress|sarcas|mislead|iron|forced|at odds|disagree|does not match|"
    r"矛盾|不一致|不符|但|却|虽然|尽管|掩饰|压抑|讽刺|反话|强颜",
    re.IGNORECASE,
)
_AGREEMENT = re.compile(
    r"(?<!dis)agree|(?<!in)consistent|(?<!not )match|fit together|(?<!不)一致|吻合", re.IGNORECASE
)


def suggested(text: str, modality: Channel) -> str | None:
    """The family of emotions that most cues of this evidence belong to; None if there is a tie.

    A cue is not counted if one of the two words before it is a negation.
    """
    counts = {
        family: sum(not emotions.negated(text, hit.start()) for hit in cues.finditer(text))
        for family, cues in _CUES[modality].items()
    }
    most = max(counts.values())
    leading = [family for family, count in counts.items() if count == most]
    return leading[0] if most and len(leading) == 1 else None


def claimed(reasoning: str, modality: Channel) -> str | None:
    """The family of emotions that the reasoning says this modality shows; None if it says none."""
    for clause in _clauses(reasoning, modality):
        if (said := emotions.last_named(clause)) is not None:
            return FAMILIES[said]
        for family, sign in _SIGNS.items():
            if sign.search(clause):
                return family
    return None


def named(reasoning: str, modality: Channel) -> str | None:
    """As `claimed`, but only of an emotion that is named: "words negative" names none."""
    said = (emotions.last_named(clause) for clause in _clauses(reasoning, modality))
    return next((FAMILIES[emotion] for emotion in said if emotion is not None), None)


def _clauses(reasoning: str, modality: Channel) -> Iterator[str]:
    for clause in _CLAUSE.split(_HEADED.sub(r"\1 ", reasoning)):
        if clause and _NAMES[modality].search(clause):
            yield clause


def notes_conflict(reasoning: str) -> bool:
    """Whether the reasoning says that the modalities do not agree."""
    return bool(_CONFLICT.search(reasoning))


def notes_agreement(reasoning: str) -> bool:
    """Whether the reasoning says that they agree, and not the opposite as well."""
    return bool(_AGREEMENT.search(reasoning)) and not notes_conflict(reasoning)
