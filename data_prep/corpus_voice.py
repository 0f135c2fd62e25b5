"""Speech of the embedded corpus: espeak-ng text to speech with four emotions as prosody.

espeak-ng keeps hidden state between utterances, so one process speaking twice gives two different
waveforms. `Speaker.speak` therefore forks: every utterance is made by a fresh copy of the library
exactly as it was after initialisation, which makes each clip independent of all others.

espeak-ng (GPL-3, from the espeakng-loader wheel) is a tool run at build time; nothing of it is
copied into this project or into the clips' licence.
"""

import ctypes
import dataclasses
import os
from collections.abc import Callable

import espeakng_loader
import numpy as np
from jaxtyping import Float, Int16

SAMPLE_RATE = 16_000
FRAMES_PER_SECOND = 10
MIN_FRAMES, MAX_FRAMES = 12, 20
# AAC codes 1024 samples at a time and decoders return whole blocks: 31 blocks stay within 2.0 s.
MAX_SAMPLES = 31 * 1024
_ONSET = 0.06  # Seconds of room tone before and after speech, at least.
_NOISE_RMS = 4e-4

# From espeak-ng/speak_lib.h.
_SYNCHRONOUS, _UTF8 = 2, 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_LANGUAGE = {"en": "en-us", "zh": "cmn"}
_WORDS_PER_MINUTE = {"en": 160.0, "zh": 190.0}
_ON_SAMPLES = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


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
    "neutral": Prosody(
        pitch=48, pitch_range=40, rate=1.0, level=-24, tilt=0, drive=0, tremor=0
    ),
    "happy": Prosody(
        pitch=88, pitch_range=95, rate=1.12, level=-20, tilt=3, drive=0, tremor=0
    ),
    "sad": Prosody(
        pitch=20, pitch_range=8, rate=0.8, level=-32, tilt=-5, drive=0, tremor=0.5
    ),
    "angry": Prosody(
        pitch=42, pitch_range=70, rate=1.18, level=-13, tilt=2, drive=3, tremor=0
    ),
}


def prosody(emotion: str, intensity: float, rng: np.random.Generator) -> Prosody:
    """`emotion` at `intensity` (0 is neutral, 1 is full), with a little variation from `rng`."""
    neutral, full = (dataclasses.asdict(PROSODY[e]) for e in ("neutral", emotion))
    mixed = {k: v + intensity * (full[k] - v) for k, v in neutral.items()}
    mixed["pitch"] += rng.normal(0, 2)
    mixed["pitch_range"] += rng.normal(0, 2)
    mixed["rate"] *= np.exp(rng.normal(0, 0.015))
    mixed["level"] += rng.normal(0, 0.8)
    return Prosody(**mixed)


class Speaker:
    """The espeak-ng library, initialised once in this process and never spoken with directly.

    Raises RuntimeError when the library cannot start. Needs os.fork, so it runs on Linux and macOS,
    and the process must have no other threads: use it in a worker process.
    """

    def __init__(self):
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path()
        self.sample_rate = self._library.espeak_Initialize(
            _SYNCHRONOUS, 0, str(data).encode(), 0
        )
        if self.sample_rate <= 0:
            raise RuntimeError(
                f"espeak-ng did not start from {data}: code {self.sample_rate}. "
                "Reinstall the espeakng-loader wheel."
            )

    def speak(
        self, text: str, language: str, variant: str, *, rate: float, pitch: float, spread: float
    ) -> Int16[np.ndarray, " samples"]:
        """One utterance at `self.sample_rate`; equal arguments give equal samples in any process.

        `rate` is in words per minute. Raises RuntimeError when espeak-ng produced no sound.
        """
        settings = {_RATE: rate, _PITCH: pitch, _RANGE: spread, _VOLUME: 100}
        voice = f"{_LANGUAGE[language]}+{variant}"
        pcm = np.frombuffer(_in_child(lambda: self._utter(text, voice, settings)), np.int16)
        if not pcm.size:
            raise RuntimeError(f"espeak-ng made no sound for {text!r} with the voice {voice!r}.")
        return pcm

    def _utter(self, text: str, voice: str, settings: dict[int, float]) -> bytes:
        blocks = []

        def collect(samples, count, _events):
            if samples and count > 0:
                blocks.append(ctypes.string_at(samples, 2 * count))
            return 0

        on_samples = _ON_SAMPLES(collect)
        self._library.espeak_SetSynthCallback(on_samples)
        if self._library.espeak_SetVoiceByName(voice.encode()):
            return b""
        for parameter, value in settings.items():
            self._library.espeak_SetParameter(parameter, round(value), 0)
        data = text.encode()
        self._library.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        return b"".join(blocks)


