"""Positions as angles: rotary for words and for patches, sinusoids for audio.

Axis letters: B batch   L length   P patches   N heads   H head dim   E = H / 2 pairs of features.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Rotary = tuple[Float[Array, "B L E"], Float[Array, "B L E"]]
"""Cosines and sines of the angle of every pair of features."""


def text_rotary(
    positions: Int[Array, "B 3 L"], *, head_dim: int, theta: float, sections: tuple[int, int, int]
) -> Rotary:
    """Three-axis rotary positions, section 2.1 of https://arxiv.org/abs/2503.20215; float32.

    The first `sections[0]` frequencies turn with time, the next with height, the last with width.
    """
    frequencies = _frequencies(head_dim, theta)
    axis = np.repeat(np.arange(3), sections)
    angles = positions.astype(jnp.float32)[:, axis, :].swapaxes(1, 2) * frequencies[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def vision_rotary(patch_hw: Int[Array, "B P 2"], *, head_dim: int) -> Rotary:
    """Two-axis rotary positions of patches inside their frame (in patches); float32.

    The first half of the frequencies turns with the row, the second half with the column.
    """
    frequencies = _frequencies(head_dim // 2, 10_000.0)
    angles = patch_hw.astype(jnp.float32)[..., None] * frequencies[None, None, None, :]
    angles = angles.reshape(*patch_hw.shape[:2], head_dim // 2)
    return jnp.cos(angles), jnp.sin(angles)


def _frequencies(dim: int, theta: float) -> Float[np.ndarray, " E"]:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


def rotate(x: Float[Array, "B L N H"], rotary: Rotary) -> Float[Array, "B L N H"]:
    """Turns feature pairs (i, i + H/2), in the dtype that `rotary` has."""
    cos, sin = (part[:, :, None, :] for part in rotary)
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def sinusoids(length: int, width: int) -> Float[np.ndarray, "length width"]:
    """Whisper's fixed positions: all sines, then all cosines (https://arxiv.org/abs/2212.04356)."""
    step = np.log(10_000.0) / (width // 2 - 1)
    frequencies = np.exp(-step * np.arange(width // 2, dtype=np.float32)).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
