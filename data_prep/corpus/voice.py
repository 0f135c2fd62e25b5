"""Speech of the embedded corpus: espeak-ng with the prosody of four emotions, and room tone.

An emotion sets espeak-ng's pitch, pitch range and rate, and then the sound's level, spectral tilt,
saturation and tremor.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int16

from data_prep.corpus.espeak import HEADER

SAMPLE_RATE = 16_000
FRAMES_PER_SECOND = 10
MIN_FRAMES, MAX_FRAMES = 12, 20
# AAC codes 1024 samples at a time and decoders return whole blocks: 31 blocks stay within 2.0 s.
MAX_SAMPLES = 31 * 1024
_ONSET = 0.06  # Seconds of room tone before and after speech, at least.
_SIZES = (0.92, 1.09)  # Of a speaker: pitch and formants are scaled by it.
_NOISE_RMS = (2e-4, 2e-3)  # Of the quietest and of the noisiest room.

_LANGUAGE = {"en": "en-us", "zh": "cmn"}  # espeak-ng voices.
_WORDS_PER_MINUTE = {"en": 145.0, "zh": 165.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prosody:
    """How an emotion sounds. espeak's pitch and range run from 0 to 99 around 50."""

    pitch: float
    pitch_range: float
    rate: float  # Factor on the language's words per minute.
    level: float  # Speech RMS in dB below full scale.
    tilt: float  # Spectral slope in dB per octave around 1 kHz; positive is bright.
    drive: float  # Saturation in units of the signal's RMS; 0 is clean.
    tremor: float  # Depth of a 6 Hz amplitude wobble.


PROSODY = {
    "neutral": Prosody(pitch=45, pitch_range=30, rate=1.0, level=-25, tilt=-1, drive=0, tremor=0),
    "happy": Prosody(pitch=92, pitch_range=99, rate=1.15, level=-19, tilt=4, drive=0, tremor=0),
    "sad": Prosody(pitch=20, pitch_range=8, rate=0.8, level=-32, tilt=-5, drive=0, tremor=0.5),
    "angry": Prosody(pitch=42, pitch_range=70, rate=1.18, level=-13, tilt=2, drive=3, tremor=0),
}


def prosody(emotion: str, intensity: float, rng: np.random.Generator) -> Prosody:
    """`emotion` at `intensity` (0 is neutral, 1 is full), with a little variation from `rng`."""
    neutral, full = (dataclasses.asdict(PROSODY[e]) for e in ("neutral", emotion))
    mixed = {k: v + intensity * (full[k] - v) for k, v in neutral.items()}
    mixed["pitch"] += rng.normal(0, 4)
    mixed["pitch_range"] += rng.normal(0, 4)
    mixed["rate"] *= np.exp(rng.normal(0, 0.05))
    mixed["level"] += rng.normal(0, 1)
    return Prosody(**mixed)


