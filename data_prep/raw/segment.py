"""Stage `segment`: cuts long videos at pauses in speech and at scene changes.

A clip never crosses a scene boundary (FFmpeg's scdet), contains whole intervals of speech
(silero-vad) with a margin around them, and is at most `longest` seconds long: longer intervals are
cut at their longest pauses. Files that are short enough are not changed. If a corpus has sound in
separate files, it is joined with the video.

    rows gain    start, end (seconds in `video`); `file` is the new clip, `video` the source

    OUT/segment/clips/ID-0000.mp4    the new clips

Files are read in a process of its own (saber_jax.data.isolation), so that one that crashes its
decoder is dropped alone.
"""

import dataclasses
import errno
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import PictureType
from jaxtyping import Float

from data_prep.raw import measure, storage
from data_prep.raw.shards import Dropped, Outcome, Row
from saber_jax.data import isolation, timeline
from saber_jax.data.decode import display_matrix
from saber_jax.data.frame_sampling import MediaError
from saber_jax.data.sound import TOLERANCE
from saber_jax.data.timeline import opened, playable

REASONS = {
    "unreadable": "the file cannot be decoded",
    "no_video": "the file has no picture",
    "no_speech": "nobody speaks in a video that is too long to be kept whole",
}

SECONDS = 4 * 3600
"""The longest that one file may take: films are decoded whole, several times faster than played."""
MEMORY = 8 << 30
"""Bytes of the process that decodes: the detector of speech wants a film's whole sound at once."""

Span = tuple[float, float]
"""(start, end) in seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentSettings:
    """All in seconds except `scene_change`, which is scdet's score from 0 to 100."""

    longest: float = 20.0
    shortest: float = 1.0
    pause: float = 1.0  # Intervals of speech with a shorter pause between them are joined.
    room: float = 0.25  # Kept before and after speech.
    scene_change: float = 10.0


def work(rows: list[Row], settings: SegmentSettings, clips: str) -> Iterator[Outcome]:
    """The stage; new clips go to the folder `clips`. Raises OSError if one cannot be written."""
    worker = isolation.thread_worker(seconds=SECONDS, memory=MEMORY)
    for row in rows:
        try:
            yield from _segment(row, settings, clips, worker)
        except (MediaError, FileNotFoundError) as error:
            yield Dropped(row=row, reason="unreadable", detail=str(error))


def _segment(
    row: Row, settings: SegmentSettings, clips: str, worker: isolation.Worker
) -> Iterator[Outcome]:
    sound = row.get("sound")
    with storage.local_copy(row["file"]) as path, storage.local_copy(sound or row["file"]) as heard:
        seconds = worker.call(length, path)
        if seconds is None:
            yield Dropped(row=row, reason="no_video")
            return
        if seconds <= settings.longest and not sound:
            yield {**row, "start": 0.0, "end": round(seconds, 3)}
            return
        spans = [(0.0, seconds)]
        if seconds > settings.longest:
            spans = plan(*worker.call(boundaries, path, settings), seconds, settings)
        if not spans:
            yield Dropped(row=row, reason="no_speech", detail=f"{seconds:.1f} s")
        for number, (start, end) in enumerate(spans):
            clip_id = row["clip_id"] if len(spans) == 1 else f"{row['clip_id']}-{number:04d}"
            target = storage.join(clips, f"{clip_id}.mp4")
            if not storage.exists(target):
                with storage.new_file(target) as file:
                    worker.call(write_clip, path, heard, file, (start, end))
            cut = {"clip_id": clip_id, "file": target, "start": start, "end": end}
            yield {**row, **cut, "provenance": [*row["provenance"], _made(settings)]}


def length(path: Path) -> float | None:
    """Duration in seconds from the header, or else from the packets; None without video.

    Raises MediaError.
    """
    with opened(path) as container:
        pictures = playable(container.streams.video)
        if not pictures:
            return None
        if seconds := timeline.stated_length(container):
            return seconds
        packets = container.demux(pictures[0])
        return float(sum((p.duration or 0) * p.time_base for p in packets if p.time_base))


