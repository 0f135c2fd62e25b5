"""Video files to model-ready frames and sound, with PyAV.

A clip is read twice. First the timestamps of its packets are read (data/timeline.py), because
headers are often wrong and the choice of frames depends on the clip's duration. Then it is decoded
(`_decoded`). Frames are resized as they are decoded, and only the chosen ones stay in memory.

    sampled times   0.0         0.5         1.0         1.5
    frames          |  a  |  b  |  c              |  d  |     each until the next one's timestamp
    chosen frames   a           c           c           d
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, Int16, UInt8

from saber_jax.data import media, sound
from saber_jax.data.frame_sampling import (
    MAX_PIXELS,
    MIN_PIXELS,
    MODES,
    REASONS,
    RELEASE_MAX_FRAMES,
    RELEASE_MAX_PIXELS,
    TOTAL_PIXELS,
    FrameSampling,
    MediaError,
    Mode,
    check_shape,
    release_sampling,
)
from saber_jax.data.pictures import PICTURES, decode_image
from saber_jax.data.timeline import (
    Timeline,
    check_header,
    check_length,
    opened,
    packets,
    read_timeline,
    sound_track,
)

__all__ = [
    "MAX_PIXELS",
    "MIN_PIXELS",
    "MODES",
    "PICTURES",
    "REASONS",
    "RELEASE_MAX_FRAMES",
    "RELEASE_MAX_PIXELS",
    "TOTAL_PIXELS",
    "DecodedClip",
    "FrameSampling",
    "MediaError",
    "Mode",
    "decode_clip",
    "decode_image",
    "decode_sound",
    "display_matrix",
    "release_sampling",
]

Sampling = FrameSampling
"""Its former name, for scripts outside of this project."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DecodedClip:
    """A decoded clip: even T, sides in multiples of 28, 16 kHz mono sound, facts for provenance."""

    frames: UInt8[np.ndarray, "T H W 3"]
    seconds_per_grid: float
    audio: Int16[np.ndarray, " n"]
    info: dict[str, Any]


def decode_sound(path: str | Path, sampling: FrameSampling) -> Int16[np.ndarray, " n"]:
    """The sound of an audio or video file, 16 kHz mono. Raises MediaError."""
    path = Path(path)
    track = sound.Track(sampling.max_seconds)
    with opened(path) as container:
        stream = sound_track(path, container)
        check_header(path, container, sampling)
        for packet in packets(container, [stream]):
            for frame in packet.decode():
                track.hear(frame)
            if track.full:
                check_length(path, sampling.max_seconds + 0.1, sampling, at_least=True)
    if track.start is None:
        raise MediaError("no_audio", f"{path.name}: the audio track is empty")
    audio = track.joined() if sampling.mode == "saber_release" else track.placed(track.start)
    check_length(path, len(audio) / media.SAMPLE_RATE, sampling)
    return audio


def decode_clip(path: str | Path, sampling: FrameSampling, *, sound: bool = True) -> DecodedClip:
    """Decodes one video file of any container and codec that FFmpeg reads; without `sound`, only
    its frames.

    In mode "exact" the clip is what a player shows: upright, with each frame until the next one's
    timestamp. Its sound starts at the first frame; it is cut, or preceded by silence, according to
    the timestamps of the tracks. Raises MediaError for any fault of the file.
    """
    path = Path(path)
    timeline = read_timeline(path, sampling, sound)
    film = _decoded(path, timeline, sampling, sound)
    if film.times != sorted(film.times):
        timeline = dataclasses.replace(timeline, disordered=True)
        film = _decoded(path, timeline, sampling, sound)
    lost = 0.0
    if film.times != timeline.times:
        # Some packets give no frame (cut groups of pictures, hidden frames); sample existing ones.
        lost = _lost_at_start(path, film.times, timeline.times)
        timeline = timeline.of(film.times)
        film = _decoded(path, timeline, sampling, sound)
    frames = np.stack(film.kept)
    audio = np.zeros(0, np.int16)
    if sound:
        if film.sound.start is None:
            raise MediaError("no_audio", f"{path.name}: the audio track is empty")
        by_time = sampling.mode == "exact"
        audio = film.sound.placed(timeline.start) if by_time else film.sound.joined()
        if not audio.size:
            raise MediaError("no_audio", f"{path.name}: the sound ends before the first frame")
    seconds = timeline.seconds / (len(frames) / media.TEMPORAL_PATCH)
    return DecodedClip(
        frames=frames,
        seconds_per_grid=1.0 if sampling.mode == "saber_release" else seconds,
        audio=audio,
        info=_facts(timeline, film, sampling)
        | {"audio_seconds": _seconds(audio), "start_lost": round(lost, 6)},
    )


def _lost_at_start(path: Path, shown: list[float], stamped: list[float]) -> float:
    """Seconds of the film before its first frame that decodes, given the times of all packets.

    A recording that is cut inside a group of pictures begins with frames that nobody can decode,
    and a player begins at the first that it can. Raises MediaError if that is more than half of the
    film, or if a tenth of the frames after it is missing too: then the file is damaged.
    """
    after = sum(time >= shown[0] - 1e-6 for time in stamped) if shown else 0
    least = max(0.9 * after, 0.5 * len(stamped), media.TEMPORAL_PATCH)
    if len(shown) < least:
        detail = f"{path.name}: only {len(shown)} of {len(stamped)} frames decode"
        raise MediaError("unreadable", detail)
    return max(0.0, shown[0] - stamped[0])


