"""A sound track as it is decoded: 16 kHz mono, every sample where its timestamp says."""

import dataclasses
import itertools
import math
from fractions import Fraction

import av
import numpy as np
import soxr
from jaxtyping import Float, Int16

from saber_jax.data import media

TOLERANCE = 0.02
"""Seconds by which a timestamp may differ from the sample count before it is believed.

Containers round timestamps, so small differences mean nothing; 20 ms are half an audio token.
"""


@dataclasses.dataclass
class _Run:
    """Samples without a hole between them, float32 in -1..1 at one rate, from `start` seconds."""

    start: float
    rate: int
    pieces: list[np.ndarray] = dataclasses.field(default_factory=list)
    samples: int = 0

    @property
    def end(self) -> float:
        return self.start + self.samples / self.rate


class Track:
    """Collects decoded frames and gives the sound.

    A hole in the timestamps and a change of rate begin a new run. At most `max_seconds` of sound
    are held, counted from the first sample: what comes later is not kept.
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
        """Places where the timestamps leave out more than TOLERANCE."""
        pairs = itertools.pairwise(self._runs)
        return sum(after.start - before.end > TOLERANCE for before, after in pairs)

    def hear(self, frame: av.AudioFrame) -> None:
        """Adds the next frame of the track."""
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
            if abs(time - expected) > TOLERANCE:  # What came first lies before zero.
                self._runs, last = [], None
        elif frame.pts is None and last is None:
            self._guessed = True
        if last is None or last.rate != frame.sample_rate or abs(time - expected) > TOLERANCE:
            last = _Run(start=time, rate=frame.sample_rate)
            self._runs.append(last)
        last.pieces += pieces
        last.samples += sum(map(len, pieces))

    def _mono(self, frame: av.AudioFrame) -> list[Float[np.ndarray, " n"]]:
        """The mean of all channels, as librosa has it."""
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._format or self._resampler is None:
            # Packed, because PyAV crashes on the planes of eight and more channels.
            self._format, self._resampler = kind, av.AudioResampler(format="flt")
        channels = frame.layout.nb_channels
        parts = self._resampler.resample(frame)
        return [part.to_ndarray().reshape(-1, channels).mean(axis=1) for part in parts]

    def placed(self, start: Fraction | float) -> Int16[np.ndarray, " n"]:
        """The sound from `start` seconds on.

        Holes are silent. Of what overlaps the later counts: for sound before its zero, a Matroska
        file has no timestamps, and FFmpeg makes some up.
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
        """All samples one after another, whatever their timestamps say."""
        heard = [resample(np.concatenate(run.pieces), run.rate) for run in self._runs]
        most = int(self._max_seconds * media.SAMPLE_RATE)
        return np.concatenate([np.zeros(0, np.int16), *heard])[:most]


def resample(sound: Float[np.ndarray, " n"], rate: int) -> Int16[np.ndarray, " m"]:
    """To 16 kHz by the resampler that librosa.load uses, on which the released model was trained.

    n samples become ceil(n * 16000 / rate), as there. FFmpeg's own resampler lets other frequencies
    pass near 8 kHz: the highest mel bins change by up to 1.3.
    """
    if rate != media.SAMPLE_RATE:
        length = math.ceil(len(sound) * media.SAMPLE_RATE / rate)
        sound = soxr.resample(sound, rate, media.SAMPLE_RATE, quality="HQ")[:length]
        sound = np.pad(sound, (0, length - len(sound)))
    return np.clip(np.rint(sound * 32768), -32768, 32767).astype(np.int16)
