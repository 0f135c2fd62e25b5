"""Tracks and timestamps of a media file, read from its packets before decoding."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.format import Flags as ContainerFlags
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from saber_jax.data import media
from saber_jax.data.frame_sampling import FrameSampling, MediaError, check_shape

EVEN_SECONDS = 0.05
"""Frames that deviate from equal spacing by at most this count as evenly spaced."""

RESTART_SECONDS = 1.0
"""Timestamps that jump back by more than this start again, as in concatenated files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """The times at which the frames of the chosen video track are shown.

    `times` are in seconds and display order, and `start` is the first of them. The last frame is
    shown for `last` seconds, 0 if unknown. `average` and `nominal` are frame rates from the
    container. The clip is `ticks` long on a clock with `rate` ticks per second; one tick is the
    distance of frames, or the smallest distance if they are not evenly spaced.

    With `hidden`, the first frames have no timestamps: they are before time zero, for which
    Matroska has none, and no player shows them. With `disordered`, timestamps are in decoding
    order, as in AVI, and only the number of a frame is used.
    """

    video: int
    times: list[float]
    hidden: bool
    last: float
    average: float | None
    nominal: float | None
    start: float = 0.0
    rate: float = 1.0
    ticks: int = 0
    even: bool = True
    disordered: bool = False

    @property
    def seconds(self) -> float:
        return self.ticks / self.rate

    def time(self, number: int) -> float:
        """Seconds of a frame that has no timestamp: its packet's, or after the last of them."""
        if number < len(self.times):
            return self.times[number]
        return self.times[-1] + (number + 1 - len(self.times)) / self.rate

    def of(self, times: Sequence[float]) -> "Timeline":
        """The same track with frames at these times."""
        times = sorted(times)
        start, count = times[0], len(times)
        passed = np.array(times) - start
        mean = float(passed[-1]) / (count - 1) if count > 1 else 0.0
        given = dataclasses.replace(self, times=times, start=start)
        # Containers round times to their own ticks, and some writers skip a frame at the beginning,
        # so evenly spaced frames are only approximately so.
        for rate, frames in ((self.average, 1.01), (1 / mean if mean else None, 0.5)):
            if rate is None:
                continue
            slack = min(frames / rate, EVEN_SECONDS)
            if (np.abs(passed - np.arange(count) / rate) < slack).all():
                return dataclasses.replace(given, rate=rate, ticks=count, even=True)
        steps = np.diff(passed)
        rate = 1 / float(steps[steps > 0].min(initial=passed[-1] or 1.0))
        # Again because of rounding: 3 s of 4 frames a second are not to be 2.999 s.
        near = (self.nominal, float(round(rate)))
        rate = next((r for r in near if r and abs(r - rate) < 0.03 * rate), rate)
        last = self.last or float(np.median(steps))
        ticks = max(2, round((float(passed[-1]) + last) * rate))
        return dataclasses.replace(given, rate=rate, ticks=ticks, even=False)

    def by_number(self) -> "Timeline":
        """The same frames at equal distances, as qwen_omni_utils takes them."""
        count = len(self.times)
        seconds = (self.times[-1] - self.start) * count / max(1, count - 1)
        rate = self.average or 25.0
        if seconds and abs(count / rate - seconds) >= 1 / rate:
            rate = count / seconds
        return dataclasses.replace(self, rate=rate, ticks=count, even=True)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[InputContainer]:
    """Opens a file; raises OSError if it does not exist.

    Any exception while it is read is attributed to the file and raised as MediaError. FFmpeg's
    errors have many classes, some of which look like operating system errors.
    """
    try:
        size = path.stat().st_size
    except ValueError as error:  # A name with a zero byte.
        raise MediaError("unreadable", f"{path.name!a}: {error}") from error
    if size == 0:
        raise MediaError("empty_file", path.name)
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            for stream in (*container.streams.video, *container.streams.audio):
                if stream.codec_context is not None:
                    stream.codec_context.thread_count = 1  # Callers decode many clips at once.
            yield container
    except MediaError:
        raise
    except Exception as error:
        detail = f"{path.name}: {type(error).__name__}: {error}"
        raise MediaError("unreadable", detail) from error


def stated_seconds(path: Path) -> float:
    """How long a container says it is, 0 if it says nothing. Raises MediaError or OSError."""
    with opened(path) as container:
        return stated_length(container)


def stated_length(container: InputContainer) -> float:
    """The seconds from the first timestamp on that a header names, 0 if it names none."""
    seconds = (container.duration or 0) / av.time_base
    # Matroska and ASF count them from time zero, also when they start later.
    if container.format.name.startswith(("matroska", "asf")):
        seconds -= max(0.0, start(container))
    return max(0.0, seconds)


def start(container: InputContainer) -> float:
    """The first timestamp in seconds. A recording of MPEG-TS may begin hours after zero."""
    return (container.start_time or 0) / av.time_base


