"""Makes small real video files for tests."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

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
) -> Path:
    """Writes frames (at `times` seconds, else at `fps`) and sound; the defaults are lossless.

    `audio` has `audio_rate` samples a second, its track `rate`.
    """
    with av.open(str(path), "w") as container:
        video = sound = None
        if frames is not None:
            video = container.add_stream(codecs[0], rate=fps)
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = pixels
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
                frame.pts, frame.time_base = start + low, Fraction(1, audio_rate)
                for part in resampler.resample(frame):
                    container.mux(sound.encode(part))
            for part in resampler.resample(None):
                container.mux(sound.encode(part))
            container.mux(sound.encode())
    return path
