"""What of a config depends on the pod. `configs/sft.py:7b-v5e-256` is `:7b` for 256 chips of v5e.

A recipe says where and how a step is computed and never what: 256 rows a step, their budgets, the
optimizer and the loss are those of the size, so a run can move from one pod to another and stays
the run it is. Each leaves at least a tenth of every device's memory free, says the TPU compiler;
docs/aot_table.md has its figures, and it can be asked again:

    python -m saber_jax.aot --config=configs/sft.py:7b-v5e-256
"""

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """`sft` and `cadpo` are config.compute.remat of the stages: what of the free memory computation
    is saved with, as by `head_keep`.

    `topology` as `saber_jax.aot` takes it. Several slices hold copies of the weights and send
    gradients alone over the data center's network.
    """

    topology: str
    slices: int = 1
    lora_rank: int = 0
    microbatches: int = 1
    sft: str
    cadpo: str
    head_keep: bool = True


RECIPES = {
    # All weights train. TPU v5e, 16 GiB a chip; v6e, 32; v5p, 96, counted in pairs of cores.
    "7b-v5e-256": Recipe(topology="v5e:16x16", sft="matmuls", cadpo="gate"),
    "7b-v6e-256": Recipe(topology="v6e:16x16", sft="matmuls", cadpo="matmuls"),
    "7b-v5p-128": Recipe(topology="v5p:4x4x4", sft="matmuls", cadpo="matmuls"),
    "7b-2xv5e-128": Recipe(topology="2*v5e:8x16", slices=2, sft="gate", cadpo="gate"),
    "3b-v5e-32": Recipe(topology="v5e:4x8", microbatches=8, sft="matmuls", cadpo="gate"),
    # Adapters of the published rank train.
    "7b-lora-v5e-16": Recipe(
        topology="v5e:4x4", lora_rank=8, microbatches=16, sft="gate", cadpo="gate"
    ),
    "7b-lora-v6e-8": Recipe(
        topology="v6e:2x4", lora_rank=8, microbatches=16, sft="gate", cadpo="gate"
    ),
}


def fit(config: ConfigDict) -> None:
    """Sets what the recipe that config.variant names, if it names one, says of config.stage."""
    recipe = RECIPES.get(config.variant)
    if recipe is None:
        return
    config.topology = recipe.topology
    config.mesh.data = recipe.slices
    config.lora.rank = recipe.lora_rank
    config.compute.microbatches = recipe.microbatches
    config.compute.remat = getattr(recipe, config.stage)
    config.compute.head_keep = recipe.head_keep