def packets(container: InputContainer, streams: Sequence[Stream]) -> Iterator[Packet]:
    """All packets, and at the end an empty one for each stream.

    If a container allows timestamps to start again, as in concatenated MPEG files, they are shifted
    to continue after the earlier ones.
    """
    part = dict.fromkeys((stream.index for stream in streams), 0)
    shifts, latest = [Fraction(0)], {}
    end = Fraction(0)
    restarts = bool(container.format.flags & ContainerFlags.ts_discont.value)
    for packet in container.demux(*streams):
        index, base = packet.stream.index, packet.time_base
        stamp = packet.dts if packet.dts is not None else packet.pts
        if stamp is not None:
            time = stamp * base
            if restarts and time < latest.get(index, time) - Fraction(RESTART_SECONDS):
                part[index] += 1
                if part[index] == len(shifts):
                    shifts.append(end - time)
            latest[index] = time
            shift = shifts[part[index]]
            end = max(end, time + shift + (packet.duration or 0) * base)
            if shift:
                packet.pts = packet.pts and packet.pts + round(shift / base)
                packet.dts = packet.dts and packet.dts + round(shift / base)
        yield packet


def playable(streams: Sequence[Stream]) -> list:
    """The streams with a decoder that are not cover pictures, in a player's order of preference."""
    able = [
        stream
        for stream in streams
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
    ]
    return sorted(able, key=lambda stream: not stream.disposition & Disposition.default)


def sound_track(path: Path, container: InputContainer) -> AudioStream:
    if not container.streams.audio:
        raise MediaError("no_audio", path.name)
    if not (able := playable(container.streams.audio)):
        raise MediaError("no_decoder", f"{path.name}: the sound")
    return able[0]


def film_tracks(path: Path, container: InputContainer) -> list[VideoStream]:
    """Video tracks that are not cover pictures."""
    if not container.streams.video:
        raise MediaError("no_video", path.name)
    films = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not films:
        raise MediaError("no_video", f"{path.name}: nothing but a cover picture")
    if not (able := playable(films)):
        raise MediaError("no_decoder", f"{path.name}: the video")
    return able


def check_header(path: Path, container: InputContainer, sampling: FrameSampling) -> None:
    """Refuses files that are too long or too large before reading packets."""
    if container.duration:
        # Matroska counts its duration from zero, also when it starts later.
        late = max(0, container.start_time or 0)
        check_length(path, (container.duration - late) / av.time_base, sampling)


def check_length(
    path: Path, seconds: float, sampling: FrameSampling, *, at_least: bool = False
) -> None:
    if seconds > sampling.max_seconds:
        length = f"more than {sampling.max_seconds:g}" if at_least else f"{seconds:.1f}"
        detail = f"{path.name}: {length} s, allowed are {sampling.max_seconds:g} s"
        raise MediaError("too_long", detail)


def read_timeline(path: Path, sampling: FrameSampling, sound: bool) -> Timeline:
    """Reads the packets' timestamps; see the module's docstring."""
    first: dict[int, Fraction] = {}
    ends: dict[int, Fraction] = {}
    with opened(path) as container:
        videos = film_tracks(path, container)
        heard = [sound_track(path, container)] if sound else []
        check_header(path, container, sampling)
        times: dict[int, list[Fraction | None]] = {stream.index: [] for stream in videos}
        rates = {s.index: s.average_rate or s.guessed_rate or Fraction(25) for s in videos}
        for packet in packets(container, [*videos, *heard]):
            # Discarded packets are decoded but not shown, because an edit list cuts them.
            if packet.size == 0 or packet.is_discard:
                continue
            index = packet.stream.index
            stamp = packet.pts if packet.pts is not None else packet.dts
            time = None if stamp is None else stamp * packet.time_base
            if index in times:
                times[index].append(time)
            if time is not None:
                length = (packet.duration or 0) * packet.time_base
                ends[index] = max(ends.get(index, time), time + length)
                first[index] = min(first.get(index, time), time)
                if ends[index] - first[index] > sampling.max_seconds + 60:
                    check_length(path, float(ends[index] - first[index]), sampling)
        promised = (container.duration or 0) / av.time_base
        offset = start(container)
        films = [s for s in videos if len(times[s.index]) >= media.TEMPORAL_PATCH]
        # A cover picture may not be marked as one, but it has a single frame.
        chosen = films[0] if films else max(videos, key=lambda s: len(times[s.index]))
        check_shape(path.name, chosen.height or 1, chosen.width or 1)
        index, nominal = chosen.index, chosen.guessed_rate
    if len(times[index]) < media.TEMPORAL_PATCH:
        raise MediaError("too_short", f"{path.name}: {len(times[index])} frame(s)")
    # A duration is counted from the first timestamp, in Matroska from zero.
    end = float(max(ends.values(), default=0))
    reached = max(end, end - offset)
    if promised and reached < 0.9 * promised - 0.1:
        detail = f"{path.name}: cut off after {reached:.2f} of {promised:.2f} s"
        raise MediaError("unreadable", detail)
    stamped = [float(time) for time in times[index] if time is not None]
    hidden = bool(stamped) and times[index][0] is None
    if not stamped:
        stamped = [n / float(rates[index]) for n in range(len(times[index]))]
    track = Timeline(
        video=index,
        times=[],
        hidden=hidden,
        last=max(0.0, float(ends.get(index, 0)) - max(stamped)),
        average=float(rates[index]),
        nominal=float(nominal) if nominal else None,
    ).of(stamped)
    check_length(path, track.seconds, sampling)
    return track
