"""Small made-up records and a vocabulary for them, for tests that need a few and not a corpus."""

import dataclasses
from pathlib import Path

import numpy as np

from saber_jax.data import sed
from saber_jax.data.examples import Example, size_of
from saber_jax.data.records import FIELDS, Record
from saber_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from saber_jax.data.withhold import VIEWS

WORDS = ("calm", "person", "speaks", "loudly", "in", "the", "quiet", "red", "room", "slowly")


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def record(seed: int, *, frames: int = 4, seconds: float = 1.3, words: int = 5) -> Record:
    """Random pixels, noise and text; 84 x 84 frames."""
    rng = np.random.default_rng(seed)
    annotation = {field: sentence(rng, words) for field in FIELDS}
    annotation["sentiment_analysis"] += ". Emotion: happy"
    return Record(
        clip_id=f"clip{seed}",
        language="en",
        frames=rng.integers(0, 256, (frames, 84, 84, 3), np.uint8),
        seconds_per_grid=0.5,
        audio=rng.integers(-9000, 9000, int(seconds * 16_000), np.int16),
        annotation=annotation,
        labels={"emotion": "happy", "conflict_type": "sarcasm", "kappa": "0.8"},
        provenance={},
    )


def with_references(example: Example, seed: int) -> Example:
    """A pair with made-up log pi_ref of its targets in every view."""
    shape = (len(VIEWS), size_of(example).targets)
    reference = np.random.default_rng(seed).normal(-5, 2, shape).astype(np.float32)
    return dataclasses.replace(example, reference=reference)


def tokenizer(folder: Path, *, vocab_size: int = 1024) -> Tokenizer:
    """A vocabulary of the made-up sentences, of the tiny model's size."""
    rng = np.random.default_rng(0)
    texts = [sed.target_text({field: sentence(rng, 9) for field in FIELDS}) for _ in range(40)]
    texts += [sed.prompt_text(language, True, True) for language in ("en", "zh")]
    path = folder / "tokenizer.model"
    train_sentencepiece(
        texts, path, vocab_size=vocab_size, symbols=[sed.heading(field) for field in FIELDS]
    )
    return load_tokenizer(path)