class Speaker:
    """A running espeak-ng process; equal requests give equal samples, in any order.

    Close it, or use it in a `with` statement.
    """

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "data_prep.corpus.espeak"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert self._process.stdin and self._process.stdout
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Ends the process."""
        self._process.communicate()

    def speak(
        self, text: str, language: str, variant: str, *, rate: float, pitch: float, spread: float
    ) -> tuple[Int16[np.ndarray, " samples"], int]:
        """(samples, samples per second) of one utterance; `rate` is in words per minute.

        `pitch` and `spread` (pitch range) run from 0 to 99. An unknown `variant` is
        espeak-ng's plain voice. Raises RuntimeError when espeak-ng made no sound.
        """
        request = {
            "text": text,
            "voice": f"{_LANGUAGE[language]}+{variant}",
            "rate": round(rate),
            "pitch": round(min(99, max(0, pitch))),
            "range": round(min(99, max(0, spread))),
        }
        self._requests.write(json.dumps(request).encode() + b"\n")
        self._requests.flush()
        header = self._answers.read(HEADER.size)
        rate_out, count = HEADER.unpack(header) if len(header) == HEADER.size else (0, 0)
        pcm = np.frombuffer(self._answers.read(count), np.int16)
        if not pcm.size:
            raise RuntimeError(
                f"espeak-ng made no sound for {request}. Check the text, and that "
                "`python -m data_prep.corpus.espeak` starts."
            )
        return pcm, rate_out


def voice_track(
    speaker: Speaker,
    text: str,
    language: str,
    variant: str,
    style: Prosody,
    rng: np.random.Generator,
) -> tuple[Int16[np.ndarray, " samples"], int]:
    """The clip's sound, int16 at 16 kHz with room tone, and its number of video frames (even).

    A sentence that would not fit in the longest clip is spoken again, faster.
    """
    size = rng.uniform(*_SIZES)
    longest = MAX_SAMPLES / SAMPLE_RATE - 2 * _ONSET
    rate = style.rate * _WORDS_PER_MINUTE[language]
    while True:
        raw, raw_rate = speaker.speak(
            text, language, variant, rate=rate / size, pitch=style.pitch, spread=style.pitch_range
        )
        speech = _trim(_resample(raw / 32768.0, round(raw_rate * size / 50) * 50))
        if len(speech) <= longest * SAMPLE_RATE:
            break
        rate *= 1.05
    speech = _colour(speech, style)
    seconds = len(speech) / SAMPLE_RATE + 2 * _ONSET
    frames = min(MAX_FRAMES, max(MIN_FRAMES, 2 * int(np.ceil(seconds * FRAMES_PER_SECOND / 2))))
    samples = min(MAX_SAMPLES, frames * SAMPLE_RATE // FRAMES_PER_SECOND)
    quietest, noisiest = np.log(_NOISE_RMS)
    track = rng.normal(0, np.exp(rng.uniform(quietest, noisiest)), samples)
    start = int((samples - len(speech)) * rng.uniform(0.1, 0.9))
    track[start : start + len(speech)] += speech
    return np.round(np.clip(track, -1, 1) * 32767).astype(np.int16), frames


def _resample(x: Float[np.ndarray, " n"], rate: int) -> Float[np.ndarray, " m"]:
    """Band-limited resampling to 16 kHz by cutting the spectrum.

    The padding keeps the circular wrap-around silent and makes both lengths fast to transform.
    """
    block = 8 * rate // np.gcd(rate, SAMPLE_RATE)
    length_in = block * -(-(len(x) + rate // 10) // block)
    length_out = length_in * SAMPLE_RATE // rate
    spectrum = np.fft.rfft(x, length_in)[: length_out // 2 + 1]
    samples = len(x) * SAMPLE_RATE // rate
    return np.fft.irfft(spectrum, length_out)[:samples] * (length_out / length_in)


def _trim(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    """Without the silence before and after, 40 dB below the peak."""
    loud = np.flatnonzero(np.abs(x) > 0.01 * np.abs(x).max())
    return x[loud[0] : loud[-1] + 1]


def _colour(x: Float[np.ndarray, " n"], style: Prosody) -> Float[np.ndarray, " n"]:
    """Spectral tilt, saturation, tremor and level of `style`."""
    length = 1600 * (len(x) // 1600 + 2)  # Longer than the speech, and fast to transform.
    octaves = np.log2(np.maximum(np.fft.rfftfreq(length, 1 / SAMPLE_RATE), 80.0) / 1000.0)
    tilted = np.fft.rfft(x, length) * 10 ** (style.tilt * octaves / 20)
    x = np.fft.irfft(tilted, length)[: len(x)]
    x = x / np.sqrt(np.mean(x**2))
    if style.drive > 0:
        x = np.tanh(style.drive * x)
    x = x * (1 + style.tremor * np.sin(2 * np.pi * 6 * np.arange(len(x)) / SAMPLE_RATE))
    x = x / np.sqrt(np.mean(x**2)) * 10 ** (style.level / 20)
    return np.tanh(x)  # Peaks of loud speech bend instead of clipping.