def boundaries(path: Path, settings: SegmentSettings) -> tuple[list[Span], list[float]]:
    """(intervals of speech, times of scene changes) of a whole video, counted from its start.

    Raises MediaError.
    """
    changes: list[float] = []
    with opened(path) as container:
        begun = timeline.start(container)
        video = playable(container.streams.video)[0]
        streams = [video, *playable(container.streams.audio)[:1]]
        sound = _Sound(begun)
        graph = measure.filters(
            lambda graph: graph.add_buffer(template=video, time_base=video.time_base),
            [
                ("scale", f"{measure.WIDTH}:-2"),
                ("scdet", f"t={settings.scene_change}"),
                ("buffersink", ""),
            ],
        )
        for frame in container.decode(*streams):
            if isinstance(frame, av.AudioFrame):
                sound.add(frame)
                continue
            graph.push(frame)
            for seen in measure.pulled(graph):
                if "lavfi.scd.time" in seen.metadata:
                    changes.append(float(seen.metadata["lavfi.scd.time"]) - begun)
    return measure.speech(sound.joined()), changes


class _Sound:
    """A track in 16 kHz mono from `start` on, silent where it starts late or pauses.

    A film's sound takes 2 bytes a sample here; saber_jax.data.sound keeps it as it was decoded.
    """

    def __init__(self, start: float):
        self._until = start
        self._pieces = [np.zeros(0, np.int16)]
        self._resampler = av.AudioResampler(format="s16", layout="mono", rate=measure.SAMPLE_RATE)

    def add(self, frame: av.AudioFrame) -> None:
        hole = (frame.time or 0.0) - self._until
        if hole > TOLERANCE:
            self._pieces.append(np.zeros(round(hole * measure.SAMPLE_RATE), np.int16))
            self._until += hole
        self._until += frame.samples / frame.sample_rate
        self._pieces += [part.to_ndarray()[0] for part in self._resampler.resample(frame)]

    def joined(self) -> Float[np.ndarray, " n"]:
        return np.concatenate(self._pieces).astype(np.float32) / 32768


def plan(
    speech: Sequence[Span], changes: Sequence[float], seconds: float, settings: SegmentSettings
) -> list[Span]:
    """Where to cut.

    With a scene change at 9 s, pause 1 and room 0.25:

        speech   2---4   4.5---6        8------11
        clips   1.75----------6.25   7.75-9 9-11.25
    """
    edges = [0.0, *sorted(time for time in changes if 0 < time < seconds), seconds]
    spans: list[Span] = []
    for scene_start, scene_end in itertools.pairwise(edges):
        inside = [
            (max(start, scene_start), min(end, scene_end))
            for start, end in speech
            if start < scene_end and end > scene_start
        ]
        for group in _grouped(inside, settings):
            begun = spans[-1][1] if spans else 0.0  # End of the last part.
            start = max(scene_start, begun, group[0][0] - settings.room)
            end = min(scene_end, group[-1][1] + settings.room)
            if end - start >= settings.shortest:
                spans.append((round(start, 3), round(end, 3)))
    return spans


def _grouped(speech: Sequence[Span], settings: SegmentSettings) -> Iterator[list[Span]]:
    """Joins intervals that are close together, then divides long ones at their longest pause."""
    groups: list[list[Span]] = []
    for span in speech:
        if groups and span[0] - groups[-1][-1][1] < settings.pause:
            groups[-1].append(span)
        else:
            groups.append([span])
    for group in groups:
        yield from _divided(group, settings.longest - 2 * settings.room)


