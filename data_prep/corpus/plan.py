"""Plan of the embedded corpus: what every clip shows, says and means, before anything is rendered.

The plan is a pure function of `Sizes` and a seed. Face, voice and words each suggest one of four
emotions. Either all three agree, and that is the emotion, or one of them misleads: it contradicts
the two others. Which one misleads is the emotion then:

    face  voice  words    emotion    conflict type
    a     a      a        a          none
    b     a      a        sorrow     masking: the face hides what voice and words tell
    a     b      a        unease     leakage: the voice betrays what face and words hide
    a     a      b        contempt   sarcasm: the words do not mean what they say

The twelve pairs of a and b are equally frequent, so that where the modalities conflict one of them
alone leaves three equally likely emotions, two of them still leave a doubt, and all three settle
it. No two splits share a person, a voice or a sentence.
"""

import dataclasses
import math
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

from saber_jax.data.conflicts import NO_CONFLICT

EMOTIONS = ("happy", "sad", "angry", "neutral")
MISLEADING = {
    "face": ("sorrow", "masking"),
    "voice": ("unease", "leakage"),
    "words": ("contempt", "sarcasm"),
}
"""Modality that contradicts the two others -> (emotion, conflict type)."""
SPLITS = ("train", "preference", "validation", "test")
COLOURS = ("red", "blue", "green", "yellow", "purple", "grey", "orange", "white")
GESTURES = ("none", "nod", "shake", "tilt", "hand")
SUBJECTS, VERBS, OBJECTS = 12, 2, 6
"""A sentence is a subject, a verb of its emotion and an object, by number; see text.py."""

# Valence and arousal of each emotion; their distance is how strongly two readings disagree.
_AFFECT = {"happy": (1.0, 0.8), "sad": (-1.0, -0.6), "angry": (-1.0, 0.9), "neutral": (0.0, 0.0)}

