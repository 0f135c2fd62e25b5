"""Frames and video files of the embedded corpus: a clip's animation, and H.264 with AAC in mp4."""

import dataclasses
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import Float, Int16, UInt8

from data_prep.corpus import face
from data_prep.corpus.plan import Clip
from data_prep.corpus.voice import FRAMES_PER_SECOND, SAMPLE_RATE

_FULL_LOUDNESS = 0.9  # Quantile of a clip's frame loudness at which the jaw is fully open.


def film(
    clip: Clip,
    track: Int16[np.ndarray, " samples"],
    frames: int,
    rng: np.random.Generator,
    *,
    size: int = face.FRAME_SIZE,
) -> UInt8[np.ndarray, "frames size size 3"]:
    """Draws the clip: the expression holds, the jaw follows the sound, eyes blink, heads move."""
    person = face.identity(clip.identity)
    base = face.expression(clip.face, clip.face_intensity, rng)
    jaw = _jaw(track, frames)
    blink = rng.integers(1, frames) if rng.uniform() < 0.4 else -1
    home = {
        "x": rng.normal(0, 0.015),
        "y": rng.normal(0, 0.01),
        "roll": rng.normal(0, 0.03),
        "scale": 1 + rng.normal(0, 0.03),
    }
    light = rng.uniform(0.8, 1.1)
    covered = int(rng.choice((-1, 1))) if rng.uniform() < 0.2 else 0
    gesture = _gesture(clip.gesture, frames, rng)
    sway = rng.uniform(0, 2 * np.pi)
    pictures = []
    for i in range(frames):
        pose = dict(home, turn=0.25 * np.sin(sway + 0.35 * i))
        for key, values in gesture.items():
            pose[key] = pose.get(key, 0.0) + values[i]
        units = dataclasses.replace(
            base,
            jaw=base.jaw + 0.5 * jaw[i],
            eye_open=0.0 if i == blink else base.eye_open,
        )
        pictures.append(
            face.draw(
                person,
                units,
                face.Pose(**pose),
                shirt=clip.shirt,
                background=clip.background,
                covered=covered,
                size=size,
            )
        )
    lit = np.stack(pictures) * light
    return np.clip(np.round(lit), 0, 255).astype(np.uint8)


def _jaw(track: Int16[np.ndarray, " samples"], frames: int) -> Float[np.ndarray, " frames"]:
    """Jaw opening 0 to 1 in every frame, from the loudness of its tenth of a second."""
    step = SAMPLE_RATE // FRAMES_PER_SECOND
    padded = np.pad(track.astype(np.float64), (0, frames * step))[: frames * step]
    loudness = np.sqrt(np.mean(padded.reshape(frames, step) ** 2, axis=1))
    return np.clip(loudness / np.quantile(loudness, _FULL_LOUDNESS), 0, 1)


def _gesture(name: str, frames: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Pose offsets over time of one gesture."""
    t = np.arange(frames) / FRAMES_PER_SECOND
    wave = np.sin(2 * np.pi * 1.4 * t + rng.uniform(0, np.pi))
    if name == "nod":
        return {"pitch": 0.6 * wave, "y": 0.012 * wave}
    if name == "shake":
        return {"turn": 0.8 * wave, "x": 0.012 * wave}
    if name == "tilt":
        side = 1 if rng.uniform() < 0.5 else -1
        return {"roll": np.full(frames, side * 0.14)}
    if name == "hand":
        return {"hand": np.clip(0.6 + 2.5 * t, 0, 1) + 0.05 * wave}
    return {}


def write_mp4(
    path: Path,
    pictures: UInt8[np.ndarray, "frames size size 3"],
    track: Int16[np.ndarray, " samples"],
) -> None:
    """Writes H.264 at 10 fps and AAC at 16 kHz mono; equal input gives an equal file."""
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        size = pictures.shape[1]
        video = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        video.options = {"crf": "18", "preset": "veryfast", "flags": "+bitexact"}
        # Without this option, one clip in five differed when it was encoded again.
        video.options |= {"x264-params": "cpu-independent=1"}
        video.codec_context.thread_count = 1  # Threads would change rate control decisions.
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        audio.bit_rate = 64_000
        audio.options = {"flags": "+bitexact", "aac_coder": "fast"}
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FRAMES_PER_SECOND)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(
            (track.astype(np.float32) / 32768)[None], format="fltp", layout="mono"
        )
        sound.sample_rate, sound.pts = SAMPLE_RATE, 0
        sound.time_base = Fraction(1, SAMPLE_RATE)
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
