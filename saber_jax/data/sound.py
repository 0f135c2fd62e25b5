"""Collects a decoded sound track as 16 kHz mono, with every sample at its timestamp."""

import dataclasses
import itertools
import math
from fractions import Fraction

import av
import numpy as np
import soxr
from jaxtyping import Float, Int16

from saber_jax.data import media
from saber_jax.data.frame_sampling import MediaError

TOLERANCE = 0.02
"""Timestamps that differ from the sample count by less than this, in seconds, are ignored.

Containers round timestamps, so small differences have no meaning; 20 ms are half an audio token.
"""


@dataclasses.dataclass
class _Run:
    """Samples without a gap, float32 in -1..1 at one rate, starting at `start` seconds."""

    start: float
    rate: int
    pieces: list[np.ndarray] = dataclasses.field(default_factory=list)
    samples: int = 0

    @property
    def end(self) -> float:
        return self.start + self.samples / self.rate


class Track:
    """Collects decoded audio frames and returns the sound.

    A gap in the timestamps or a change of the sample rate begins a new run. Only the first
    `max_seconds` of sound are kept.
    """

    def __init__(self, max_seconds: float):
        self._max_seconds = max_seconds
        self._runs: list[_Run] = []
        self._guessed = False  # Whether no frame had a timestamp yet.
        self._format: tuple | None = None
        self._resampler: av.AudioResampler | None = None

    @property
    def start(self) -> float | None:
        """Time of the first sample in seconds, None without any."""
        return self._runs[0].start if self._runs else None

    @property
    def full(self) -> bool:
        """Whether there is more sound than `max_seconds`; the rest need not be decoded."""
        return bool(self._runs) and self._runs[-1].end - self._runs[0].start > self._max_seconds

    @property
    def holes(self) -> int:
        """Number of gaps of more than TOLERANCE in the timestamps."""
        pairs = itertools.pairwise(self._runs)
        return sum(after.start - before.end > TOLERANCE for before, after in pairs)

    def hear(self, frame: av.AudioFrame) -> None:
        """Adds the next frame of the track. Raises MediaError for NaN and infinite samples."""
        if self.full:
            return
        pieces = self._mono(frame)
        last = self._runs[-1] if self._runs else None
        expected = last.end if last else 0.0
        time = expected
        if frame.pts is not None and frame.time_base:
            time = float(frame.pts * frame.time_base)
        if not sum(map(len, pieces)):
            return
        if frame.pts is not None and self._guessed:
            self._guessed = False
            if abs(time - expected) > TOLERANCE:  # The first samples are before time zero.
                self._runs, last = [], None
        elif frame.pts is None and last is None:
            self._guessed = True
        if last is None or last.rate != frame.sample_rate or abs(time - expected) > TOLERANCE:
            last = _Run(start=time, rate=frame.sample_rate)
            self._runs.append(last)
        last.pieces += pieces
        last.samples += sum(map(len, pieces))

    def _mono(self, frame: av.AudioFrame) -> list[Float[np.ndarray, " n"]]:
        """The mean of all channels, as in librosa."""
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._format or self._resampler is None:
            # In a packed format, because PyAV crashes for planar sound with eight or more channels.
            self._format, self._resampler = kind, av.AudioResampler(format="flt")
        channels = frame.layout.nb_channels
        parts = self._resampler.resample(frame)
        pieces = [part.to_ndarray().reshape(-1, channels).mean(axis=1) for part in parts]
        if not all(np.isfinite(piece).all() for piece in pieces):
            raise MediaError("unreadable", "the sound has samples that are not numbers")
        return pieces

    def placed(self, start: Fraction | float) -> Int16[np.ndarray, " n"]:
        """The sound from `start` seconds on.

        Gaps are silent. Later runs overwrite earlier ones that overlap: a Matroska file has no
        timestamps for sound before zero, and FFmpeg invents some.
        """
        most = int(self._max_seconds * media.SAMPLE_RATE)
        sound, end = np.zeros(most, np.int16), 0
        for run in self._runs:
            heard = resample(np.concatenate(run.pieces), run.rate)
            place = round((run.start - float(start)) * media.SAMPLE_RATE)
            heard, place = heard[max(0, -place) :], min(max(0, place), most)
            sound[place:end] = 0
            end = min(place + len(heard), most)
            sound[place:end] = heard[: end - place]
        return sound[:end].copy()

    def joined(self) -> Int16[np.ndarray, " n"]:
        """All samples one after another, ignoring timestamps."""
        heard = [resample(np.concatenate(run.pieces), run.rate) for run in self._runs]
        most = int(self._max_seconds * media.SAMPLE_RATE)
        return np.concatenate([np.zeros(0, np.int16), *heard])[:most]


def resample(sound: Float[np.ndarray, " n"], rate: int) -> Int16[np.ndarray, " m"]:
    """Resamples to 16 kHz with the resampler of librosa.load, with which the model was trained.

    n samples become ceil(n * 16000 / rate), as in librosa. FFmpeg's own resampler has another
    response near 8 kHz, which changes the highest mel bins by up to 1.3.
    """
    if rate != media.SAMPLE_RATE:
        length = math.ceil(len(sound) * media.SAMPLE_RATE / rate)
        sound = soxr.resample(sound, rate, media.SAMPLE_RATE, quality="HQ")[:length]
        sound = np.pad(sound, (0, length - len(sound)))
    return np.clip(np.rint(sound * 32768), -32768, 32767).astype(np.int16)
