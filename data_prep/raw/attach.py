"""A clip as parts of a chat message: pictures and sound, or the whole file."""

import base64
import dataclasses
import io
import wave
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int16, UInt8
from PIL import Image

from data_prep.raw import storage
from data_prep.raw.answers import Unanswered
from saber_jax.data import decode, isolation, media


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttachSettings:
    """How a clip is sent.

    "frames" sends `fps` pictures a second (at most `max_frames`) of at most `max_pixels` as JPEG
    and the sound as 16 kHz WAV; "video" sends the file itself as one `video_url`, which vLLM and
    others accept for models that take sound with it.
    """

    send: Literal["frames", "video"] = "frames"
    fps: float = 2.0
    max_frames: int = 16
    max_pixels: int = 200_704
    jpeg_quality: int = 85

    def __post_init__(self):
        if self.send not in ("frames", "video"):
            raise ValueError(f'send must be "frames" or "video", got {self.send!r}.')


Part = dict[str, Any]


def parts(file: str, settings: AttachSettings, *, sound: bool = True) -> list[Part]:
    """The content parts of one clip. Raises Unanswered("unreadable") if it does not decode."""
    with storage.local_copy(file) as path:
        try:
            if settings.send == "video" and sound:
                return [{"type": "video_url", "video_url": {"url": _data_url("video/mp4", path)}}]
            return _pictures_and_sound(path, settings, sound)
        except (decode.MediaError, OSError) as error:
            raise Unanswered("unreadable", str(error)) from None


def sound_part(file: str) -> Part:
    """The sound of one clip. Raises Unanswered("unreadable")."""
    return parts(file, AttachSettings(max_frames=2), sound=True)[-1]


def _pictures_and_sound(path: Path, settings: AttachSettings, with_sound: bool) -> list[Part]:
    sampling = decode.FrameSampling(
        fps=settings.fps,
        max_frames=settings.max_frames,
        min_pixels=min(decode.MIN_PIXELS, settings.max_pixels),
        max_pixels=settings.max_pixels,
    )
    clip = isolation.call(decode.decode_clip, path, sampling)
    content = pictures(clip.frames, settings.jpeg_quality)
    return [*content, sound(clip.audio)] if with_sound else content


def pictures(frames: UInt8[np.ndarray, "T H W 3"], quality: int = 85) -> list[Part]:
    """One JPEG a frame."""
    content: list[Part] = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
        content.append({"type": "image_url", "image_url": {"url": _url("image/jpeg", buffer)}})
    return content


def sound(audio: Int16[np.ndarray, " n"]) -> Part:
    """16 kHz mono sound as a WAV file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(media.SAMPLE_RATE)
        file.writeframes(audio.astype("<i2").tobytes())
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}}


def _url(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _data_url(kind: str, path: Path) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
