"""TMRoPE: the time-aligned 3-D positions of Qwen2.5-Omni, in NumPy.

Every token gets a (temporal, height, width) position. The numbers equal those of
`get_rope_index` in transformers' Qwen2.5-Omni; section 2.1 of https://arxiv.org/abs/2503.20215.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

Grid = tuple[int, int, int]
"""(t, h, w) of one video or image, in 14-pixel patches."""

# Constants of every released Qwen2.5-Omni, with their names in its config. Loading a checkpoint
# with other values is refused.
POSITIONS_PER_SECOND = 25
"""`position_id_per_seconds`: temporal positions of a second of video or sound."""
SECONDS_PER_CHUNK = 2
"""`seconds_per_chunk`: seconds between the cuts of a video that is interleaved with its sound."""
SPAN = POSITIONS_PER_SECOND * SECONDS_PER_CHUNK
"""Positions between two cuts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaIds:
    """The token ids that TMRoPE has to recognise."""

    image: int
    video: int
    audio: int
    vision_bos: int
    audio_bos: int


def tmrope(
    tokens: Int[np.ndarray, " n"],
    ids: MediaIds,
    *,
    grids: Sequence[Grid] = (),
    seconds_per_grid: Sequence[float] = (),
    audio_frames: Sequence[int] = (),
    image_grids: Sequence[Grid] = (),
    use_audio_in_video: bool = False,
) -> Int[np.ndarray, "3 n"]:
    """Positions int64 [3, n] of one row without padding, placeholders already expanded.

    `grids` and `seconds_per_grid` belong to the videos, `audio_frames` (10 ms mel frames) to the
    audios, each in order of appearance. Drawn for text, a video of 2 frame pairs of 1 x 2 units
    lasting 0.08 s each, text, an audio of 2 tokens, text:

        token     a  V  V  V  V  b  A  A  c
        temporal  0  1  1  3  3  4  5  6  7
        height    0  1  1  1  1  4  5  6  7
        width     0  1  2  1  2  4  5  6  7

    With `use_audio_in_video` the pair vision_bos, audio_bos shares one position, so does the pair
    audio_eos, vision_eos, and the two streams in between are cut every 2 s and interleaved.
    Raises ValueError if the placeholders and the media given do not match.
    """
    media = _Media(
        grids=iter(grids),
        seconds=iter(seconds_per_grid),
        audios=iter(audio_frames),
        images=iter(image_grids),
    )
    tokens = np.asarray(tokens)
    pieces: list[np.ndarray] = []
    start = cursor = 0
    while start < len(tokens):
        token = tokens[start]
        if use_audio_in_video and _opens_audio_in_video(tokens, start, ids):
            block = _audio_in_video(cursor, media)
        elif token == ids.image:
            block = _grid(_take(media.images, "image"), 1.0) + cursor
        elif token == ids.video:
            grid = _take(media.grids, "video")
            block = _grid(grid, _take(media.seconds, "seconds_per_grid")) + cursor
        elif token == ids.audio:
            block = _line(audio_tokens(_take(media.audios, "audio"))) + cursor
        else:
            block = np.full((3, 1), cursor)
        if block.shape[1] == 0:
            raise ValueError(f"The audio at token {start} is too short to have a token; drop it.")
        pieces.append(block)
        start += block.shape[1]
        cursor = int(block[:, -1].max()) + 1  # The last token is the furthest on every axis.
    positions = np.concatenate(pieces, axis=1) if pieces else np.zeros((3, 0), np.int64)
    if positions.shape[1] != len(tokens):
        raise ValueError(
            f"TMRoPE made {positions.shape[1]} positions for {len(tokens)} tokens: the number of "
            "placeholders differs from what the grids and audio lengths say."
        )
    return positions


