"""From one SABER record to one encoded example: tokens, positions, patches, mel. NumPy only."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, UInt8

from saber_jax.data import chat, media, sed
from saber_jax.data.records import Record
from saber_jax.data.tasks import Request
from saber_jax.data.tokenizer import Tokenizer
from saber_jax.data.withhold import MODALITIES

# Index in batch["conflict"]; "other" takes every name that a corpus has and we don't.
CONFLICT_TYPES = ("none", "sarcasm", "masking", "suppression", "leakage", "other")

# Index in batch["ignored"]; "" where nobody knows.
IGNORED = ("", *MODALITIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """One answer, end token included; `sections[i]` is 1..6, the field that token i belongs to."""

    tokens: Int[np.ndarray, "R"]
    sections: Int[np.ndarray, "R"]

    @classmethod
    def encode(cls, tokenizer: Tokenizer, text: str) -> "Response":
        tokens, sections = sed.section_of_tokens(tokenizer, text)
        return cls(tokens=tokens, sections=sections)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A clip's prompt and media, ready to be packed, and none, one or two responses to it."""

    clip_id: str
    prompt: chat.Prompt
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
    """What an example asks of a row's budgets.

    `text` counts the slots of the region that all branches see: the prompt and, in a pair, the
    tokens with which both responses begin; `chosen` and `rejected` count the two remainders. For a
    single response everything is `text`.
    """

    text: int
    chosen: int
    rejected: int
    patches: int
    chunks: int
    targets: int


def common_prefix(chosen: Int[np.ndarray, "R"], rejected: Int[np.ndarray, "S"]) -> int:
    """How many tokens the two responses begin with in common."""
    n = min(len(chosen), len(rejected))
    differs = np.flatnonzero(chosen[:n] != rejected[:n])
    return int(differs[0]) if len(differs) else n


def size_of(example: Example) -> Size:
    """See `Size`."""
    prompt = len(example.prompt.tokens)
    lengths = [len(r.tokens) for r in example.responses]
    media_sizes = {"patches": len(example.patches), "chunks": len(example.mel_lengths)}
    if len(lengths) < 2:
        total = sum(lengths)
        return Size(text=prompt + total, chosen=0, rejected=0, targets=total, **media_sizes)
    shared = common_prefix(*(r.tokens for r in example.responses))
    return Size(
        text=prompt + shared,
        chosen=lengths[0] - shared,
        rejected=lengths[1] - shared,
        targets=sum(lengths) - shared,
        **media_sizes,
    )


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
    """Encodes a record as the answer to `request`, by default the six-section one.

    `responses` defaults to the record's own target; `()` gives a bare prompt. `kappa` defaults to
    the record's own label; `ignored` and `reference` are those of a pair.
    """
    pictures, layout = _pictures(record), None
    patches = np.zeros((0, media.PATCH_FEATURES), np.uint8)
    if pictures:
        layout = media.vision_layout(pictures.grid)
        patches = media.patchify(record.frames)[layout.order]
    mel = media.log_mel(record.audio)
    chunks, lengths = media.audio_chunks(mel)
    if responses is None:
        responses = (sed.target_text(record.annotation, request.sections),)
    conflict = record.labels.get("conflict_type", "none")
    return Example(
        clip_id=record.clip_id,
        prompt=_prompt(record, tokenizer, request, len(mel)),
        patches=patches,
        layout=layout,
        mel=chunks,
        mel_lengths=lengths,
        responses=tuple(Response.encode(tokenizer, text) for text in responses),
        kappa=float(record.labels.get("kappa", 0.0) if kappa is None else kappa),
        conflict=CONFLICT_TYPES.index(conflict if conflict in CONFLICT_TYPES else "other"),
        ignored=IGNORED.index(ignored),
        reference=reference,
    )


def asked_again(
    example: Example, record: Record, tokenizer: Tokenizer, request: Request
) -> Example:
    """The same clip as the answer to another request; its media is not touched again."""
    target = sed.target_text(record.annotation, request.sections)
    return dataclasses.replace(
        example,
        prompt=_prompt(record, tokenizer, request, int(example.mel_lengths.sum())),
        responses=(Response.encode(tokenizer, target),),
    )


def _prompt(record: Record, tokenizer: Tokenizer, request: Request, mel_frames: int) -> chat.Prompt:
    shown = _shown(record, mel_frames)
    instruction = record.question or request.instruction(record.language)
    return sed.encode_prompt(tokenizer, record.language, shown, instruction)


def _shown(record: Record, mel_frames: int) -> list[chat.Media]:
    """The clip's media in the order of the prompt. Fewer than three mel frames make no sound."""
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
