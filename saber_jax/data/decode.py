"""Video files to model-ready frames and sound, with PyAV; pictures with Pillow."""

import contextlib
import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import soxr
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, Int, Int16, UInt8
from PIL import Image

from saber_jax.data import media

Mode = Literal["exact", "saber_release"]
MODES: tuple[Mode, ...] = ("exact", "saber_release")

# Constants of qwen_omni_utils 0.0.8, which the SABER release was made with.
MIN_PIXELS = 128 * 28 * 28
MAX_PIXELS = 768 * 28 * 28
TOTAL_PIXELS = int(128_000 * 28 * 28 * 0.9)
MAX_FRAMES = 768
IMAGE_MIN_PIXELS = 4 * 28 * 28
IMAGE_MAX_PIXELS = 16384 * 28 * 28
# Environment of the published SABER inference script.
RELEASE_MAX_FRAMES = 40
RELEASE_MAX_PIXELS = 50_176
RELEASE_IMAGE_MAX_PIXELS = 1_003_520

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
"""Suffixes of the files that `decode_image` is for."""

REASONS = {
    "empty_file": "the file has zero bytes",
    "unreadable": "the file cannot be decoded",
    "no_video": "the file has no video track",
    "no_audio": "the file has no audio track",
    "too_long": "the clip is longer than allowed",
    "too_short": "the clip has fewer than two frames",
}


