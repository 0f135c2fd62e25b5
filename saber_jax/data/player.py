"""Frames and sound of a record as a file that browsers play."""

import io
import wave
from fractions import Fraction

import av
import numpy as np

from saber_jax.data import media
from saber_jax.data.records import Record


def film(record: Record) -> bytes | None:
    """An MP4 (H.264, AAC) of the frames at the rate that the model is told, with the sound if there
    is any; None for a record of fewer than two frames."""
    if len(record.frames) < media.TEMPORAL_PATCH:
        return None
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        rate = Fraction(media.TEMPORAL_PATCH / record.seconds_per_grid).limit_denominator(1000)
        video = container.add_stream("libx264", rate=rate, options={"preset": "veryfast"})
        video.height, video.width = record.frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        audio = None
        if len(record.audio):  # Before the first packet: the header names all tracks.
            audio = container.add_stream("aac", rate=media.SAMPLE_RATE, layout="mono")
        for pixels in record.frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
        if audio is not None:
            samples = record.audio.astype(np.float32)[None] / 32768
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = media.SAMPLE_RATE, 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return file.getvalue()


def sound(record: Record) -> bytes | None:
    """A WAV of the sound; None for a record without any."""
    if not len(record.audio):
        return None
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(media.SAMPLE_RATE)
        out.writeframes(record.audio.astype("<i2").tobytes())
    return file.getvalue()