def _divided(group: list[Span], longest: float) -> Iterator[list[Span]]:
    if group[-1][1] - group[0][0] <= longest:
        yield group
    elif len(group) > 1:
        pauses = [after[0] - before[1] for before, after in itertools.pairwise(group)]
        at = pauses.index(max(pauses)) + 1
        yield from _divided(group[:at], longest)
        yield from _divided(group[at:], longest)
    else:  # Speech without a pause that is longer than a clip may be.
        start, end = group[0]
        pieces = int(-(-(end - start) // longest))
        step = (end - start) / pieces
        for piece in range(pieces):
            yield [(start + piece * step, start + (piece + 1) * step)]


def write_clip(path: Path, heard: Path, target: Path, span: Span) -> None:
    """Encodes one interval as H.264 and AAC, with video from `path` and sound from `heard`.

    Raises MediaError, or OSError if `target` cannot be written.
    """
    try:
        _encode(path, heard, target, span)
    except MediaError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _UNWRITABLE:
            raise OSError(cause.errno, cause.strerror, str(target)) from None
        raise


_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""Errors that reading cannot have. The others are attributed to the files that are read."""


def _encode(path: Path, heard: Path, target: Path, span: Span) -> None:
    with (
        opened(path) as pictures,
        opened(heard) as sounds,
        av.open(str(target), "w", format="mp4") as out,
    ):
        seen = playable(pictures.streams.video)[0]
        told = next(iter(playable(sounds.streams.audio)), None)
        rate = seen.average_rate or Fraction(25)
        video = out.add_stream("libx264", rate=rate, options={"crf": "18", "preset": "fast"})
        # H.264 in 4:2:0 needs even sides.
        video.width, video.height = seen.width // 2 * 2, seen.height // 2 * 2
        video.pix_fmt, video.thread_count = "yuv420p", 1
        video.codec_context.time_base = Fraction(1, 90_000)
        audio = out.add_stream("aac", rate=told.rate or 44_100) if told is not None else None
        for number, frame in enumerate(_frames(pictures, seen, span)):
            if not number:  # The clip keeps the rotation of its source.
                video.set_display_matrix(display_matrix(frame))
            picture = frame.reformat(video.width, video.height, "yuv420p")
            picture.pts = round((frame.time - span[0]) * 90_000)
            picture.time_base = Fraction(1, 90_000)
            picture.pict_type = PictureType.NONE
            out.mux(video.encode(picture))
        out.mux(video.encode())
        if audio is None:
            return
        resampler = av.AudioResampler(audio.format, audio.layout, audio.rate, frame_size=1024)
        written = 0
        heard_until = span[0]
        for frame in _frames(sounds, told, span):
            hole = float(frame.time or 0.0) - heard_until
            if hole > TOLERANCE:  # Keeps sound in sync that starts late or has gaps.
                written += round(hole * audio.rate)
                heard_until += hole
            heard_until += frame.samples / frame.sample_rate
            frame.pts = None
            for part in resampler.resample(frame):
                part.pts, part.time_base = written, Fraction(1, audio.rate)
                written += part.samples
                out.mux(audio.encode(part))
        for part in resampler.resample(None):
            part.pts, part.time_base = written, Fraction(1, audio.rate)
            out.mux(audio.encode(part))
        out.mux(audio.encode())


def _frames(container: InputContainer, stream, span: Span) -> Iterator[Any]:
    """Decoded frames that begin within the span, times counted from the container's start."""
    offset = timeline.start(container)
    if span[0] > 1:
        container.seek(int((span[0] + offset - 0.5) * av.time_base))
    for frame in container.decode(stream):
        time = (frame.time or 0.0) - offset
        if time >= span[1]:
            return
        if time >= span[0] - 1e-6:
            frame.pts = round(time / stream.time_base)
            frame.time_base = stream.time_base
            yield frame


def _made(settings: SegmentSettings) -> dict[str, Any]:
    return {
        "fields": ["file", "start", "end"],
        "tool": "data_prep.segment",
        "model": "silero-vad v6, FFmpeg scdet",
        "prompt": None,
        "parameters": {**dataclasses.asdict(settings), "versions": {"av": av.__version__}},
    }