class MediaError(ValueError):
    """A file that gives no clip. `reason` is a key of REASONS, `detail` says what was found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{REASONS[reason]}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return (type(self), (self.reason, self.detail))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which frames and how many pixels to keep, and whether to weave the sound into the video.

    Mode "exact" honours every limit and measures the seconds between frame pairs. Mode
    "saber_release" repeats what produced the published SABER results: a `max_pixels` below
    1.05 * `min_pixels` has no effect there, and the seconds are always 1.0.
    """

    mode: Mode = "exact"
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = MAX_FRAMES
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    max_seconds: float = 300.0
    audio_in_video: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"Unknown mode {self.mode!r}; use one of {', '.join(MODES)}.")
        if self.mode == "exact" and self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels {self.min_pixels} exceeds max_pixels {self.max_pixels}; no frame size "
                "satisfies both."
            )
        if self.fps <= 0 or self.max_frames < media.TEMPORAL_PATCH:
            raise ValueError(
                f"fps must be positive and max_frames at least {media.TEMPORAL_PATCH}, got "
                f"{self.fps} and {self.max_frames}."
            )

    def frame_size(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """(height, width) after resizing a clip of which `frames` frames are kept."""
        limit = min(self.max_pixels, TOTAL_PIXELS / frames * media.TEMPORAL_PATCH)
        if self.mode == "saber_release":
            limit = max(limit, int(self.min_pixels * 1.05))
        return media.smart_resize(height, width, min(self.min_pixels, int(limit)), int(limit))


def release_sampling() -> Sampling:
    """The settings of the published SABER inference script."""
    return Sampling(
        mode="saber_release", max_frames=RELEASE_MAX_FRAMES, max_pixels=RELEASE_MAX_PIXELS
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """A decoded clip: even T, sides in multiples of 28, 16 kHz mono sound, facts for provenance."""

    frames: UInt8[np.ndarray, "T H W 3"]
    seconds_per_grid: float
    audio: Int16[np.ndarray, " n"]
    info: dict[str, Any]


def decode_image(path: str | Path, mode: Mode = "exact") -> UInt8[np.ndarray, "1 H W 3"]:
    """A picture as the frames of a still-image record, resized as the released processor does.

    What is transparent becomes white. Raises MediaError.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            if picture.mode == "RGBA":
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            picture = picture.convert("RGB")
    except (OSError, ValueError) as error:
        raise MediaError("unreadable", f"{Path(path).name}: {error}") from error
    most = IMAGE_MAX_PIXELS if mode == "exact" else RELEASE_IMAGE_MAX_PIXELS
    height, width = media.smart_resize(picture.height, picture.width, IMAGE_MIN_PIXELS, most)
    # Pillow itself, because it rounds between its two passes: no other resize gives these pixels.
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))[None]


def decode_sound(path: str | Path, sampling: Sampling) -> Int16[np.ndarray, " n"]:
    """The sound of an audio or video file, 16 kHz mono. Raises MediaError."""
    path, tracks = Path(path), _Tracks()
    try:
        with _opened(path) as container:
            if not container.streams.audio:
                raise MediaError("no_audio", path.name)
            resampler = av.AudioResampler(format="fltp")
            for frame in container.decode(container.streams.audio[0]):
                tracks.hear(frame, resampler)
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise MediaError("unreadable", f"{path.name}: {error}") from error
    if not tracks.sound:
        raise MediaError("no_audio", f"{path.name}: the audio track is empty")
    audio = _resampled(np.concatenate(tracks.sound), tracks.sound_rate)
    _check_length(path, len(audio) / media.SAMPLE_RATE, sampling)
    return audio


def decode_clip(path: str | Path, sampling: Sampling, *, sound: bool = True) -> Clip:
    """Decodes one video file of any container and codec that FFmpeg reads; without `sound` its
    frames alone.

    In mode "exact" the sound starts at the first frame: it is cut or led in by silence as the
    tracks' own times say. Raises MediaError.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise MediaError("empty_file", path.name)
    try:
        timeline = _timeline(path, sampling, sound)
        frames, audio = _content(path, timeline, sampling, sound)
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise MediaError("unreadable", f"{path.name}: {error}") from error
    info = {
        "frames": timeline.count,
        "seconds": round(float(timeline.seconds), 6),
        "height": timeline.height,
        "width": timeline.width,
        "audio_seconds": round(len(audio) / media.SAMPLE_RATE, 6),
    }
    seconds = float(timeline.seconds) / (len(frames) / media.TEMPORAL_PATCH)
    if sampling.mode == "saber_release":
        seconds = 1.0
    return Clip(frames=frames, seconds_per_grid=seconds, audio=audio, info=info)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Timeline:
    """What the packets of the video track say, before anything is decoded. Times in seconds."""

    count: int
    start: Fraction
    seconds: Fraction
    height: int
    width: int


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    """Every opening decodes a little to learn the formats, so a clip is opened only twice."""
    with av.open(str(path), metadata_errors="ignore") as container:
        for stream in (*container.streams.video, *container.streams.audio):
            stream.codec_context.thread_count = 1  # Callers decode many clips at once.
        yield container


def _check_header(path: Path, container: InputContainer, sampling: Sampling, sound: bool) -> None:
    """Refuses before any packet is read, so that a film of four hours costs nothing."""
    if not container.streams.video:
        raise MediaError("no_video", path.name)
    if sound and not container.streams.audio:
        raise MediaError("no_audio", path.name)
    if container.duration:
        _check_length(path, container.duration / av.time_base, sampling)


def _check_length(path: Path, seconds: float, sampling: Sampling) -> None:
    if seconds > sampling.max_seconds:
        detail = f"{path.name}: {seconds:.1f} s, allowed are {sampling.max_seconds:g} s"
        raise MediaError("too_long", detail)


def _timeline(path: Path, sampling: Sampling, sound: bool) -> _Timeline:
    """Counts the frames from the packets: headers are often wrong, decoding twice is slow."""
    times: list[Fraction] = []
    end = Fraction(0)
    with _opened(path) as container:
        _check_header(path, container, sampling, sound)
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        for packet in container.demux():
            if packet.size == 0:
                continue
            stamp = packet.pts if packet.pts is not None else packet.dts
            time = stamp * packet.time_base if stamp is not None else None
            if time is not None:
                end = max(end, time + (packet.duration or 0) * packet.time_base)
            if packet.stream is stream:
                times.append(len(times) / rate if time is None else time)
        promised = (container.duration or 0) / av.time_base
        offset = (container.start_time or 0) / av.time_base
        height, width = stream.height, stream.width
    if promised and float(end) - offset < 0.9 * promised - 0.1:
        detail = f"{path.name}: cut off after {float(end) - offset:.2f} of {promised:.2f} s"
        raise MediaError("unreadable", detail)
    if len(times) < media.TEMPORAL_PATCH:
        raise MediaError("too_short", f"{path.name}: {len(times)} frame(s)")
    start, last = min(times), max(times)
    # The last frame is shown for as long as the average one.
    seconds = (last - start) * Fraction(len(times), len(times) - 1) or len(times) / rate
    # Containers round times to ticks; a frame rate that agrees with them is exact. Without it, 3 s
    # of 12 frames a second would be 2.9999 s and keep two frames less.
    if abs(len(times) / rate - seconds) < 1 / rate:
        seconds = len(times) / rate
    _check_length(path, float(seconds), sampling)
    return _Timeline(count=len(times), start=start, seconds=seconds, height=height, width=width)


def _content(
    path: Path, timeline: _Timeline, sampling: Sampling, sound: bool
) -> tuple[UInt8[np.ndarray, "T H W 3"], Int16[np.ndarray, " n"]]:
    indices = _indices(timeline.count, timeline, sampling)
    tracks = _decoded(path, indices, sound)
    if tracks.count != timeline.count:
        # Some packets give no frame (cut groups of pictures, hidden frames): sample what exists.
        if tracks.count < max(0.9 * timeline.count, media.TEMPORAL_PATCH):
            detail = f"{path.name}: only {tracks.count} of {timeline.count} frames decode"
            raise MediaError("unreadable", detail)
        indices = _indices(tracks.count, timeline, sampling)
        tracks = _decoded(path, indices, sound)
    if sound and not tracks.sound:
        raise MediaError("no_audio", f"{path.name}: the audio track is empty")
    frames = np.stack([tracks.pictures[index] for index in indices.tolist()])
    height, width = sampling.frame_size(frames.shape[1], frames.shape[2], len(frames))
    none = np.zeros(0, np.float32)
    audio = _resampled(np.concatenate([none, *tracks.sound]), tracks.sound_rate)
    if sampling.mode == "exact" and tracks.sound_start is not None:
        late = tracks.sound_start - timeline.start
        audio = _shifted(audio, round(late * media.SAMPLE_RATE))
    most = int(sampling.max_seconds * media.SAMPLE_RATE)
    return media.resize_bicubic(frames, height, width), audio[:most]


def _indices(count: int, timeline: _Timeline, sampling: Sampling) -> Int[np.ndarray, " T"]:
    return media.frame_indices(
        count,
        count / float(timeline.seconds),
        fps=sampling.fps,
        min_frames=sampling.min_frames,
        max_frames=sampling.max_frames,
    )


@dataclasses.dataclass
class _Tracks:
    """RGB pictures by frame number in display order, number of frames, mono sound in pieces.

    The sound is float32 in -1..1 at `sound_rate`.
    """

    pictures: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    count: int = 0
    sound: list[np.ndarray] = dataclasses.field(default_factory=list)
    sound_rate: int = media.SAMPLE_RATE
    sound_start: Fraction | None = None

    def hear(self, frame: av.AudioFrame, resampler: av.AudioResampler) -> None:
        if self.sound_start is None and frame.pts is not None and frame.time_base:
            self.sound_start = frame.pts * frame.time_base
        self.sound_rate = frame.sample_rate
        self.sound += [part.to_ndarray().mean(axis=0) for part in resampler.resample(frame)]


def _decoded(path: Path, indices: Int[np.ndarray, " T"], sound: bool) -> _Tracks:
    """Decodes in one pass and keeps the pictures wanted and, if wanted, the sound."""
    wanted = set(indices.tolist())
    tracks = _Tracks()
    size = None
    reformatter = VideoReformatter()
    resampler = av.AudioResampler(format="fltp")  # Rate and channels stay as they are.
    with _opened(path) as container:
        streams = container.streams.video[:1] + container.streams.audio[: int(sound)]
        for frame in container.decode(*streams):
            if isinstance(frame, av.AudioFrame):
                tracks.hear(frame, resampler)
            elif isinstance(frame, av.VideoFrame):
                if tracks.count in wanted:
                    # A stream may change its size midway; the first frame decides.
                    size = size or (frame.width, frame.height)
                    picture = reformatter.reformat(frame, *size, format="rgb24", threads=1)
                    tracks.pictures[tracks.count] = picture.to_ndarray()
                tracks.count += 1
    return tracks


def _resampled(sound: Float[np.ndarray, " n"], rate: int) -> Int16[np.ndarray, " m"]:
    """To 16 kHz by the resampler that librosa.load uses, on which the released model was trained.

    FFmpeg's own lets other frequencies pass near 8 kHz: the highest mel bins change by up to 1.3.
    """
    if rate != media.SAMPLE_RATE:
        sound = soxr.resample(sound, rate, media.SAMPLE_RATE, quality="HQ")
    return np.clip(np.rint(sound * 32768), -32768, 32767).astype(np.int16)


def _shifted(audio: Int16[np.ndarray, " n"], samples: int) -> Int16[np.ndarray, " m"]:
    """Delays by `samples`, or cuts them off the front if negative."""
    if samples < 0:
        return audio[-samples:]
    return np.concatenate([np.zeros(samples, np.int16), audio])
