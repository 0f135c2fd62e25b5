"""The weights of a finished run in bfloat16, for generation: half the bytes of float32 masters.

    WORKDIR/bfloat16/    weights only; model.json has the digest of the checkpoint that they copy

On a pod every host reads all weights to answer its share of the clips, after each stage and for the
pairs. Generation on accelerators would round the masters in the same way.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from saber_jax.models import saber
from saber_jax.models.config import SaberConfig
from saber_jax.runs import distributed, files
from saber_jax.train import checkpoint

FOLDER = "bfloat16"


def write(workdir: Path, params: saber.Params, cfg: SaberConfig) -> None:
    """Writes `params`, which the newest checkpoint holds. Every process must call it."""
    folder = workdir / FOLDER
    if jax.process_index() == 0:
        files.remove_folder(folder, ignore_errors=True)  # Of another checkpoint, or a part.
    distributed.barrier("the copy in bfloat16 has room")
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    narrow = jax.jit(_narrowed, out_shardings=places)(params)
    checkpoint.save_params(folder, narrow, cfg, copy_of=checkpoint.digest(workdir))


def _narrowed(params: saber.Params) -> saber.Params:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)


def find(workdir: str | Path) -> Path | None:
    """The copy of the newest checkpoint of `workdir`; None if there is none."""
    folder = Path(workdir) / FOLDER
    if not files.exists(folder / checkpoint.MODEL_FILE):
        return None
    copied = checkpoint.read_model_file(folder).get("copy_of")
    return folder if copied == checkpoint.digest(workdir) else None
