"""Stage `consistency`: finds whether face, voice and words of a clip agree.

What each modality suggests is taken, in this order, from labels of the corpus (CREMA-D's raters saw
clips without sound and heard them without picture), from valence per modality (CH-SIMS), or from a
judge that reads the fields of one modality only. The same rule then decides for all clips.

    rows gain    labels.face, .voice, .words    what each suggests
                 labels.conflict_type           none, sarcasm, masking, suppression, leakage, other
                 labels.kappa                   how strongly face and voice disagree, 0 to 1
                 relation                       consistent, inconsistent, or unclear
"""

import concurrent.futures
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from data_prep.raw import answers, wording
from data_prep.raw.answers import EndpointSettings
from data_prep.raw.shards import Outcome, Row
from saber_jax.data import emotions
from saber_jax.data.conflicts import NO_CONFLICT, OTHER_CONFLICT

REASONS = answers.REASONS

# (face, voice) -> conflict type, of the four families that emotions are reduced to.
_BY_EMOTION = {
    ("happy", "angry"): "sarcasm",
    ("happy", "sad"): "masking",
    ("happy", "neutral"): "masking",
    ("neutral", "angry"): "suppression",
    ("neutral", "sad"): "suppression",
    ("neutral", "happy"): "leakage",
    ("sad", "angry"): "leakage",
    ("sad", "neutral"): "suppression",
    ("sad", "happy"): "leakage",
    ("angry", "sad"): "leakage",
    ("angry", "neutral"): "suppression",
    ("angry", "happy"): "sarcasm",
}

