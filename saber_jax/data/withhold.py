"""Withholds one modality of a record, with all media tokens kept in the prompt.

The prompt is the same, but the modality's tokens carry no information. Preference pairs are mined
from answers to such records, and probes and the demo show how much a model uses a modality.
"""

import dataclasses
from typing import Literal, get_args

import numpy as np

from saber_jax.data import records

Modality = Literal["audio", "video"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)

View = Literal["whole", "audio", "video", "both"]
"""What is withheld when an answer's log-probability is taken: nothing, one modality, or both."""
VIEWS: tuple[View, ...] = get_args(View)

# The middle of the uint8 range: nearly zero after the processor's mean and deviation.
GREY = 128

# What data/media.py's log_mel makes of silence: 1e-10 of power, the floor under its logarithm.
SILENT_MEL = -1.5


def withhold(record: records.Record, modality: Modality) -> records.Record:
    """Returns `record` with silence for its audio or mid-grey for its frames.

    Lengths, sizes and times are unchanged, so both versions give the same prompt. A modality that
    the record does not have stays absent. Raises ValueError for anything but "audio" and "video".
    """
    if modality == "audio":
        return dataclasses.replace(record, audio=np.zeros_like(record.audio))
    if modality == "video":
        return dataclasses.replace(record, frames=np.full_like(record.frames, GREY))
    raise ValueError(
        f"Only a modality can be withheld, got {modality!r}. Use one of {', '.join(MODALITIES)}."
    )


def replace(record: records.Record, other: records.Record, modality: Modality) -> records.Record:
    """Returns `record` with the audio, or the frames and their times, of another clip."""
    if modality == "audio":
        return dataclasses.replace(record, audio=other.audio)
    return dataclasses.replace(record, frames=other.frames, seconds_per_grid=other.seconds_per_grid)


def has_modality(record: records.Record, modality: Modality) -> bool:
    """Whether there is anything to withhold."""
    return bool((record.audio if modality == "audio" else record.frames).size)
