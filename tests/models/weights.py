"""Random weights that NumPy alone draws, so that tests with and without torch see the same model.

Random everywhere: biases of zero and norms of one would hide mistakes.
"""

import numpy as np

from saber_jax.hf import names
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig


def on_disk(cfg: SaberConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors under their names in a checkpoint. Each depends on its name, not on the others."""
    return {name: _draw(name, entry.shape, seed) for name, entry in names.entries(cfg).items()}


def tree(cfg: SaberConfig, seed: int = 0) -> saber.Params:
    """The same weights as the network takes them."""
    tensors = on_disk(cfg, seed)
    return names.from_disk(lambda entry: tensors[entry.name], cfg)


def _draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    noise = np.random.default_rng([seed, *name.encode()]).standard_normal(shape)
    if name.endswith("bias"):
        noise *= 0.2
    elif len(shape) == 1:  # The scale of a norm.
        noise = 1 + 0.2 * noise
    else:
        noise *= np.prod(shape[1:]) ** -0.5
    return noise.astype(np.float32)
