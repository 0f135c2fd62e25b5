"""Small random conversations, and the static batches that the network takes, for any test.

No torch here: tests/hf/reference.py turns the same conversations into the reference's inputs.
"""

import dataclasses

import numpy as np

from saber_jax.batch import Batch, Prompts, empty, row_of
from saber_jax.data.media import audio_chunks, audio_tokens, patchify, vision_layout
from saber_jax.data.packing import Budget
from saber_jax.data.tmrope import MediaIds, tmrope
from saber_jax.models.config import (
    AudioConfig,
    SaberConfig,
    TextConfig,
    TokenIds,
    VisionConfig,
)

IDS = TokenIds(
    pad=0,
    im_start=1,
    eos=2,
    audio=3,
    audio_bos=4,
    audio_eos=5,
    vision_bos=6,
    vision_eos=7,
    image=8,
    video=9,
)

# Every size differs from every other where it may, so that no two axes can be swapped unnoticed.
CONFIG = SaberConfig(
    text=TextConfig(
        layers=3,
        width=48,
        heads=6,
        kv_heads=2,
        head_dim=16,
        mlp_dim=80,
        vocab=120,
        rope_theta=1e6,
        mrope_section=(2, 3, 3),
        norm_eps=1e-6,
        max_positions=4096,
    ),
    vision=VisionConfig(
        depth=3, width=32, heads=2, mlp_dim=44, out_width=48, full_attention_layers=(1,)
    ),
    audio=AudioConfig(layers=2, width=40, heads=4, mlp_dim=72, out_width=48),
    tokens=IDS,
)


@dataclasses.dataclass(frozen=True)
class Text:
    tokens: int


@dataclasses.dataclass(frozen=True)
class Video:
    grid: tuple[int, int, int]
    seconds: float = 1.0


@dataclasses.dataclass(frozen=True)
class Image:
    grid: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Audio:
    frames: int


