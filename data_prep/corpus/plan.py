"""Plan of the embedded corpus: what every clip shows, says and means, before anything is rendered.

The plan is a pure function of `Sizes` and a seed. If face and voice disagree, each of them alone
leaves three equally likely emotions, and only both together determine the emotion:

    face \\ voice   happy     sad       angry     neutral
    happy          happy     sorrow    contempt  unease
    sad            unease    sad       sorrow    contempt
    angry          contempt  unease    angry     sorrow
    neutral        sorrow    contempt  unease    neutral
"""

import dataclasses
import math
import zlib
from collections.abc import Iterable

import numpy as np

from saber_jax.data.conflicts import NO_CONFLICT

EMOTIONS = ("happy", "sad", "angry", "neutral")
VALENCES = ("positive", "negative", "neutral")
SPLITS = ("train", "preference", "test")
COLOURS = ("red", "blue", "green", "yellow", "purple", "grey", "orange", "white")
GESTURES = ("none", "nod", "shake", "tilt", "hand")
SENTENCES_PER_VALENCE = 6

# (face, voice) -> (fused emotion, conflict type), for every pair that disagrees.
CONFLICTS: dict[tuple[str, str], tuple[str, str]] = {
    ("happy", "angry"): ("contempt", "sarcasm"),
    ("happy", "sad"): ("sorrow", "masking"),
    ("happy", "neutral"): ("unease", "masking"),
    ("neutral", "angry"): ("unease", "suppression"),
    ("neutral", "sad"): ("contempt", "suppression"),
    ("neutral", "happy"): ("sorrow", "leakage"),
    ("sad", "angry"): ("sorrow", "leakage"),
    ("sad", "neutral"): ("contempt", "suppression"),
    ("sad", "happy"): ("unease", "leakage"),
    ("angry", "sad"): ("unease", "leakage"),
    ("angry", "neutral"): ("sorrow", "suppression"),
    ("angry", "happy"): ("contempt", "sarcasm"),
}
# In consistent clips, words agree with the emotion or are neutral.
_WORDS = {
    "happy": ("positive", "neutral"),
    "sad": ("negative", "neutral"),
    "angry": ("negative", "neutral"),
    "neutral": ("neutral",),
}
# Valence and arousal of each emotion; their distance is how strongly two readings disagree.
_AFFECT = {"happy": (1.0, 0.8), "sad": (-1.0, -0.6), "angry": (-1.0, 0.9), "neutral": (0.0, 0.0)}

# espeak-ng voice variants; the voices of the test split are used in no other split.
# None of them is breathy: espeak-ng seeds that noise with the time of day.
TRAIN_VOICES = {
    "male": ("m1", "m2", "m3", "m4", "m6"),
    "female": ("f1", "steph", "Annie", "linda", "Andrea"),
}
TEST_VOICES = {"male": ("m5", "m7"), "female": ("f4", "aunty")}
# Face identities by number; corpus_face draws identity i, even numbers are women.
TRAIN_FACES = tuple(range(24))
TEST_FACES = tuple(range(24, 32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Clips per split. Preference is all inconsistent, test is half and half."""

    train: int = 1100
    preference: int = 500
    test: int = 240
    train_inconsistent: float = 0.25  # Fraction of the train split.

    def __post_init__(self):
        if min(self.train, self.preference, self.test) < 1:
            raise ValueError(
                f"every split needs at least one clip, got train {self.train}, preference "
                f"{self.preference}, test {self.test}. Ask for more clips."
            )
        if not 0 <= self.train_inconsistent <= 1:
            raise ValueError(
                f"train_inconsistent is a fraction of the train split, got "
                f"{self.train_inconsistent}. Give a number from 0 to 1."
            )

    def counts(self, split: str) -> tuple[int, int]:
        """(consistent, inconsistent) clips of one split."""
        total = getattr(self, split)
        share = {"train": self.train_inconsistent, "preference": 1.0, "test": 0.5}[split]
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
    sentence: int  # Index into the sentences of its language and valence.
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


def conflict_strength(face: str, voice: str) -> float:
    """Distance of two emotions in the valence-arousal plane, 0 (same) to 1 (happy and sad)."""
    return math.dist(_AFFECT[face], _AFFECT[voice]) / math.dist(_AFFECT["happy"], _AFFECT["sad"])


def plan(sizes: Sizes, *, seed: int) -> list[Clip]:
    """All clips of the corpus, split by split, in clip_id order."""
    return [clip for split in SPLITS for clip in _plan_split(split, *sizes.counts(split), seed)]


def _spread(rng: np.random.Generator, options: Iterable, n: int) -> list:
    """`n` draws in which every option occurs equally often, up to one, in random order."""
    options = list(options)
    rounds = [rng.permutation(len(options)) for _ in range(-(-n // len(options)))]
    return [options[i] for i in np.concatenate([*rounds, []]).astype(int)[:n]]


def _plan_split(split: str, consistent: int, inconsistent: int, seed: int) -> list[Clip]:
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    pairs = _spread(rng, [(e, e) for e in EMOTIONS], consistent)
    pairs += _spread(rng, CONFLICTS, inconsistent)
    cells = []
    for face, voice in sorted(set(pairs)):
        cells += _plan_pair(rng, split, face, voice, pairs.count((face, voice)))
    order = rng.permutation(len(cells))
    return [
        Clip(
            clip_id=f"{split}_{index:05d}",
            noise_seed=(seed, zlib.crc32(split.encode()), index),
            **cells[cell],
        )
        for index, cell in enumerate(order)
    ]


def _plan_pair(rng: np.random.Generator, split: str, face: str, voice: str, n: int) -> list[dict]:
    """Latents of the `n` clips of one face and voice pair, everything else balanced within it."""
    emotion, conflict_type = CONFLICTS.get((face, voice), (face, NO_CONFLICT))
    words = _WORDS[face] if face == voice else VALENCES
    # English twice: two thirds of the clips are English, independently of the words.
    said = _spread(rng, [(w, lang) for w in words for lang in ("en", "en", "zh")], n)
    sentences = {
        key: iter(_spread(rng, range(SENTENCES_PER_VALENCE), n)) for key in sorted(set(said))
    }
    identities = _spread(rng, TEST_FACES if split == "test" else TRAIN_FACES, n)
    voices = TEST_VOICES if split == "test" else TRAIN_VOICES
    variants = {gender: iter(_spread(rng, names, n)) for gender, names in voices.items()}
    backgrounds, shirts = _spread(rng, COLOURS, n), _spread(rng, COLOURS, n)
    gestures = _spread(rng, GESTURES, n)
    cells = []
    for i, (valence, language) in enumerate(said):
        gender = "male" if identities[i] % 2 else "female"
        if shirts[i] == backgrounds[i]:  # Keep the shirt visible against the background.
            shirts[i] = COLOURS[(COLOURS.index(shirts[i]) + 1) % len(COLOURS)]
        cells.append(
            dict(
                split=split,
                language=language,
                emotion=emotion,
                face=face,
                voice=voice,
                words=valence,
                sentence=next(sentences[valence, language]),
                conflict_type=conflict_type,
                kappa=conflict_strength(face, voice),
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
