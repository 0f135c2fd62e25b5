"""Conversations in Qwen2.5-Omni's format: chat template, media placeholders and media slots.

A message holds text and media in any order. Each medium is rendered as one placeholder, which is
expanded after tokenisation to one token per output of its tower. For a video of 4 frame pairs with
one unit each, one second apart, and 3 s of sound, one after the other and interleaved (V is one
token of the video, A is 25 tokens of the sound, small letters are the markers around them):

    Video, Audio     v V V V V /v a A A A /a
    AudioInVideo     v a V V A A V V A /a /v

Axis letters: n tokens.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from saber_jax.data import media, texts, tmrope
from saber_jax.data.tmrope import Grid
from saber_jax.data.tokenizer import Tokenizer

TEXT, VISION, AUDIO = 0, 1, 2
"""Values of `EncodedPrompt.media_kind`."""

DEFAULT_SYSTEM = "You are a helpful assistant."
"""The system message of a conversation that has none of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Image:
    """A still of (1, h, w) patches."""

    grid: Grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
    """(t, h, w) patches, `seconds_per_grid` apart along t."""

    grid: Grid
    seconds_per_grid: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audio:
    """Sound of `frames` mel frames (10 ms). Fewer than three give no token: ValueError."""

    frames: int

    def __post_init__(self):
        if tmrope.audio_tokens(self.frames) == 0:
            raise ValueError(
                f"A sound of {self.frames} mel frames has no token; leave out those below 3."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioInVideo:
    """A video interleaved with its own sound every two seconds (`use_audio_in_video`)."""

    video: Video
    audio: Audio


Media = Image | Video | Audio | AudioInVideo

_PLACEHOLDERS = {
    Image: "<|vision_bos|><|IMAGE|><|vision_eos|>",
    Video: "<|vision_bos|><|VIDEO|><|vision_eos|>",
    Audio: "<|audio_bos|><|AUDIO|><|audio_eos|>",
    AudioInVideo: "<|vision_bos|><|VIDEO|><|vision_eos|>",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One turn; `role` is "system", "user" or "assistant"."""

    role: str
    content: tuple[str | Media, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedPrompt:
    """An encoded conversation with its placeholders expanded.

    `media_slot` is a unit index in the vision tower's (window) order within the example, or
    chunk * 50 + pooled position of the audio tower within the example, or 0 for text.
    Response token i sits at position next_position + i on all three axes.
    """

    tokens: Int[np.ndarray, " n"]
    positions: Int[np.ndarray, "3 n"]
    media_kind: Int[np.ndarray, " n"]
    media_slot: Int[np.ndarray, " n"]
    next_position: int


def render(messages: Sequence[Message], *, open_answer: bool = True) -> str:
    """The text that is tokenised, with one placeholder per medium.

    With `open_answer` it ends where the assistant's answer starts.
    """
    if not messages or messages[0].role != "system":
        messages = [Message(role="system", content=(DEFAULT_SYSTEM,)), *messages]
    text = ""
    for message in messages:
        parts = [
            part if isinstance(part, str) else _PLACEHOLDERS[type(part)] for part in message.content
        ]
        text += f"<|im_start|>{message.role}\n{''.join(parts)}<|im_end|>\n"
    return text + ("<|im_start|>assistant\n" if open_answer else "")


def encode(
    tokenizer: Tokenizer, messages: Sequence[Message], *, open_answer: bool = True
) -> EncodedPrompt:
    """Tokens, TMRoPE positions and media slots of a conversation.

    Images and videos get their slots in the order in which they appear, and so do sounds. Raises
    ValueError if the text itself contains a special token, or if some videos are interleaved with
    their sound and others are not: `use_audio_in_video` of the released model applies to a whole
    conversation.
    """
    parts = [part for message in messages for part in message.content]
    shown = [part for part in parts if not isinstance(part, str)]
    for text in (part for part in parts if isinstance(part, str)):
        if special := texts.SPECIAL.search(text):
            raise ValueError(
                f"{special[0]} in a message would be read as media or as the end of a turn; write "
                "it otherwise."
            )
    woven = sum(isinstance(part, AudioInVideo) for part in shown)
    if woven and any(isinstance(part, Video) for part in shown):
        raise ValueError(
            f"The conversation has {woven} videos interleaved with their sound and others that "
            "are not; interleave all of them or none."
        )
    ids = media_ids(tokenizer)
    audio_eos = tokenizer.id("<|audio_eos|>")
    row = _expand(
        tokenizer.encode(render(messages, open_answer=open_answer)), ids, audio_eos, shown
    )
    videos = [p.video if isinstance(p, AudioInVideo) else p for p in shown]
    pictures = [p for p in videos if isinstance(p, Image | Video)]
    videos = [p for p in pictures if isinstance(p, Video)]
    sounds = [p.audio if isinstance(p, AudioInVideo) else p for p in shown]
    frames = [p.frames for p in sounds if isinstance(p, Audio)]
    positions = tmrope.tmrope(
        row,
        ids,
        grids=[video.grid for video in videos],
        seconds_per_grid=[video.seconds_per_grid for video in videos],
        audio_frames=frames,
        image_grids=[p.grid for p in pictures if isinstance(p, Image)],
        use_audio_in_video=bool(woven),
    )
    kind = np.full(len(row), TEXT, np.int8)
    kind[(row == ids.video) | (row == ids.image)] = VISION
    kind[row == ids.audio] = AUDIO
    slot = np.zeros(len(row), np.int32)
    slot[kind == VISION] = media.join_layouts(
        [media.vision_layout(p.grid) for p in pictures]
    ).unit_slot
    slot[kind == AUDIO] = _audio_slots(frames)
    return EncodedPrompt(
        tokens=row,
        positions=positions.astype(np.int32),
        media_kind=kind,
        media_slot=slot,
        # As when the answer is part of the conversation: not behind frames of a video that lie
        # later than the text after it, though rope_deltas of transformers says so.
        next_position=int(positions[0, -1]) + 1,
    )


def media_ids(tokenizer: Tokenizer) -> tmrope.MediaIds:
    """The media token ids of a vocabulary."""
    return tmrope.MediaIds(
        image=tokenizer.id("<|IMAGE|>"),
        video=tokenizer.id("<|VIDEO|>"),
        audio=tokenizer.id("<|AUDIO|>"),
        vision_bos=tokenizer.id("<|vision_bos|>"),
        audio_bos=tokenizer.id("<|audio_bos|>"),
    )


def _expand(
    tokens: list[int], ids: tmrope.MediaIds, audio_eos: int, shown: Sequence[Media]
) -> Int[np.ndarray, " n"]:
    """Repeats each placeholder once for every token of its medium."""
    waiting = list(reversed(shown))
    row: list[int] = []
    for token in tokens:
        if token not in (ids.image, ids.video, ids.audio):
            row.append(token)
            continue
        medium = waiting.pop() if waiting else None
        if isinstance(medium, AudioInVideo):
            video, heard = medium.video, tmrope.audio_tokens(medium.audio.frames)
            woven = tmrope.woven(video.grid, video.seconds_per_grid, heard)
            body = np.where(woven, ids.audio, ids.video).tolist()
            row += [ids.audio_bos, *body, audio_eos]
        elif isinstance(medium, Audio):
            row += [token] * tmrope.audio_tokens(medium.frames)
        elif medium is not None:
            row += [token] * tmrope.grid_tokens(medium.grid)
    return np.asarray(row, np.int32)


def _audio_slots(frames: Sequence[int]) -> Int[np.ndarray, " tokens"]:
    """Slots of sounds: a chunk of 200 frames pools to 50 tokens, and every sound starts a chunk."""
    slots, chunk = [np.zeros(0, np.int32)], 0
    for count in frames:
        slots.append(
            np.arange(tmrope.audio_tokens(count), dtype=np.int32) + chunk * media.CHUNK_TOKENS
        )
        chunk += -(-count // media.CHUNK_FRAMES)
    return np.concatenate(slots)
