"""Made-up lengths like those of SABER's clips and answers, for benchmarks and tests of packing.

Clip seconds are log-normal with median 4.5 and sigma 0.6, cut to 1..30; an answer has 150 to 900
tokens, of which `answers` draws most near the shorter end. Frames and their sizes follow from a
640 x 360 source at 25 frames a second.
"""

import functools

import numpy as np
from jaxtyping import Float, Int

from saber_jax.data import decode, media
from saber_jax.data.planning import SIZE_NAMES
from saber_jax.data.tmrope import audio_tokens

RELEASE = decode.release_sampling()
"""The sampling that the published SABER script has: its limit of 50,176 pixels has no effect."""

EXACT = decode.FrameSampling(
    max_frames=decode.RELEASE_MAX_FRAMES,
    min_pixels=16 * 28 * 28,
    max_pixels=decode.RELEASE_MAX_PIXELS,
)
"""The sampling that the script's settings ask for: 40 frames of at most 50,176 pixels."""

PROMPT_TOKENS = 60
"""Tokens of the prompt's text and of the markers around the media."""

SHORTEST_ANSWER, LONGEST_ANSWER = 150, 900


def seconds(count: int, rng: np.random.Generator) -> Float[np.ndarray, " N"]:
    drawn = np.zeros(0)
    while len(drawn) < count:
        more = np.exp(rng.normal(np.log(4.5), 0.6, 2 * count))
        drawn = np.concatenate([drawn, more[(more >= 1) & (more <= 30)]])
    return drawn[:count]


def answers(count: int, rng: np.random.Generator) -> Float[np.ndarray, " N"]:
    """Tokens of answers, log-normal: 95% are between the shortest and the longest."""
    middle = (np.log(SHORTEST_ANSWER) + np.log(LONGEST_ANSWER)) / 2
    sigma = (np.log(LONGEST_ANSWER) - np.log(SHORTEST_ANSWER)) / 4
    return np.clip(np.exp(rng.normal(middle, sigma, count)), SHORTEST_ANSWER, LONGEST_ANSWER)


def supervised(
    count: int, sampling: decode.FrameSampling, rng: np.random.Generator
) -> Int[np.ndarray, "N D"]:
    """Sizes as planning.SIZE_NAMES names them, one answer an example."""
    prompt, patches, chunks = _prompts(count, sampling, rng)
    answer = rng.integers(SHORTEST_ANSWER, LONGEST_ANSWER + 1, count)
    return _columns(text=prompt + answer, patches=patches, chunks=chunks, targets=answer)


def pairs(
    count: int, sampling: decode.FrameSampling, rng: np.random.Generator
) -> Int[np.ndarray, "N D"]:
    """Sizes of preference pairs. Half of the shorter answer, on average, is what both begin with:
    with the audio withheld, the visual sections of a SED answer stay what they were."""
    prompt, patches, chunks = _prompts(count, sampling, rng)
    chosen = rng.integers(SHORTEST_ANSWER, LONGEST_ANSWER + 1, count)
    rejected = rng.integers(SHORTEST_ANSWER, LONGEST_ANSWER + 1, count)
    shared = (rng.uniform(0.3, 0.7, count) * np.minimum(chosen, rejected)).astype(int)
    return _columns(
        text=prompt + shared,
        chosen=chosen - shared,
        rejected=rejected - shared,
        patches=patches,
        chunks=chunks,
        targets=chosen + rejected - shared,
    )


def _columns(**sizes: Int[np.ndarray, " N"]) -> Int[np.ndarray, "N D"]:
    """The sizes by name, in the order of planning.SIZE_NAMES; those that are not given are 0."""
    none = np.zeros_like(sizes["text"])
    return np.stack([sizes.get(name, none) for name in SIZE_NAMES], 1)


def _prompts(count: int, sampling: decode.FrameSampling, rng: np.random.Generator):
    clips = seconds(count, rng)
    patches = np.array([_patches(max(4, round(25 * s)), sampling) for s in clips])
    mel_frames = np.ceil(100 * clips).astype(int)
    heard = np.array([audio_tokens(n) for n in mel_frames])
    return PROMPT_TOKENS + patches // 4 + heard, patches, -(-mel_frames // media.CHUNK_FRAMES)


@functools.cache
def _patches(frames: int, sampling: decode.FrameSampling) -> int:
    kept = len(
        media.frame_indices(
            frames,
            25.0,
            fps=sampling.fps,
            min_frames=sampling.min_frames,
            max_frames=sampling.max_frames,
        )
    )
    height, width = sampling.frame_size(360, 640, kept)
    return kept // 2 * (height // media.PATCH) * (width // media.PATCH)
