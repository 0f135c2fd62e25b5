"""Patches and log-mel, the inputs of the Qwen2.5-Omni towers, in NumPy.

Axis letters: T frames   H W pixels   P patches of 2 frames x 14 x 14 pixels   n audio samples.
A merged unit is 2 x 2 patches of one frame pair; a window is up to 4 x 4 units.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Int16, UInt8

from saber_jax.data.tmrope import Grid, audio_tokens

__all__ = [
    "CHUNK_FRAMES",
    "CHUNK_TOKENS",
    "SAMPLE_RATE",
    "VisionLayout",
    "audio_chunks",
    "audio_tokens",
    "frame_indices",
    "join_layouts",
    "log_mel",
    "mel_frames",
    "patchify",
    "resize_bicubic",
    "smart_resize",
    "vision_layout",
]

# Constants of every released Qwen2.5-Omni, with their names in its config. Loading a checkpoint
# with other values is refused.
PATCH = 14
"""`patch_size`: pixels along one side of a patch."""
TEMPORAL_PATCH = 2
"""`temporal_patch_size`: frames in a patch."""
MERGE = 2
"""`spatial_merge_size`: patches along one side of a merged unit, which is one token."""
UNIT = PATCH * MERGE
WINDOW_UNITS = 4
WINDOW = WINDOW_UNITS * UNIT
"""`window_size`: pixels along one side of an attention window of the vision tower."""
MELS = 128
"""`num_mel_bins`."""
CHUNK_FRAMES = 200
"""Mel frames that the audio tower reads at once, twice `n_window`."""
N_WINDOW = CHUNK_FRAMES // 2
CHUNK_TOKENS = audio_tokens(CHUNK_FRAMES)
PATCH_FEATURES = 3 * TEMPORAL_PATCH * PATCH * PATCH

SAMPLE_RATE = 16_000
HOP = 160
FFT = 400
MAX_AUDIO_SECONDS = 300
MAX_SIDE_RATIO = 200
"""Largest ratio of the longer to the shorter side of a picture."""


def frame_indices(
    total: int, video_fps: float, *, fps: float = 2.0, min_frames: int = 4, max_frames: int = 768
) -> Int[np.ndarray, " T"]:
    """The indices of an even number of `total` frames, about `fps` of them per second.

    The rule of qwen_omni_utils: evenly spaced, first and last frame included. Raises ValueError
    for fewer than two frames.
    """
    if total < TEMPORAL_PATCH:
        raise ValueError(f"A video needs at least {TEMPORAL_PATCH} frames, got {total}.")
    limit = _floor_even(min(max_frames, total))
    lower = math.ceil(min_frames / TEMPORAL_PATCH) * TEMPORAL_PATCH
    count = _floor_even(min(max(total / video_fps * fps, lower), limit, total))
    if count < TEMPORAL_PATCH:
        raise ValueError(f"max_frames must be at least {TEMPORAL_PATCH}, got {max_frames}.")
    return np.round(np.linspace(0, total - 1, count)).astype(np.int64)


def _floor_even(value: float) -> int:
    return math.floor(value / TEMPORAL_PATCH) * TEMPORAL_PATCH


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width), multiples of 28 with an area within the limits and nearly the same ratio.

    Raises ValueError for a side ratio above 200.
    """
    if max(height, width) / min(height, width) > MAX_SIDE_RATIO:
        raise ValueError(
            f"The side ratio must be at most {MAX_SIDE_RATIO}, got {height} x {width} pixels."
        )
    # Python's round() to even is intended: 42 pixels give 1.5 -> 2 units, 70 give 2.5 -> 2 units.
    rows = max(UNIT, round(height / UNIT) * UNIT)
    columns = max(UNIT, round(width / UNIT) * UNIT)
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(UNIT, math.floor(height / shrink / UNIT) * UNIT)
        columns = max(UNIT, math.floor(width / shrink / UNIT) * UNIT)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / UNIT) * UNIT
        columns = math.ceil(width * grow / UNIT) * UNIT
    return rows, columns


