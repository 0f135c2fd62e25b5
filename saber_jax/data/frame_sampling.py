"""Settings of frame sampling, and the reasons why a file cannot be used."""

import dataclasses
from typing import Literal

from saber_jax.data import media

Mode = Literal["exact", "saber_release"]
MODES: tuple[Mode, ...] = ("exact", "saber_release")

# Constants of qwen_omni_utils 0.0.8, which the SABER release was made with.
MIN_PIXELS = 128 * 28 * 28
MAX_PIXELS = 768 * 28 * 28
TOTAL_PIXELS = int(128_000 * 28 * 28 * 0.9)
MAX_FRAMES = 768
IMAGE_MIN_PIXELS = 4 * 28 * 28
IMAGE_MAX_PIXELS = 16384 * 28 * 28
# Environment of the published SABER inference script.
RELEASE_MAX_FRAMES = 40
RELEASE_MAX_PIXELS = 50_176
RELEASE_IMAGE_MAX_PIXELS = 1_003_520

MOST_PIXELS = 1 << 27
"""The largest picture or video frame that is decoded: 134 million pixels are 400 MB as RGB."""

REASONS = {
    "empty_file": "the file has zero bytes",
    "unreadable": "the file cannot be decoded",
    "no_video": "the file has no video track",
    "no_audio": "the file has no audio track",
    "no_decoder": "this FFmpeg has no decoder for the track",
    "too_long": "the clip is longer than allowed",
    "too_short": "the clip has fewer than two frames",
    "too_large": f"a picture has more than {MOST_PIXELS:,} pixels",
    "too_thin": f"one side is more than {media.MAX_SIDE_RATIO} times the other",
}


class MediaError(ValueError):
    """A media file that cannot be used. `reason` is a key of REASONS, `detail` says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{REASONS[reason]}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return (type(self), (self.reason, self.detail))


def check_shape(name: str, height: int, width: int) -> None:
    """Raises MediaError for a picture that is too large to decode or too thin to resize."""
    if height * width > MOST_PIXELS:
        raise MediaError("too_large", f"{name}: {width} x {height} pixels")
    if max(height, width) > media.MAX_SIDE_RATIO * min(height, width):
        raise MediaError("too_thin", f"{name}: {width} x {height} pixels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames and how many pixels to keep, and whether to interleave the sound with the video.

    Mode "exact" uses timestamps, applies every limit and measures the seconds between frame pairs.
    Mode "saber_release" reproduces the published SABER scripts: frames are counted as if they were
    evenly spaced, gaps in the sound are removed, a `max_pixels` below 1.05 * `min_pixels` has no
    effect, and the seconds are always 1.0.
    """

    mode: Mode = "exact"
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = MAX_FRAMES
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    max_seconds: float = 300.0
    audio_in_video: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"Unknown mode {self.mode!r}; use one of {', '.join(MODES)}.")
        if self.mode == "exact" and self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels {self.min_pixels} exceeds max_pixels {self.max_pixels}; no frame size "
                "satisfies both."
            )
        if self.fps <= 0 or self.max_frames < media.TEMPORAL_PATCH:
            raise ValueError(
                f"fps must be positive and max_frames at least {media.TEMPORAL_PATCH}, got "
                f"{self.fps} and {self.max_frames}."
            )

    def frame_size(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """(height, width) after resizing a clip of which `frames` frames are kept."""
        limit = min(self.max_pixels, TOTAL_PIXELS / frames * media.TEMPORAL_PATCH)
        if self.mode == "saber_release":
            limit = max(limit, int(self.min_pixels * 1.05))
        return media.smart_resize(height, width, min(self.min_pixels, int(limit)), int(limit))


def release_sampling() -> FrameSampling:
    """The settings of the published SABER inference script."""
    return FrameSampling(
        mode="saber_release", max_frames=RELEASE_MAX_FRAMES, max_pixels=RELEASE_MAX_PIXELS
    )