def _in_child(work: Callable[[], bytes]) -> bytes:
    """Result of `work` run in a forked copy of this process; b"" when it failed there."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(work())
        finally:
            os._exit(0)  # Never run the parent's exit handlers in the copy.
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        result = pipe.read()
    os.waitpid(child, 0)
    return result


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
    longest = MAX_SAMPLES / SAMPLE_RATE - 2 * _ONSET
    rate = style.rate * _WORDS_PER_MINUTE[language]
    while True:
        raw = speaker.speak(
            text, language, variant, rate=rate, pitch=style.pitch, spread=style.pitch_range
        )
        speech = _trim(_resample(raw / 32768.0, speaker.sample_rate))
        if len(speech) <= longest * SAMPLE_RATE:
            break
        rate *= 1.05
    speech = _colour(speech, style)
    seconds = len(speech) / SAMPLE_RATE + 2 * _ONSET
    frames = min(MAX_FRAMES, max(MIN_FRAMES, 2 * int(np.ceil(seconds * FRAMES_PER_SECOND / 2))))
    samples = min(MAX_SAMPLES, frames * SAMPLE_RATE // FRAMES_PER_SECOND)
    track = rng.normal(0, _NOISE_RMS, samples)
    start = int((samples - len(speech)) * rng.uniform(0.4, 0.6))
    track[start : start + len(speech)] += speech
    return np.round(np.clip(track, -1, 1) * 32767).astype(np.int16), frames


def _resample(x: Float[np.ndarray, " n"], rate: int) -> Float[np.ndarray, " m"]:
    """Band-limited resampling to 16 kHz by cutting the spectrum."""
    samples = len(x) * SAMPLE_RATE // rate
    padded = np.pad(x, (0, rate // 10))  # Keeps the circular wrap-around silent.
    length = len(padded) * SAMPLE_RATE // rate
    spectrum = np.fft.rfft(padded)[: length // 2 + 1]
    return np.fft.irfft(spectrum, length)[:samples] * (length / len(padded))


def _trim(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    """Without the silence before and after, 40 dB below the peak."""
    loud = np.flatnonzero(np.abs(x) > 0.01 * np.abs(x).max())
    return x[loud[0] : loud[-1] + 1]


def _colour(x: Float[np.ndarray, " n"], style: Prosody) -> Float[np.ndarray, " n"]:
    """Spectral tilt, saturation, tremor and level of `style`."""
    frequency = np.fft.rfftfreq(len(x), 1 / SAMPLE_RATE)
    octaves = np.log2(np.maximum(frequency, 80.0) / 1000.0)
    x = np.fft.irfft(np.fft.rfft(x) * 10 ** (style.tilt * octaves / 20), len(x))
    x = x / np.sqrt(np.mean(x**2))
    if style.drive > 0:
        x = np.tanh(style.drive * x)
    x = x * (1 + style.tremor * np.sin(2 * np.pi * 6 * np.arange(len(x)) / SAMPLE_RATE))
    x = x / np.sqrt(np.mean(x**2)) * 10 ** (style.level / 20)
    return np.tanh(x)  # Peaks of loud speech bend instead of clipping.