def resize_bicubic(
    frames: UInt8[np.ndarray, "T H W 3"], height: int, width: int
) -> UInt8[np.ndarray, "T h w 3"]:
    """Bicubic resize with antialiasing (a = -0.5), float32, rounded once at the end.

    Within one level of torchvision's float resize, which qwen_omni_utils uses for video.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    resized = np.empty((len(frames), height, width, 3), np.uint8)
    for index, frame in enumerate(frames):  # One at a time: a float copy of a clip is large.
        rows = _resample(frame.reshape(frame.shape[0], -1), height)
        columns = _resample(rows.reshape(height, frame.shape[1], 3).swapaxes(0, 1), width)
        image = columns.reshape(width, height, 3).swapaxes(0, 1)
        resized[index] = np.clip(np.rint(image), 0, 255)
    return resized


def _resample(image: np.ndarray, size: int) -> Float[np.ndarray, "size rest"]:
    """Resamples axis 0; the rest is flattened."""
    flat = image.reshape(len(image), -1)
    result = np.empty((size, flat.shape[1]), np.float32)
    for start, stop, low, weights in _bands(len(image), size):
        part = flat[low : low + weights.shape[1]].astype(np.float32, copy=False)
        result[start:stop] = weights @ part
    return result


@functools.lru_cache(maxsize=64)
def _bands(before: int, after: int) -> list[tuple[int, int, int, np.ndarray]]:
    """(start, stop, first input, weights) for blocks of 16 outputs: a banded matrix product."""
    weights = _bicubic_weights(before, after)
    bands = []
    for start in range(0, after, 16):
        rows = weights[start : start + 16]
        used = np.flatnonzero(rows.any(axis=0))
        low, high = used[0], used[-1] + 1
        bands.append((start, start + len(rows), low, np.ascontiguousarray(rows[:, low:high])))
    return bands


def _bicubic_weights(before: int, after: int) -> Float[np.ndarray, "after before"]:
    scale = before / after
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    weights = np.zeros((after, before))
    for index in range(after):
        centre = scale * (index + 0.5)
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), before)
        taps = _cubic((np.arange(low, high) - centre + 0.5) / stretch)
        weights[index, low:high] = taps / taps.sum()
    return weights.astype(np.float32)


def _cubic(x: Float[np.ndarray, " n"], a: float = -0.5) -> Float[np.ndarray, " n"]:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def patchify(frames: UInt8[np.ndarray, "T H W C"]) -> UInt8[np.ndarray, "P 1176"]:
    """Raw patches in merge-block order: rows (t, y/2, x/2, y%2, x%2), columns (C, frame, y, x).

    T must be even, or 1 for a still image, which is then repeated in its patches; H and W must be
    multiples of 28. Raises ValueError otherwise.
    """
    if len(frames) == 1:
        frames = np.repeat(frames, TEMPORAL_PATCH, axis=0)
    t, height, width, channels = frames.shape
    if t % TEMPORAL_PATCH or height % UNIT or width % UNIT or channels != 3:
        raise ValueError(
            f"patchify needs an even number of RGB frames with sides in multiples of {UNIT}, got "
            f"{frames.shape}. Sample with frame_indices and resize with smart_resize first."
        )
    blocks = frames.reshape(
        t // TEMPORAL_PATCH,
        TEMPORAL_PATCH,
        height // UNIT,
        MERGE,
        PATCH,
        width // UNIT,
        MERGE,
        PATCH,
        channels,
    )
    #                        t  y/2 x/2 y%2 x%2  C  tp  ph  pw
    ordered = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return ordered.reshape(-1, channels * TEMPORAL_PATCH * PATCH * PATCH)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class VisionLayout:
    """The order of a clip's patches in the vision tower: whole windows, one after another.

    Tower slot i holds patch `order[i]` of `patchify`, at `hw[i]` inside its frame, in window
    `window[i]` and frame pair `frame[i]`, both counted from 1. The output for unit j in (t, y, x)
    order is at `unit_slot[j]`.
    """

    order: Int[np.ndarray, " P"]
    hw: Int[np.ndarray, "P 2"]
    window: Int[np.ndarray, " P"]
    frame: Int[np.ndarray, " P"]
    unit_slot: Int[np.ndarray, " P/4"]


@functools.lru_cache(maxsize=256)
def vision_layout(grid: Grid) -> VisionLayout:
    """Layout of a (t, h, w) patch grid; h and w must be even. The arrays are cached: do not modify.

    A frame of 1 x 6 units is cut into windows of 4 and 2 units:

        unit    0  1  2  3 | 4  5
        window  1  1  1  1 | 2  2
    """
    t, h, w = grid
    if min(grid) < 1 or h % MERGE or w % MERGE:
        raise ValueError(f"A grid needs t >= 1 and even h and w, got {grid}.")
    rows, columns = h // MERGE, w // MERGE
    frame, y, x = (axis.ravel() for axis in np.indices((t, rows, columns)))
    across = -(-columns // WINDOW_UNITS)
    per_frame = across * -(-rows // WINDOW_UNITS)
    window = frame * per_frame + (y // WINDOW_UNITS) * across + x // WINDOW_UNITS
    unit_order = np.argsort(window, kind="stable")  # Row-major inside a window.
    unit_slot = np.empty(len(window), np.int32)
    unit_slot[unit_order] = np.arange(len(window))
    inner = np.arange(MERGE * MERGE)
    order = unit_order[:, None] * len(inner) + inner
    row, column = y[unit_order, None] * MERGE, x[unit_order, None] * MERGE
    hw = np.stack([row + inner // MERGE, column + inner % MERGE], -1)
    layout = VisionLayout(
        order=order.reshape(-1).astype(np.int32),
        hw=hw.reshape(-1, 2).astype(np.int32),
        window=np.repeat(window[unit_order] + 1, len(inner)).astype(np.int32),
        frame=np.repeat(frame[unit_order] + 1, len(inner)).astype(np.int32),
        unit_slot=unit_slot,
    )
    for field in dataclasses.fields(layout):
        getattr(layout, field.name).flags.writeable = False
    return layout


def join_layouts(layouts: Sequence[VisionLayout]) -> VisionLayout:
    """The layout of several clips, one after another in one buffer of patches."""
    none = np.zeros(0, np.int32)
    empty = VisionLayout(order=none, hw=none.reshape(0, 2), window=none, frame=none, unit_slot=none)
    return functools.reduce(_behind, layouts, empty)


def _behind(first: VisionLayout, second: VisionLayout) -> VisionLayout:
    patches, units = len(first.order), len(first.unit_slot)
    return VisionLayout(
        order=np.concatenate([first.order, second.order + patches]),
        hw=np.concatenate([first.hw, second.hw]),
        window=np.concatenate([first.window, second.window + first.window.max(initial=0)]),
        frame=np.concatenate([first.frame, second.frame + first.frame.max(initial=0)]),
        unit_slot=np.concatenate([first.unit_slot, second.unit_slot + units]),
    )


def mel_frames(samples: int) -> int:
    """The number of rows of `log_mel` for this many samples."""
    return -(-min(samples, MAX_AUDIO_SECONDS * SAMPLE_RATE) // HOP)


def log_mel(pcm: Int16[np.ndarray, " n"] | Float[np.ndarray, " n"]) -> Float[np.ndarray, "F 128"]:
    """Whisper log-mel of 16 kHz mono sound: float32 [ceil(n / 160), 128], one row every 10 ms.

    `pcm` is int16, or floats in [-1, 1]. Sound is cut at 300 s, as in Qwen2.5-Omni. Equal to the
    valid frames of transformers' WhisperFeatureExtractor, but without padding to 300 s first.
    """
    wave = pcm.astype(np.float32) / 32768 if pcm.dtype == np.int16 else pcm.astype(np.float32)
    most = MAX_AUDIO_SECONDS * SAMPLE_RATE
    wave = wave[:most]
    count = mel_frames(len(wave))
    if count == 0:
        return np.zeros((0, MELS), np.float32)
    # The windows of two frames past the end still contain sound and affect the maximum below. The
    # extractor has no frames after 300 s, and reflects the sound there as it does at its beginning.
    frames = min(count + 2, most // HOP)
    padded = np.zeros(FFT // 2 + frames * HOP + FFT, np.float32)
    padded[FFT // 2 : FFT // 2 + len(wave)] = wave
    padded[: FFT // 2] = padded[FFT // 2 + 1 : FFT + 1][::-1]
    if frames == most // HOP:
        padded[FFT // 2 + most : FFT + most] = padded[most - 1 : FFT // 2 + most - 1][::-1]
    windows = np.lib.stride_tricks.sliding_window_view(padded, FFT)[::HOP][:frames]
    power = np.abs(np.fft.rfft(windows * _hann(), axis=1)) ** 2
    mel = np.log10(np.maximum(power @ _mel_filters(), 1e-10))
    mel = (np.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0
    return mel[:count].astype(np.float32)


@functools.cache
def _hann() -> Float[np.ndarray, " 400"]:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT) / FFT)


@functools.cache
def _mel_filters() -> Float[np.ndarray, "201 128"]:
    """Slaney's mel scale and area normalisation, 0 to 8000 Hz."""
    step, knee, log_step = 200 / 3, 15.0, math.log(6.4) / 27
    top = knee + math.log(SAMPLE_RATE / 2 / 1000) / log_step
    mels = np.linspace(0.0, top, MELS + 2)
    edges = np.where(mels < knee, mels * step, 1000 * np.exp(log_step * (mels - knee)))
    bins = np.linspace(0, SAMPLE_RATE // 2, FFT // 2 + 1)
    slopes = edges[None] - bins[:, None]
    width = np.diff(edges)
    triangles = np.minimum(-slopes[:, :-2] / width[:-1], slopes[:, 2:] / width[1:])
    return np.maximum(triangles, 0) * (2.0 / (edges[2:] - edges[:-2]))


def audio_chunks(
    mel: Float[np.ndarray, "F 128"],
) -> tuple[Float[np.ndarray, "n 200 128"], Int[np.ndarray, " n"]]:
    """Chunks of 2 s, the last one zero-padded, and the number of valid frames of each."""
    count = -(-len(mel) // CHUNK_FRAMES)
    chunks = np.zeros((count * CHUNK_FRAMES, MELS), np.float32)
    chunks[: len(mel)] = mel
    lengths = np.minimum(len(mel) - CHUNK_FRAMES * np.arange(count), CHUNK_FRAMES)
    return chunks.reshape(count, CHUNK_FRAMES, MELS), lengths.astype(np.int32)