@dataclasses.dataclass(frozen=True)
class AudioInVideo:
    video: Video
    audio: Audio


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Tokens and their positions, the frames of every image and video, the mel of every audio."""

    parts: tuple
    tokens: np.ndarray
    positions: np.ndarray
    frames: list[np.ndarray]
    mels: list[np.ndarray]

    @property
    def videos(self) -> list[Video | Image]:
        """The images and videos of `parts`, videos with sound included."""
        inner = (p.video if isinstance(p, AudioInVideo) else p for p in self.parts)
        return [p for p in inner if isinstance(p, Video | Image)]


def conversation(seed: int, *parts) -> Conversation:
    """A random conversation of these parts."""
    rng = np.random.default_rng(seed)
    tokens, frames, mels = [IDS.im_start], [], []
    for part in parts:
        both = isinstance(part, AudioInVideo)
        video, audio = (part.video, part.audio) if both else (part, part)
        if isinstance(video, Video | Image):
            frames.append(_frames(rng, video))
        if isinstance(audio, Audio):
            mels.append(rng.normal(0, 0.5, (audio.frames, 128)).astype(np.float32))
        tokens += _tokens(rng, part)
    tokens.append(IDS.eos)
    positions = _positions(np.array(tokens), parts)
    return Conversation(parts, np.array(tokens), positions, frames, mels)


def _frames(rng, video: Video | Image) -> np.ndarray:
    t, h, w = video.grid
    frames = rng.integers(0, 256, (2 * t, 14 * h, 14 * w, 3), dtype=np.uint8)
    if isinstance(video, Image):
        frames[1] = frames[0]
    return frames


def _tokens(rng, part) -> list[int]:
    if isinstance(part, Text):
        return rng.integers(10, 120, part.tokens).tolist()
    if isinstance(part, Audio):
        return [IDS.audio_bos] + [IDS.audio] * audio_tokens(part.frames) + [IDS.audio_eos]
    if isinstance(part, AudioInVideo):
        t, h, w = part.video.grid
        seen = np.repeat(np.arange(t), h * w // 4) * part.video.seconds * 25
        heard = np.arange(audio_tokens(part.audio.frames), dtype=float)
        woven = np.concatenate([seen // 50 * 2, heard // 50 * 2 + 1])  # 2 s of video, 2 s of audio.
        kinds = np.repeat([IDS.video, IDS.audio], [len(seen), len(heard)])
        body = kinds[np.argsort(woven, kind="stable")].tolist()
        return [IDS.vision_bos, IDS.audio_bos, *body, IDS.audio_eos, IDS.vision_eos]
    kind = IDS.image if isinstance(part, Image) else IDS.video
    return [IDS.vision_bos] + [kind] * (np.prod(part.grid) // 4) + [IDS.vision_eos]


def _positions(tokens: np.ndarray, parts) -> np.ndarray:
    both = [p for p in parts if isinstance(p, AudioInVideo)]
    videos = [p.video if isinstance(p, AudioInVideo) else p for p in parts]
    videos = [p for p in videos if isinstance(p, Video)]
    audios = [p.audio if isinstance(p, AudioInVideo) else p for p in parts]
    return tmrope(
        tokens,
        MediaIds(
            image=IDS.image,
            video=IDS.video,
            audio=IDS.audio,
            vision_bos=IDS.vision_bos,
            audio_bos=IDS.audio_bos,
        ),
        grids=[v.grid for v in videos],
        seconds_per_grid=[v.seconds for v in videos],
        audio_frames=[a.frames for a in audios if isinstance(a, Audio)],
        image_grids=[p.grid for p in parts if isinstance(p, Image)],
        use_audio_in_video=bool(both),
    )


def pack(
    rows: list[list[Conversation]], *, length: int, patches: int, chunks: int
) -> Batch[np.ndarray]:
    """A static batch without targets; every row holds its conversations one after another."""
    budget = Budget(length=length, patches=patches, chunks=chunks, targets=0, segments=0)
    batch = empty(len(rows), budget)
    for number, row in enumerate(rows):
        _fill(row_of(batch, number), row)
    return batch


def prompts(batch: Batch, ends: np.ndarray, lengths: np.ndarray) -> Prompts:
    """The parts of a packed batch that generation reads."""
    return Prompts(
        text=batch.text, vision=batch.vision, audio=batch.audio, ends=ends, lengths=lengths
    )


def _fill(out: Batch[np.ndarray], row: list[Conversation]) -> None:
    units = len(out.vision.frame) // 4
    slot = patch = chunk = 0
    for number, talk in enumerate(row, start=1):
        seen, heard = [], []
        for frames, video in zip(talk.frames, talk.videos, strict=True):
            layout = vision_layout(video.grid)
            here = slice(patch, patch + len(layout.order))
            out.vision.patches[here] = patchify(frames)[layout.order]
            out.vision.hw[here] = layout.hw
            for column, ids in (
                (out.vision.window, layout.window),
                (out.vision.frame, layout.frame),
            ):
                column[here] = ids + column.max()
            seen.append(layout.unit_slot + patch // 4)
            patch = here.stop
        for mel in talk.mels:
            pieces, lengths = audio_chunks(mel)
            out.audio.mel[chunk : chunk + len(pieces)] = pieces
            out.audio.lengths[chunk : chunk + len(pieces)] = lengths
            heard.append(np.arange(audio_tokens(len(mel))) + units + 50 * chunk)
            chunk += len(pieces)
        here = slice(slot, slot + len(talk.tokens))
        out.text.tokens[here], out.text.segments[here] = talk.tokens, number
        out.text.positions[:, here] = talk.positions
        index = out.text.media_index[here]
        for kind, rows in (((IDS.image, IDS.video), seen), ((IDS.audio,), heard)):
            if rows:
                index[np.isin(talk.tokens, kind)] = np.concatenate(rows)
        slot = here.stop


def text_batch(rows: int, length: int, *, seed: int = 0) -> Batch[np.ndarray]:
    """Rows of words without any media buffers."""
    talks = [[conversation(seed + row, Text(length - 2))] for row in range(rows)]
    return pack(talks, length=length, patches=0, chunks=0)
