"""Twenty answers to five clips, ranked by hand: in each clip the first is the best, and so on.

The second falls short a little, the third and the fourth contradict themselves, the clip, or both.
"""

import dataclasses
from collections.abc import Mapping

from saber_jax.data.records import FIELDS


@dataclasses.dataclass(frozen=True)
class Clip:
    language: str
    annotation: Mapping[str, str]
    answers: tuple[Mapping[str, str], ...]


def _said(*sections: str) -> dict[str, str]:
    return dict(zip(FIELDS, sections, strict=True))


INTERVIEW = _said(
    "A man in a grey suit sits at a desk, a poster behind him.",
    "He smiles broadly at the camera.",
    "His hands hold the edge of the desk.",
    "His voice trembles and he stammers twice.",
    "I am really looking forward to this.",
    "He smiles, but his trembling voice contradicts it: the smile masks fear. He is worried.",
)
QUARREL = _said(
    "A woman stands in a kitchen beside a white door.",
    "She frowns and glares at somebody.",
    "She points at the door.",
    "She shouts in a harsh voice.",
    "You broke it again.",
    "Face and voice agree: she is angry.",
)
PRAISE = _said(
    "Two colleagues in an office; a woman turns to the left.",
    "She smirks and rolls her eyes.",
    "She leans back with crossed arms.",
    "Her voice is bright and lively, exaggerated.",
    "That was a great idea.",
    "The words praise and the voice is cheerful, but the smirk contradicts them: sarcasm. "
    "The emotion is contempt.",
)
FAREWELL = _said(
    "一个女人站在车站，身边有红色行李箱。",
    "她流泪，嘴角下垂。",
    "她低头挥手。",
    "语速慢，音量小，她叹气。",
    "再见，一路平安。",
    "表情和声音一致，她很悲伤。",
)
GIFT = _said(
    "A girl in a yellow dress opens a box at a table.",
    "She laughs and beams.",
    "She jumps up.",
    "Her voice is high, bright and lively.",
    "I love it, thank you.",
    "Face, voice and words agree. She is happy.",
)


def _clip(language: str, truth: dict[str, str], *others: Mapping[str, str]) -> Clip:
    return Clip(language, truth, (truth, *(truth | other for other in others)))


CLIPS = (
    _clip(
        "en",
        INTERVIEW,
        {  # Right, with less of the evidence.
            "video_desc": "A man sits at a desk.",
            "body_lang_desc": "",
            "sentiment_analysis": "He smiles, but the trembling voice contradicts it. Worried.",
        },
        {  # Notes the trembling voice, and concludes from the smile alone.
            "sentiment_analysis": "His smile shows it: he is happy.",
        },
        {  # The same, with a voice that is not in the clip and is contradicted by the reasoning.
            "acoustic_feat": "He shouts loudly.",
            "sentiment_analysis": "Face happy, voice sad, they agree: he is happy.",
        },
    ),
    _clip(
        "en",
        QUARREL,
        {  # Right, with a detail of the scene that is wrong.
            "video_desc": "A woman sits in a garden.",
        },
        {  # The evidence of anger, and then sadness.
            "sentiment_analysis": "Face and voice agree: she is sad.",
        },
        {  # The evidence of anger, and then joy.
            "body_lang_desc": "She waves and nods.",
            "sentiment_analysis": "Face and voice agree: she is happy.",
        },
    ),
    _clip(
        "en",
        PRAISE,
        {  # The conflict is seen, the scene is not described.
            "video_desc": "",
            "body_lang_desc": "She sits.",
        },
        {  # Takes the words and the voice for true and passes over the face.
            "sentiment_analysis": "She praises the idea in a bright voice. She is happy.",
        },
        {  # The same, with a smile that is not in the clip and an opposite claim.
            "facial_exp_desc": "Tears run down.",
            "sentiment_analysis": "Face angry, voice sad, they agree. She is happy.",
        },
    ),
    _clip(
        "zh",
        FAREWELL,
        {  # Right, with another case.
            "video_desc": "一个女人站在街上。",
        },
        {  # Tears and sighs, and then anger.
            "sentiment_analysis": "表情和声音一致，她很愤怒。",
        },
        {  # Tears and sighs, and then joy, with words that were not said.
            "speech_content": "太棒了。",
            "sentiment_analysis": "表情开心，声音开心，她很开心。",
        },
    ),
    _clip(
        "en",
        GIFT,
        {  # Right, with less of the evidence.
            "video_desc": "A girl at a table.",
            "body_lang_desc": "",
        },
        {  # Everything agrees, and the answer sees a conflict.
            "sentiment_analysis": "Her face is happy, but her voice contradicts it. She is sad.",
        },
        {  # A conclusion against all evidence, and evidence of another clip.
            "facial_exp_desc": "She frowns.",
            "acoustic_feat": "A low, slow voice.",
            "sentiment_analysis": "Face and voice agree. She is happy.",
        },
    ),
)