def _seconds(audio: Int16[np.ndarray, " n"]) -> float:
    return round(len(audio) / media.SAMPLE_RATE, 6)


@dataclasses.dataclass
class _Film:
    """The frames shown at `moments` (seconds), resized; the times of all frames; the sound."""

    path: Path
    sampling: FrameSampling
    moments: Float[np.ndarray, " T"]
    sound: sound.Track
    kept: list[np.ndarray] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)
    turned: int = 0
    shape: tuple[int, int] | None = None
    _size: tuple[int, int] | None = None
    _shown: av.VideoFrame | None = None
    _reformatter: VideoReformatter = dataclasses.field(default_factory=VideoReformatter)

    @property
    def count(self) -> int:
        return len(self.times)

    def see(self, frame: av.VideoFrame, time: float) -> None:
        """Adds the next frame in display order, which is shown from `time` on."""
        self._keep_until(time)
        self._shown = frame

    def end(self) -> None:
        """Ends the clip: the last frame is used for all remaining moments."""
        self._keep_until(float("inf"))

    def _keep_until(self, time: float) -> None:
        if self._shown is None:
            return
        due = int(np.searchsorted(self.moments, time)) - len(self.kept)
        if due > 0:
            self.kept += [self._resized(self._shown)] * due

    def _resized(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
        check_shape(self.path.name, frame.height, frame.width)
        picture = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        picture = _upright(picture, display_matrix(frame))
        if self._size is None:  # A stream may change its size midway; the first frame decides.
            self.shape = picture.shape[:2]
            self.turned = frame.rotation
            self._size = self.sampling.frame_size(*self.shape, len(self.moments))
        return media.resize_bicubic(picture[None], *self._size)[0]


def _decoded(path: Path, timeline: Timeline, sampling: FrameSampling, sounds: bool) -> _Film:
    """Decodes in one pass and keeps the frames that are shown at the sampled times."""
    clock = timeline.by_number() if sampling.mode == "saber_release" else timeline
    # An uneven clip may have fewer frames per second than are sampled; then frames are repeated.
    finer = 1 if clock.even else math.ceil(sampling.fps / clock.rate)
    indices = media.frame_indices(
        clock.ticks * finer,
        clock.rate * finer,
        fps=sampling.fps,
        min_frames=sampling.min_frames,
        max_frames=sampling.max_frames,
    )
    # Half a tick is added because a frame belongs to the tick nearest to its timestamp.
    moments = clock.start + (indices + 0.5) / (clock.rate * finer)
    film = _Film(path, sampling, moments, sound.Track(sampling.max_seconds))
    with opened(path) as container:
        video = container.streams[timeline.video]
        streams = [video, *([sound_track(path, container)] if sounds else [])]
        for packet in packets(container, streams):
            for frame in packet.decode():
                if isinstance(frame, av.AudioFrame):
                    film.sound.hear(frame)
                elif isinstance(frame, av.VideoFrame):
                    number, stamp = len(film.times), frame.pts
                    if stamp is None and timeline.hidden and not number:
                        continue
                    time = (
                        clock.time(number)
                        if stamp is None
                        else float(stamp * (frame.time_base or 0))
                    )
                    if timeline.disordered:
                        time = clock.time(number)
                    film.times.append(time)
                    film.see(frame, clock.start + number / clock.rate if clock.even else time)
        film.end()
    return film


def _facts(timeline: Timeline, film: _Film, sampling: FrameSampling) -> dict[str, Any]:
    height, width = film.shape or (0, 0)
    late = film.sound.start
    return {
        "frames": len(timeline.times),
        "seconds": round(timeline.seconds, 6),
        "height": height,
        "width": width,
        "turned": film.turned,
        "even": timeline.even,
        "sampled_by": "number" if sampling.mode == "saber_release" else "time",
        "sound_late": None if late is None else round(late - timeline.start, 6),
        "sound_holes": film.sound.holes,
    }


def display_matrix(frame: av.VideoFrame) -> list[int] | None:
    """The display matrix by which a player rotates or mirrors frames; None if there is none.

    Its nine numbers are a b u, c d v, x y w of x' = a x + c y, y' = b x + d y.
    """
    stored = cast(Mapping[Any, Any], frame.side_data)  # PyAV's type declares another key type.
    data = stored.get(SideData.DISPLAYMATRIX)
    if data is None:
        return None
    return np.frombuffer(bytes(data), "<i4").tolist()


def _upright(
    picture: UInt8[np.ndarray, "H W 3"], matrix: list[int] | None
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture, rotated by the nearest multiple of 90 degrees and mirrored."""
    if matrix is None:
        return picture
    a, b, _, c, d, *_ = matrix
    across, down = a, d
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture, across, down = picture.swapaxes(0, 1), c, b
    if across < 0:
        picture = picture[:, ::-1]
    if down < 0:
        picture = picture[::-1]
    return np.ascontiguousarray(picture)
