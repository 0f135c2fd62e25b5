"""From one SABER record to one encoded example: tokens, positions, patches, mel. NumPy only."""

import dataclasses
import re

import numpy as np
from jaxtyping import Float, Int, UInt8

from saber_jax.data import chat, media, sed
from saber_jax.data.conflicts import IGNORED, NO_CONFLICT, conflict_index
from saber_jax.data.records import FIELDS, Record
from saber_jax.data.tasks import Request
from saber_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """One answer with its end token. `sections[i]` is the section of token i, 1 to 6, or 0."""

    tokens: Int[np.ndarray, "R"]
    sections: Int[np.ndarray, "R"]

    @classmethod
    def encode(cls, tokenizer: Tokenizer, text: str) -> "Response":
        """Tokenises an answer. A text without section headings has section 0."""
        tokens, sections = sed.section_of_tokens(tokenizer, text)
        free = not any(sed.heading(field) in text for field in FIELDS)
        return cls(tokens=tokens, sections=0 * sections if free else sections)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """The encoded prompt and media of a clip, with zero, one or two responses."""

    clip_id: str
    prompt: chat.EncodedPrompt
    patches: UInt8[np.ndarray, "P 1176"]  # In tower order: window-permuted.
    layout: media.VisionLayout | None
    mel: Float[np.ndarray, "A 200 128"]
    mel_lengths: Int[np.ndarray, "A"]
    responses: tuple[Response, ...]
    kappa: float = 0.0
    conflict: int = 0
    ignored: int = 0  # Index in IGNORED of the modality that the rejected answer was given without.
    reference: Float[np.ndarray, "V n"] | None = None  # log pi_ref of every target, by view.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The number of slots that an example takes from each budget of a row.

    `text` counts the prompt and, in a pair, the tokens that both responses begin with; `chosen` and
    `rejected` count the rest of the two responses. With a single response everything is `text`.
    """

    text: int
    chosen: int
    rejected: int
    patches: int
    chunks: int
    targets: int


def common_prefix(chosen: Int[np.ndarray, "R"], rejected: Int[np.ndarray, "S"]) -> int:
    """The number of tokens at the beginning that the two responses have in common."""
    n = min(len(chosen), len(rejected))
    differs = np.flatnonzero(chosen[:n] != rejected[:n])
    return int(differs[0]) if len(differs) else n


def size_of(example: Example) -> Size:
    """See `Size`."""
    media_sizes = {"patches": len(example.patches), "chunks": len(example.mel_lengths)}
    return _size(example.prompt, example.responses, **media_sizes)


def _size(
    prompt: chat.EncodedPrompt, responses: tuple[Response, ...], *, patches: int, chunks: int
):
    lengths, shared = [len(r.tokens) for r in responses], 0
    text, rest = len(prompt.tokens) + sum(lengths), (0, 0)
    if len(responses) == 2:
        shared = common_prefix(*(r.tokens for r in responses))
        text, rest = len(prompt.tokens) + shared, (lengths[0] - shared, lengths[1] - shared)
    return Size(
        text=text,
        chosen=rest[0],
        rejected=rest[1],
        patches=patches,
        chunks=chunks,
        targets=sum(lengths) - shared,
    )


def measure_record(
    record: Record,
    tokenizer: Tokenizer,
    *,
    request: Request = Request(),
    responses: tuple[str, ...] | None = None,
) -> tuple[Size, Int[np.ndarray, " n"]]:
    """`size_of` the encoded record, and its target tokens, without reading pixels and samples."""
    record = request.shown(record)
    mel_frames = media.mel_frames(len(record.audio))
    pictures = _pictures(record)
    encoded = _responses(record, tokenizer, request, responses)
    size = _size(
        _prompt(record, tokenizer, request, mel_frames),
        encoded,
        patches=int(np.prod(pictures.grid)) if pictures else 0,
        chunks=-(-mel_frames // media.CHUNK_FRAMES),
    )
    return size, np.concatenate([r.tokens for r in encoded] or [np.zeros(0, np.int32)])


def thinned(record: Record, frame_pairs: int) -> Record:
    """The record with `frame_pairs` evenly spaced pairs of its frames, including first and last.

    The seconds between pairs grow accordingly, unless the record was sampled in mode
    "saber_release", which always uses one second.
    """
    before, after = len(record.frames), 2 * frame_pairs
    kept = np.round(np.linspace(0, before - 1, after)).astype(int)
    fixed = record.provenance.get("sampling", {}).get("mode") == "saber_release"
    seconds = record.seconds_per_grid * (1.0 if fixed else before / after)
    return dataclasses.replace(record, frames=record.frames[kept], seconds_per_grid=seconds)


def encode_record(
    record: Record,
    tokenizer: Tokenizer,
    *,
    request: Request = Request(),
    responses: tuple[str, ...] | None = None,
    kappa: float | None = None,
    ignored: str = "",
    reference: Float[np.ndarray, "V n"] | None = None,
) -> Example:
    """Encodes a record with `request`, by default the six-section one, and its responses.

    `responses` defaults to the record's own target; `()` gives a prompt without a response. `kappa`
    defaults to the record's label. `ignored` and `reference` are for pairs.
    """
    record = request.shown(record)
    pictures, layout = _pictures(record), None
    patches = np.zeros((0, media.PATCH_FEATURES), np.uint8)
    if pictures:
        layout = media.vision_layout(pictures.grid)
        patches = media.patchify(record.frames)[layout.order]
    mel = media.log_mel(record.audio)
    chunks, lengths = media.audio_chunks(mel)
    conflict = record.labels.get("conflict_type", NO_CONFLICT)
    return Example(
        clip_id=record.clip_id,
        prompt=_prompt(record, tokenizer, request, len(mel)),
        patches=patches,
        layout=layout,
        mel=chunks,
        mel_lengths=lengths,
        responses=_responses(record, tokenizer, request, responses),
        kappa=float(record.labels.get("kappa", 0.0) if kappa is None else kappa),
        conflict=conflict_index(conflict),
        ignored=IGNORED.index(ignored),
        reference=reference,
    )


def _responses(
    record: Record, tokenizer: Tokenizer, request: Request, texts: tuple[str, ...] | None
) -> tuple[Response, ...]:
    if texts is None:
        # Beside an annotation, an answer of its own is the one to the six-section request.
        own = record.answer if record.messages or request.sections == FIELDS else None
        texts = (own or sed.target_text(record.annotation, request.sections),)
    return tuple(Response.encode(tokenizer, text) for text in texts)


def _prompt(
    record: Record, tokenizer: Tokenizer, request: Request, mel_frames: int
) -> chat.EncodedPrompt:
    shown = _shown(record, mel_frames)
    if record.messages:
        return chat.encode(tokenizer, _conversation(record, shown))
    instruction = record.question or request.instruction(record.language)
    return sed.encode_prompt(tokenizer, record.language, shown, instruction)


def _conversation(record: Record, shown: list[chat.Media]) -> list[chat.Message]:
    """The record's own messages with <video> and other tags replaced by media.

    Raises ValueError if tags and media do not match.
    """
    waiting = {TAGS[type(medium)]: medium for medium in shown}
    messages = []
    for message in record.messages:
        parts = [waiting.pop(p, p) for p in _TAG.split(message["content"]) if p]
        messages.append(chat.Message(role=message["role"], content=tuple(parts)))
    texts = [p for message in messages for p in message.content if isinstance(p, str)]
    if waiting or any(_TAG.fullmatch(text) for text in texts):
        has = ", ".join(TAGS[type(medium)] for medium in shown) or "no media"
        raise ValueError(
            f"The messages of {record.clip_id} and its media do not match: it has {has}, each to "
            "be named once."
        )
    return messages


TAGS = {
    chat.Image: "<image>",
    chat.Video: "<video>",
    chat.Audio: "<audio>",
    chat.AudioInVideo: "<video>",
}
"""The tag of each kind of medium in the messages of a record."""
_TAG = re.compile("(<image>|<video>|<audio>)")


def _shown(record: Record, mel_frames: int) -> list[chat.Media]:
    """The clip's media in prompt order. Sound of fewer than three mel frames is left out."""
    pictures = _pictures(record)
    sound = chat.Audio(frames=mel_frames) if media.audio_tokens(mel_frames) else None
    if record.audio_in_video and sound and isinstance(pictures, chat.Video):
        return [chat.AudioInVideo(video=pictures, audio=sound)]
    return [part for part in (pictures, sound) if part]


def _pictures(record: Record) -> chat.Image | chat.Video | None:
    count, height, width = record.frames.shape[:3]
    grid = (-(-count // media.TEMPORAL_PATCH), height // media.PATCH, width // media.PATCH)
    if count == 1:
        return chat.Image(grid=grid)
    return chat.Video(grid=grid, seconds_per_grid=record.seconds_per_grid) if count else None
