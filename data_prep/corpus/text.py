"""Words of the embedded corpus: spoken sentences and the six annotation fields, in two languages.

Every field describes what was rendered, in a small closed vocabulary. The face field determines
what the face suggests, the acoustic field the voice and the verb of the sentence the words, so the
conclusion at the end follows from the evidence before it. All text here is the project's own.
"""

from data_prep.corpus.plan import Clip

SUBJECTS = {
    "en": (
        *("Anna", "Peter", "Lucy", "Oscar", "Grandma", "Michael"),
        *("Father", "Susan", "Everyone", "Doctors", "Kevin", "Betty"),
    ),
    "zh": (
        *("安娜", "妈妈", "老师", "哥哥", "医生", "邻居"),
        *("爸爸", "小王", "大家", "警察", "奶奶", "学生"),
    ),
}
VERBS = {
    "en": {
        "happy": ("celebrated", "enjoyed"),
        "sad": ("missed", "mourned"),
        "angry": ("despised", "cursed"),
        "neutral": ("photographed", "saw"),
    },
    "zh": {
        "happy": ("喜欢", "庆祝"),
        "sad": ("想念", "失去了"),
        "angry": ("讨厌", "痛骂"),
        "neutral": ("看见", "拍摄"),
    },
}
OBJECTS = {
    "en": ("music", "winter", "coffee", "dogs", "gardens", "tomatoes"),
    "zh": ("音乐", "冬天", "咖啡", "大狗", "花园", "西瓜"),
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
# What the reasoning says of face and voice, of voice and words, and of all three, by conflict type.
# The two comparisons have words of their own: with the same ones, a small network repeats its first
# result instead of comparing again. The verdicts are equally long, so that preference training
# cannot learn a length instead.
_COMPARED = {
    "en": {
        "none": ("match", "agree", "All three agree, openness"),
        "masking": ("clash", "agree", "The face misleads, masking"),
        "leakage": ("clash", "differ", "The voice misleads, leakage"),
        "sarcasm": ("match", "differ", "The words mislead, sarcasm"),
    },
    "zh": {
        "none": ("吻合", "一致", "三者一致，坦率"),
        "masking": ("冲突", "一致", "表情矛盾，掩饰"),
        "leakage": ("冲突", "不同", "声音矛盾，流露"),
        "sarcasm": ("吻合", "不同", "话语矛盾，讽刺"),
    },
}


def sentence(clip: Clip) -> str:
    """The sentence spoken in `clip`, exactly as written in speech_content."""
    words = _spoken(clip)
    return "".join(words) + "。" if clip.language == "zh" else " ".join(words) + "."


def _spoken(clip: Clip) -> tuple[str, str, str]:
    """The subject, the verb and the object of the sentence."""
    subject, verb, thing = clip.sentence
    return (
        SUBJECTS[clip.language][subject],
        VERBS[clip.language][clip.words][verb],
        OBJECTS[clip.language][thing],
    )


def _video(clip: Clip) -> str:
    if clip.language == "zh":
        person = "女人" if clip.gender == "female" else "男人"
        return f"{person}近景，{_COLOURS_ZH[clip.shirt]}上衣，{_COLOURS_ZH[clip.background]}背景。"
    person = "woman" if clip.gender == "female" else "man"
    return f"Close-up, {person}, {clip.shirt} shirt, {clip.background} background."


def _sentiment(clip: Clip) -> str:
    """The reasoning, in steps that a small network can learn: two comparisons of two cues each.

    In Chinese a colon stands between a cue and its emotion. Without one, the vocabulary has pieces
    such as the four characters of "voice happy", which differ for each cue.
    """
    word = EMOTION_WORDS[clip.language]
    face, voice, words = word[clip.face], word[clip.voice], word[clip.words]
    _, verb, _ = _spoken(clip)
    seen, heard, verdict = _COMPARED[clip.language][clip.conflict_type]
    if clip.language == "zh":
        return (
            f"表情：{face}，声音：{voice}，{seen}。话语“{verb}”。声音：{voice}，话语：{words}，{heard}。"
            f"{verdict}。情绪：{word[clip.emotion]}"
        )
    return (
        f'Face {face}, voice {voice}: {seen}. Words "{verb}". '
        f"Voice {voice}, words {words}: {heard}. {verdict}. Emotion: {word[clip.emotion]}"
    )


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