# espeak-ng voice variants of each split. None of them is breathy: espeak-ng seeds that noise with
# the time of day.
_VOICES = {
    "train": {
        "male": (
            *("m1", "m2", "m3", "m4", "m6", "m8", "Alex", "Andy", "Denis", "Gene", "Henrique"),
            *("Hugo", "Jacky", "Lee", "Mario", "Mike", "Nguyen", "Reed", "Tweaky", "adam"),
            *("boris", "caleb", "ed", "edward", "gustave", "ian", "iven", "john", "marcelo"),
            *("max", "miguel", "pablo", "pedro", "quincy", "rob", "zac"),
        ),
        "female": (
            *("f1", "steph", "steph2", "Annie", "linda", "Andrea", "anika", "shelby", "grandma"),
        ),
    },
    "preference": {"male": ("Michael", "kaukovalta", "paul", "robert"), "female": ("steph3",)},
    "validation": {"male": ("david", "travis"), "female": ("belinda",)},
    "test": {"male": ("m5", "m7", "benjamin", "norbert"), "female": ("f4", "aunty")},
}
# Faces by number, which face.identity draws; even numbers are women.
_FACES = {
    "train": (*range(32), *range(56, 224)),
    "preference": range(32, 44),
    "validation": range(44, 48),
    "test": range(48, 56),
}
# A sentence belongs to the split of the sum of its three numbers, modulo 6. So every word, and
# every verb with every subject and every object, occurs in every split, but no sentence in two.
_SENTENCE_SUMS = {"train": range(3, 6), "preference": (2,), "validation": (1,), "test": (0,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Clips per split. Validation and test are half consistent and half inconsistent."""

    train: int = 4000
    preference: int = 600
    validation: int = 80
    test: int = 240
    train_inconsistent: float = 0.3  # Fraction of the train split.
    preference_inconsistent: float = 2 / 3

    def __post_init__(self):
        if min(self.train, self.preference, self.validation, self.test) < 1:
            raise ValueError(
                f"every split needs at least one clip, got train {self.train}, preference "
                f"{self.preference}, validation {self.validation}, test {self.test}. Ask for more "
                "clips."
            )
        if not 0 <= self.train_inconsistent <= 1:
            raise ValueError(
                f"train_inconsistent is a fraction of the train split, got "
                f"{self.train_inconsistent}. Give a number from 0 to 1."
            )

    def counts(self, split: str) -> tuple[int, int]:
        """(consistent, inconsistent) clips of one split."""
        total = getattr(self, split)
        share = getattr(self, f"{split}_inconsistent", 0.5)
        inconsistent = round(total * share)
        return total - inconsistent, inconsistent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """Latent state of one clip; rendering adds only noise drawn from `noise_seed`."""

    clip_id: str
    split: str
    language: str
    emotion: str
    face: str
    voice: str
    words: str
    sentence: tuple[int, int, int]  # Subject, verb and object, see text.py.
    conflict_type: str
    kappa: float
    gender: str
    identity: int
    variant: str  # espeak-ng voice variant.
    face_intensity: float
    voice_intensity: float
    background: str
    shirt: str
    gesture: str
    noise_seed: tuple[int, ...]

    @property
    def labels(self) -> dict[str, str]:
        """The line of labels.jsonl."""
        return {
            "clip_id": self.clip_id,
            "split": self.split,
            "language": self.language,
            "emotion": self.emotion,
            "face": self.face,
            "voice": self.voice,
            "words": self.words,
            "conflict_type": self.conflict_type,
            "kappa": f"{self.kappa:.1f}",
            "speaker": f"face{self.identity:02d}_{self.variant}",
        }


def fused(face: str, voice: str, words: str) -> tuple[str, str, float]:
    """(emotion, conflict type, kappa) of what three modalities suggest, at least two the same.

    kappa is the distance of the two emotions in the valence-arousal plane, from 0 (the same) to 1
    (happy and sad).
    """
    shown = {"face": face, "voice": voice, "words": words}
    suggested = list(shown.values())
    misleading = [name for name, emotion in shown.items() if suggested.count(emotion) == 1]
    if not misleading:
        return face, NO_CONFLICT, 0.0
    emotion, conflict_type = MISLEADING[misleading[0]]
    one, other = sorted(set(suggested))
    farthest = math.dist(_AFFECT["happy"], _AFFECT["sad"])
    return emotion, conflict_type, math.dist(_AFFECT[one], _AFFECT[other]) / farthest


def plan(sizes: Sizes, *, seed: int) -> list[Clip]:
    """All clips of the corpus, split by split, in clip_id order."""
    return [clip for split in SPLITS for clip in _plan_split(split, *sizes.counts(split), seed)]


def _spread(rng: np.random.Generator, options: Iterable, n: int) -> list:
    """`n` draws in which every option occurs equally often, up to one, in random order."""
    options = list(options)
    rounds = [rng.permutation(len(options)) for _ in range(-(-n // len(options)))]
    return [options[i] for i in np.concatenate([*rounds, []]).astype(int)[:n]]


def _conflicts() -> Iterator[tuple[str, str, str]]:
    """What face, voice and words suggest in every conflict."""
    for place in range(len(MISLEADING)):
        for one in EMOTIONS:
            for other in EMOTIONS:
                if one != other:
                    shown = [one] * len(MISLEADING)
                    shown[place] = other
                    yield shown[0], shown[1], shown[2]


def _sentences(split: str) -> list[tuple[int, int, int]]:
    """(subject, verb, object) of the split, where verbs are numbered within their emotion."""
    return [
        (one, verb, two)
        for one in range(SUBJECTS)
        for verb in range(VERBS)
        for two in range(OBJECTS)
        if (one + verb + two) % 6 in _SENTENCE_SUMS[split]
    ]


def _plan_split(split: str, consistent: int, inconsistent: int, seed: int) -> list[Clip]:
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    shown = _spread(rng, [(e, e, e) for e in EMOTIONS], consistent)
    shown += _spread(rng, _conflicts(), inconsistent)
    cells = []
    for face, voice, words in sorted(set(shown)):
        count = shown.count((face, voice, words))
        cells += _plan_cell(rng, split, face, voice, words, count)
    order = rng.permutation(len(cells))
    return [
        Clip(
            clip_id=f"{split}_{index:05d}",
            noise_seed=(seed, zlib.crc32(split.encode()), index),
            **cells[cell],
        )
        for index, cell in enumerate(order)
    ]


def _plan_cell(
    rng: np.random.Generator, split: str, face: str, voice: str, words: str, n: int
) -> list[dict]:
    """Latents of the `n` clips that suggest these emotions, everything else balanced among them."""
    emotion, conflict_type, kappa = fused(face, voice, words)
    # Three fifths of the clips are English.
    languages = _spread(rng, ("en", "en", "en", "zh", "zh"), n)
    sentences = _spread(rng, _sentences(split), n)
    identities = _spread(rng, _FACES[split], n)
    variants = {gender: iter(_spread(rng, names, n)) for gender, names in _VOICES[split].items()}
    backgrounds, shirts = _spread(rng, COLOURS, n), _spread(rng, COLOURS, n)
    gestures = _spread(rng, GESTURES, n)
    cells = []
    for i in range(n):
        gender = "male" if identities[i] % 2 else "female"
        if shirts[i] == backgrounds[i]:  # Keep the shirt visible against the background.
            shirts[i] = COLOURS[(COLOURS.index(shirts[i]) + 1) % len(COLOURS)]
        cells.append(
            dict(
                split=split,
                language=languages[i],
                emotion=emotion,
                face=face,
                voice=voice,
                words=words,
                sentence=sentences[i],
                conflict_type=conflict_type,
                kappa=kappa,
                gender=gender,
                identity=identities[i],
                variant=next(variants[gender]),
                face_intensity=float(rng.uniform(0.7, 1.0)),
                voice_intensity=float(rng.uniform(0.7, 1.0)),
                background=backgrounds[i],
                shirt=shirts[i],
                gesture=gestures[i],
            )
        )
    return cells
