"""Words of the embedded corpus: spoken sentences and the six annotation fields, in two languages.

Every field describes what was rendered, in a small closed vocabulary. The face field determines
the face emotion and the acoustic field the voice emotion, so the conclusion at the end follows from
the evidence before it. All text here is the project's own.
"""

from data_prep.corpus.plan import Clip

SENTENCES: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "positive": (
            "What a lovely day.",
            "I love this gift.",
            "This is really great.",
            "We won the game.",
            "You did so well.",
            "That was good fun.",
        ),
        "negative": (
            "I lost my keys.",
            "This is a bad day.",
            "My bike is broken.",
            "We missed the train.",
            "That hurt a lot.",
            "They broke my window.",
        ),
        "neutral": (
            "The door is open.",
            "It is half past two.",
            "The bus is blue.",
            "We meet on Monday.",
            "The book is here.",
            "I am at the table.",
        ),
    },
    "zh": {
        "positive": (
            "这礼物真好。",
            "我们赢了。",
            "你做得很好。",
            "天气真好。",
            "我喜欢这里。",
            "真是太棒了。",
        ),
        "negative": (
            "我丢了钥匙。",
            "今天太糟了。",
            "车子坏了。",
            "我们迟到了。",
            "这里很疼。",
            "他打破了窗。",
        ),
        "neutral": (
            "门是开的。",
            "现在两点半。",
            "书在桌上。",
            "周一见面。",
            "车是蓝色的。",
            "我在家里。",
        ),
    },
}

_COLOURS_ZH = {
    "red": "红色",
    "blue": "蓝色",
    "green": "绿色",
    "yellow": "黄色",
    "purple": "紫色",
    "grey": "灰色",
    "orange": "橙色",
    "white": "白色",
}

# Descriptions of the face that do not name the emotion, which has to be concluded.
_FACE = {
    "en": {
        "happy": "Broad smile, raised cheeks.",
        "sad": "Mouth corners down, inner brows raised.",
        "angry": "Bared teeth, brows pulled down.",
        "neutral": "Level mouth, flat brows.",
    },
    "zh": {
        "happy": "嘴角上扬，脸颊抬起。",
        "sad": "嘴角下垂，眉头抬起。",
        "angry": "露出牙齿，眉头压低。",
        "neutral": "嘴巴平直，眉毛平直。",
    },
}
_VOICE = {
    "en": {
        "happy": "High pitch, fast, clear volume, bright tone.",
        "sad": "Low pitch, slow, soft volume, dull tone.",
        "angry": "Strong pitch, fast, loud volume, harsh tone.",
        "neutral": "Middle pitch, even, medium volume, plain tone.",
    },
    "zh": {
        "happy": "音调高，语速快，音量清楚，音色亮。",
        "sad": "音调低，语速慢，音量小，音色暗。",
        "angry": "音调强，语速快，音量大，音色粗。",
        "neutral": "音调中，语速平，音量中，音色普通。",
    },
}
_GESTURE = {
    "en": {
        "none": "none",
        "nod": "Head nods.",
        "shake": "Head shakes.",
        "tilt": "Head tilts.",
        "hand": "Hand raised.",
    },
    "zh": {
        "none": "无",
        "nod": "点头。",
        "shake": "摇头。",
        "tilt": "歪头。",
        "hand": "举手。",
    },
}
EMOTION_WORDS = {
    "en": {
        "happy": "happy",
        "sad": "sad",
        "angry": "angry",
        "neutral": "neutral",
        "contempt": "contempt",
        "sorrow": "sorrow",
        "unease": "unease",
    },
    "zh": {
        "happy": "开心",
        "sad": "悲伤",
        "angry": "愤怒",
        "neutral": "平静",
        "contempt": "轻蔑",
        "sorrow": "哀伤",
        "unease": "不安",
    },
}
_VALENCE_ZH = {"positive": "积极", "negative": "消极", "neutral": "中性"}
_CONFLICT = {
    "en": {
        "none": "agree",
        "sarcasm": "conflict, sarcasm",
        "masking": "conflict, masking",
        "suppression": "conflict, suppression",
        "leakage": "conflict, leakage",
    },
    "zh": {
        "none": "一致",
        "sarcasm": "矛盾，讽刺",
        "masking": "矛盾，掩饰",
        "suppression": "矛盾，压抑",
        "leakage": "矛盾，流露",
    },
}


def sentence(clip: Clip) -> str:
    """The sentence spoken in `clip`, exactly as written in speech_content."""
    return SENTENCES[clip.language][clip.words][clip.sentence]


def _video(clip: Clip) -> str:
    if clip.language == "zh":
        person = "女人" if clip.gender == "female" else "男人"
        return f"{person}近景，{_COLOURS_ZH[clip.shirt]}上衣，{_COLOURS_ZH[clip.background]}背景。"
    person = "woman" if clip.gender == "female" else "man"
    return f"Close-up, {person}, {clip.shirt} shirt, {clip.background} background."


def _sentiment(clip: Clip) -> str:
    word = EMOTION_WORDS[clip.language]
    conflict = _CONFLICT[clip.language][clip.conflict_type]
    face, voice, fused = word[clip.face], word[clip.voice], word[clip.emotion]
    if clip.language == "zh":
        words = _VALENCE_ZH[clip.words]
        return f"表情{face}，声音{voice}，话语{words}：{conflict}。情绪：{fused}"
    return f"Face {face}, voice {voice}, words {clip.words}: {conflict}. Emotion: {fused}"


def annotation(clip: Clip) -> dict:
    """The SABER JSON object of one clip; sentiment_analysis ends with the fused emotion word."""
    return {
        "audio_desc": {
            "speech_content": sentence(clip),
            "acoustic_feat": _VOICE[clip.language][clip.voice],
        },
        "video_desc": _video(clip),
        "facial_exp_desc": _FACE[clip.language][clip.face],
        "body_lang_desc": _GESTURE[clip.language][clip.gesture],
        "sentiment_analysis": _sentiment(clip),
    }
