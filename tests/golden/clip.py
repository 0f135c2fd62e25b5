"""The clip and the picture that the committed goldens were made from, drawn with NumPy alone."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.media_files import RATE, write_clip

FRAMES, FPS = 65, 10


def write(folder: Path) -> tuple[Path, Path]:
    """Writes a lossless clip of 6.5 s, 60 x 88 pixels, and a picture of 75 x 50; returns both."""
    y, x = np.mgrid[:60, :88]
    frames = []
    for i in range(FRAMES):
        waves = np.stack([np.sin(x / 9 + y / 7 + i / 5), np.cos(x / 5 - i / 4), np.sin(y / 8)], -1)
        frame = np.rint(127 + 90 * waves).astype(np.uint8)
        frame[15:30, i : i + 20] = (240, 30, 60)  # Something with hard edges that moves.
        frames.append(frame)
    clip = write_clip(folder / "clip.mkv", frames=np.array(frames), audio=sound(), fps=FPS)
    Image.fromarray(frames[20][:50, :75]).save(folder / "picture.png")
    return clip, folder / "picture.png"


def sound(rate: int = RATE) -> np.ndarray:
    """int16: a rising tone, and a high one that comes and goes."""
    time = np.arange(FRAMES * rate // FPS) / rate
    tones = 0.3 * np.sin(2 * np.pi * (200 * time + 150 * time**2))
    tones += 0.1 * np.sin(2 * np.pi * 3000 * time) * (np.sin(2 * np.pi * 3 * time) > 0)
    return np.round(tones * 32767).astype(np.int16)