def audio_tokens(frames: int) -> int:
    """Tokens of `frames` mel frames (10 ms each): 25 a second, none for one or two frames."""
    return ((frames + 1) // 2) // 2


def grid_tokens(grid: Grid) -> int:
    """Tokens of a video or image: one for 2 x 2 patches."""
    return grid[0] * (grid[1] // 2) * (grid[2] // 2)


def woven(grid: Grid, seconds: float, audio_tokens: int) -> Bool[np.ndarray, " n"]:
    """Which tokens of a video that is interleaved with its sound belong to the sound.

    The order is the released processor's. It cuts the video at float64 times, whereas positions
    come from float32 times rounded down, so for some frame rates the two cut differently by one
    frame pair: there the released model gives pictures the positions of sound, and so do we.
    """
    times = np.repeat(np.arange(grid[0]), grid_tokens(grid) // grid[0])
    cuts = [
        np.split(
            np.zeros(len(times), bool),
            _cuts(times * seconds * POSITIONS_PER_SECOND, SPAN),
        ),
        np.split(np.ones(audio_tokens, bool), _cuts(np.arange(audio_tokens), SPAN)),
    ]
    return np.concatenate(_alternate(*cuts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Media:
    grids: Iterator[Grid]
    seconds: Iterator[float]
    audios: Iterator[int]
    images: Iterator[Grid]


def _take(items: Iterator, kind: str):
    try:
        return next(items)
    except StopIteration:
        raise ValueError(f"The tokens hold more {kind} placeholders than media given.") from None


def _opens_audio_in_video(tokens: np.ndarray, at: int, ids: MediaIds) -> bool:
    pair = tokens[at : at + 2]
    return len(pair) == 2 and pair[0] == ids.vision_bos and pair[1] == ids.audio_bos


def _line(length: int) -> Int[np.ndarray, "3 n"]:
    return np.tile(np.arange(length), (3, 1))


def _grid(grid: Grid, seconds: float) -> Int[np.ndarray, "3 n"]:
    t, h, w = grid[0], grid[1] // 2, grid[2] // 2
    # float32 product, then truncation: transformers does `.long()`, so 2.9999998 becomes 2.
    time = np.arange(t, dtype=np.float32) * np.float32(seconds)
    time = (time * np.float32(POSITIONS_PER_SECOND)).astype(np.int64)
    return np.stack(
        [
            np.repeat(time, h * w),
            np.tile(np.repeat(np.arange(h), w), t),
            np.tile(np.arange(w), t * h),
        ]
    )


def _audio_in_video(cursor: int, media: _Media) -> Int[np.ndarray, "3 n"]:
    """The whole block, from vision_bos to vision_eos."""
    grid = _take(media.grids, "video")
    video = _grid(grid, _take(media.seconds, "seconds_per_grid"))
    audio = _line(audio_tokens(_take(media.audios, "audio")))
    pieces = [np.split(p, _cuts(p[0], SPAN), axis=1) for p in (video, audio)]
    order = _alternate(*pieces)
    body = cursor + 1
    # The released code continues after the LAST woven piece, not after the furthest one, so with
    # audio shorter than video the end markers reuse a temporal id of the video. Kept for parity.
    end = body + int(order[-1].max()) + 1
    marks = [np.full((3, 2), cursor), np.full((3, 2), end)]
    return np.concatenate([marks[0], *[piece + body for piece in order], marks[1]], axis=1)


def _cuts(times: np.ndarray, span: int) -> list[int]:
    """Where a multiple of `span` is reached; a jump over several multiples is one cut."""
    cuts: list[int] = []
    for index, time in enumerate(times):
        if time >= (len(cuts) + 1) * span:
            cuts.append(index)
    return cuts


def _alternate(first: list[np.ndarray], second: list[np.ndarray]) -> list[np.ndarray]:
    """first[0], second[0], first[1], ...; what is left of the longer one stands at the end."""
    pairs = itertools.zip_longest(first, second)
    return [piece for pair in pairs for piece in pair if piece is not None]
