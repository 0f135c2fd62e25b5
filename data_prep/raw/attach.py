"""A clip as parts of a chat message: pictures and sound, or the whole file."""

import base64
import dataclasses
import io
import wave
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from data_prep.raw import storage
from data_prep.raw.answers import Unanswered
from saber_jax.data import decode, media


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


def _pictures_and_sound(path: Path, settings: AttachSettings, sound: bool) -> list[Part]:
    sampling = decode.Sampling(
        fps=settings.fps,
        max_frames=settings.max_frames,
        min_pixels=min(decode.MIN_PIXELS, settings.max_pixels),
        max_pixels=settings.max_pixels,
    )
    clip = decode.decode_clip(path, sampling)
    content: list[Part] = []
    for frame in clip.frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=settings.jpeg_quality)
        content.append({"type": "image_url", "image_url": {"url": _url("image/jpeg", buffer)}})
    if sound:
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(media.SAMPLE_RATE)
            file.writeframes(clip.audio.astype("<i2").tobytes())
        encoded = base64.b64encode(buffer.getvalue()).decode()
        content.append({"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}})
    return content


def _url(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _data_url(kind: str, path: Path) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