# Valence and arousal of each emotion.
AFFECT = {
    "happy": (1.0, 0.8),
    "sad": (-1.0, -0.6),
    "angry": (-1.0, 0.9),
    "neutral": (0.0, 0.0),
    "fear": (-0.8, 0.7),
    "worried": (-0.6, 0.3),
    "disgust": (-0.9, 0.4),
    "contempt": (-0.7, 0.2),
    "surprise": (0.3, 0.8),
}
# The four emotions of the table of conflicts.
_COARSE = {
    "fear": "sad",
    "worried": "sad",
    "disgust": "angry",
    "contempt": "angry",
    "surprise": "happy",
}
# (sign of the face's valence, of the voice's) -> conflict type, where no emotion is known.
_BY_SIGN = {
    (1, -1): OTHER_CONFLICT,
    (1, 0): "masking",
    (0, -1): "suppression",
    (0, 1): "leakage",
    (-1, 0): "suppression",
    (-1, 1): "leakage",
}
_FIELDS = {
    "face": ("video_desc", "facial_exp_desc", "body_lang_desc"),
    "voice": ("acoustic_feat",),
    "words": ("speech_content",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencySettings:
    """A kappa below `least_kappa` is unclear; a valence within +-`neutral` is neutral."""

    use_labels: bool = True
    least_kappa: float = 0.25
    neutral: float = 0.2
    judge: EndpointSettings = dataclasses.field(default_factory=EndpointSettings)

    def of_result(self) -> dict[str, Any]:
        """The settings that affect relations, for the stage's manifest."""
        return {
            "use_labels": self.use_labels,
            "least_kappa": self.least_kappa,
            "neutral": self.neutral,
            "judge": self.judge.of_result(),
            "prompts": wording.versions("conclude"),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cue:
    """What one modality suggests: an emotion of AFFECT, "" if only valence is known."""

    emotion: str = ""
    intensity: float = 1.0
    valence: float | None = None

    @property
    def point(self) -> tuple[float, float]:
        """Valence and arousal, scaled by intensity."""
        if self.valence is not None:
            return (self.valence, 0.0)
        valence, arousal = AFFECT[self.emotion]
        return (valence * self.intensity, arousal * self.intensity)

    def sign(self, neutral: float) -> int:
        """-1, 0 or 1 for negative, neutral or positive."""
        valence = self.point[0]
        return 0 if abs(valence) <= neutral else (1 if valence > 0 else -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relation:
    relation: str
    conflict_type: str
    kappa: float


def relate(face: Cue, voice: Cue, words: Cue | None, settings: ConsistencySettings) -> Relation:
    """The relation of the modalities of a clip.

    Face and voice decide. If they agree on a negative emotion and the words are positive, the type
    is sarcasm; any other words that disagree with both are a conflict of type "other".
    """
    kappa = min(1.0, math.dist(face.point, voice.point) / _FARTHEST)
    pair = (_COARSE.get(face.emotion, face.emotion), _COARSE.get(voice.emotion, voice.emotion))
    signs = (face.sign(settings.neutral), voice.sign(settings.neutral))
    if pair[0] and pair[1]:
        differ = pair[0] != pair[1]
        kind = _BY_EMOTION[pair] if differ else NO_CONFLICT
    else:
        differ = signs[0] != signs[1]
        kind = _BY_SIGN.get(signs, NO_CONFLICT)
        kappa = min(1.0, abs(face.point[0] - voice.point[0]) / 2)
    if differ:
        clear = kappa >= settings.least_kappa
        return Relation(
            relation="inconsistent" if clear else "unclear",
            conflict_type=kind if clear else NO_CONFLICT,
            kappa=round(kappa, 3),
        )
    said = 0 if words is None else words.sign(settings.neutral)
    if words is not None and said and signs[0] == signs[1] == -said:
        apart = abs(words.point[0] - face.point[0]) / 2
        kind = "sarcasm" if said > 0 else OTHER_CONFLICT
        if apart >= settings.least_kappa:
            return Relation(relation="inconsistent", conflict_type=kind, kappa=round(apart, 3))
    return Relation(relation="consistent", conflict_type=NO_CONFLICT, kappa=0.0)


_FARTHEST = math.dist(AFFECT["happy"], AFFECT["sad"])


def known_cues(row: Row) -> dict[str, Cue] | None:
    """Cues of face and voice (and words) from labels of the corpus."""
    labels, valence = emotions.canonical_labels(row["labels"]), row.get("valence", {})
    if labels.get("face") in AFFECT and labels.get("voice") in AFFECT:
        cues = {name: Cue(emotion=labels[name]) for name in ("face", "voice")}
        if (words := labels.get("words")) in AFFECT:
            cues["words"] = Cue(emotion=words)
        elif words in _SIGNS:
            cues["words"] = Cue(valence=_SIGNS[words])
        return cues
    if "face" in valence and "voice" in valence:
        return {name: Cue(valence=valence[name]) for name in _FIELDS if name in valence}
    return None


_SIGNS = {"positive": 1.0, "neutral": 0.0, "negative": -1.0}


def needs_judge(row: Row, settings: ConsistencySettings) -> bool:
    return not (settings.use_labels and known_cues(row))


def work(
    rows: list[Row],
    clients: answers.Clients,
    pool: concurrent.futures.Executor,
    *,
    settings: ConsistencySettings,
) -> Iterator[Outcome]:
    """The stage; asks "judge" up to three short questions for clips without labels."""

    def outcome(row: Row) -> Outcome:
        if not needs_judge(row, settings):
            return _related(row, known_cues(row) or {}, settings, "labels of the corpus", None)
        cues, model = {}, ""
        for name in _FIELDS:
            if text := _evidence(row, name):
                answer = _conclude(row["language"], name, text, clients, settings)
                cues[name], model = answer.value, answer.model
        if "voice" not in cues:  # Without a voice nothing can disagree.
            cues["voice"] = cues["face"]
        return _related(row, cues, settings, "unimodal conclusions", model)

    return answers.each_row(rows, outcome, pool)


def _evidence(row: Row, modality: str) -> dict[str, str]:
    annotation = {**row["annotation"], **row["annotation"]["audio_desc"]}
    return {field: annotation[field] for field in _FIELDS[modality] if annotation[field]}


def _conclude(
    language: str,
    modality: str,
    evidence: dict[str, str],
    clients: answers.Clients,
    settings: ConsistencySettings,
) -> answers.Answer[Cue]:
    prompt = wording.prompt(
        "conclude",
        language,
        modality=wording.MODALITY[language][modality],
        emotions=", ".join(AFFECT),
    )
    messages = [
        {"role": "system", "content": prompt.text},
        {"role": "user", "content": wording.data(evidence, language)},
    ]
    return answers.ask_json(
        clients["judge"],
        messages,
        _check_cue,
        language=language,
        settings=settings.judge.of_request(),
    )


def _check_cue(value: dict[str, Any]) -> Cue:
    emotion, intensity = value.get("emotion"), value.get("intensity")
    if emotion not in AFFECT:
        raise ValueError(f'"emotion" must be one of {", ".join(AFFECT)}, got {emotion!r}.')
    if isinstance(intensity, bool) or not isinstance(intensity, int | float):
        raise ValueError(f'"intensity" must be a number from 0 to 1, got {intensity!r}.')
    if not 0 <= intensity <= 1:
        raise ValueError(f'"intensity" must be from 0 to 1, got {intensity}.')
    return Cue(emotion=emotion, intensity=float(intensity))


def _related(
    row: Row, cues: dict[str, Cue], settings: ConsistencySettings, by: str, model: str | None
) -> Row:
    found = relate(cues["face"], cues["voice"], cues.get("words"), settings)
    suggested = {name: cues[name].emotion for name in ("face", "voice") if cues[name].emotion}
    if "words" in cues:
        signs = {1: "positive", 0: "neutral", -1: "negative"}
        suggested["words"] = signs[cues["words"].sign(settings.neutral)]
    labels = {
        **row["labels"],
        **suggested,
        "conflict_type": found.conflict_type,
        "kappa": f"{found.kappa:g}",
    }
    made = {
        "fields": ["relation", "labels.conflict_type", "labels.kappa", "labels.face"],
        "tool": f"data_prep.consistency, {by}",
        "model": model,
        "prompt": wording.versions("conclude")[f"conclude.{row['language']}"] if model else None,
        "parameters": {"least_kappa": settings.least_kappa, "neutral": settings.neutral},
    }
    return {
        **row,
        "labels": labels,
        "relation": found.relation,
        "provenance": [*row["provenance"], made],
    }
