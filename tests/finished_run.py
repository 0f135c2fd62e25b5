"""What a finished run left."""

from pathlib import Path

from saber_jax.models.config import SaberConfig
from saber_jax.train import checkpoint


def load(workdir: Path) -> tuple[dict, SaberConfig]:
    """Parameters and sizes of the newest checkpoint."""
    cfg = SaberConfig.from_dict(checkpoint.read_model_file(workdir)["model"])
    return checkpoint.load_params(workdir, cfg), cfg
