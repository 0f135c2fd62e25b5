"""Makes small real video files for tests."""

import contextlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

RATE = 16_000


def gray_frames(count: int, height: int = 84, width: int = 84) -> np.ndarray:
    """uint8 [count, height, width, 3]; frame i is gray of level 5 * i, so it can be told apart."""
    levels = (5 * np.arange(count) % 256).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def tone(seconds: float) -> np.ndarray:
    """int16 16 kHz 440 Hz."""
    time = np.arange(int(seconds * RATE)) / RATE
    return (8000 * np.sin(2 * np.pi * 440 * time)).astype(np.int16)


def write_clip(
    path: Path,
    *,
    frames: np.ndarray | None,
    audio: np.ndarray | None,
    times: list[float] | None = None,
    fps: int = 12,
    audio_start: float = 0.0,
    codecs: tuple[str, str] = ("ffv1", "flac"),
    pixels: str = "bgr0",
    rate: int = RATE,
    audio_rate: int = RATE,
    matrix: tuple[int, ...] | None = None,
    hole: tuple[float, float] | None = None,
) -> Path:
    """Writes frames (at `times` seconds, else at `fps`) and sound; the defaults are lossless.

    `audio` has `audio_rate` samples a second, its track `rate`. `matrix` is the nine numbers of a
    display matrix. From the first second of `hole` on, sound is stamped later by its second number.
    """
    with av.open(str(path), "w") as container:
        video = sound = None
        if frames is not None:
            video = container.add_stream(codecs[0], rate=fps)
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = pixels
            video.set_display_matrix(matrix)
            ticks = 1000 if times else fps
            video.time_base = video.codec_context.time_base = Fraction(1, ticks)
        if audio is not None:
            sound = container.add_stream(codecs[1], rate=rate, layout="mono")
        if video is not None:
            stamps = range(len(frames)) if times is None else [round(1000 * t) for t in times]
            for picture, stamp in zip(frames, stamps, strict=True):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame.pts, frame.time_base = stamp, video.codec_context.time_base
                container.mux(video.encode(frame))
            container.mux(video.encode())
        if sound is not None:
            start = round(audio_start * audio_rate)
            resampler = av.AudioResampler(
                sound.format, "mono", rate, frame_size=sound.frame_size or 1024
            )
            for low in range(0, len(audio), 1024):
                frame = av.AudioFrame.from_ndarray(audio[None, low : low + 1024], "s16", "mono")
                frame.sample_rate = audio_rate
                late = hole[1] if hole and low >= hole[0] * audio_rate else 0.0
                frame.pts = start + low + round(late * audio_rate)
                frame.time_base = Fraction(1, audio_rate)
                for part in resampler.resample(frame):
                    container.mux(sound.encode(part))
            for part in resampler.resample(None):
                container.mux(sound.encode(part))
            container.mux(sound.encode())
    return path


def copy_packets(
    source: Path,
    target: Path,
    *,
    shift: float,
    first: Path | None = None,
    default: int | None = None,
    skip: int = 0,
) -> Path:
    """Copies packets without decoding, `shift` seconds later; `first` puts its tracks in front.

    The first `skip` packets of the film are left out, its key frame among them. Of the tracks, the
    one with the number `default` is marked as such; otherwise they keep their marks.
    """
    inputs = [path for path in (first, source) if path]
    options = {"avoid_negative_ts": "disabled"}
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(av.open(str(target), "w", options=options))
        opened = [stack.enter_context(av.open(str(path))) for path in inputs]
        tracks = [
            {s.index: out.add_stream_from_template(s) for s in file.streams} for file in opened
        ]
        for file, track in zip(opened, tracks, strict=True):
            for stream in file.streams:
                track[stream.index].disposition = stream.disposition
        for number, stream in enumerate(out.streams if default is not None else ()):
            stream.disposition = Disposition.default if number == default else Disposition(0)
        for file, track in zip(opened, tracks, strict=True):
            for packet in file.demux():
                if packet.dts is None:
                    continue
                if skip and packet.stream.type == "video":
                    skip -= 1
                    continue
                ticks = round(shift / packet.time_base)
                packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
                packet.stream = track[packet.stream.index]
                out.mux(packet)
    return target


def write_late_recording(path: Path) -> Path:
    """Writes 4 s, black and after 1 s white, whose timestamps begin at 600 s."""
    frames = np.zeros((100, 84, 84, 3), np.uint8)
    frames[25:] = 255
    whole = write_clip(
        path.with_name(f"whole{path.suffix}"),
        frames=frames,
        audio=tone(4),
        fps=25,
        codecs=("mpeg2video", "aac"),
        pixels="yuv420p",
        rate=48_000,
    )
    return copy_packets(whole, path, shift=600.0)
