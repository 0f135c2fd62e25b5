"""What of a config depends on the pod. `configs/sft.py:7b-v5e-256` is `:7b` for 256 chips of v5e.

A recipe says where and how a step is computed and never what: the examples of a step, its rows and
their budgets, the optimizer and the loss are those of the size, so a run can move from one pod to
another and stays the run it is. On a pod with more chips than a step has rows, the other chips
compute empty rows: there, larger steps cost no more (docs/data.md, `Batches`).

Each leaves at least a tenth of every device's memory free, says the TPU compiler; docs/aot_table.md
has its figures, and it can be asked again:

    python -m saber_jax.aot --config=configs/sft.py:7b-v5e-256
"""

import dataclasses
import math

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """`sft` and `cadpo` are config.compute.remat of the stages: what of the free memory computation
    is saved with, as by `head_keep`.

    `at_once` rows of each device go through the network together, then the next ones; 0: all of
    them. `topology` as `saber_jax.aot` takes it. Several slices hold copies of the weights and send
    gradients alone over the data center's network.
    """

    topology: str
    slices: int = 1
    lora_rank: int = 0
    at_once: int = 0
    sft: str
    cadpo: str
    head_keep: bool = True

    @property
    def chips(self) -> int:
        _, _, shape = self.topology.rpartition(":")
        return self.slices * math.prod(map(int, shape.split("x")))


# In front of each what it needs and the GiB of one device that the compiler says its stages take.
RECIPES = {
    # All weights train.
    # 256 chips of v5e: sft 13.8, cadpo 12.3 of 15.75.
    "7b-v5e-256": Recipe(topology="v5e:16x16", sft="matmuls", cadpo="gate"),
    # 256 chips of v6e: 13.8, 17.6 of 31.24.
    "7b-v6e-256": Recipe(topology="v6e:16x16", sft="matmuls", cadpo="matmuls"),
    # 64 chips of v5p, which is sold in pairs of cores: 52.3, 67.5 of 95.73.
    "7b-v5p-128": Recipe(topology="v5p:4x4x4", sft="matmuls", cadpo="matmuls"),
    # Two slices of 128 chips of v5e: 10.2, 12.9 of 15.75.
    "7b-2xv5e-128": Recipe(topology="2*v5e:8x16", slices=2, sft="gate", cadpo="gate"),
    # 32 chips of v5e: 12.2, 11.1 of 15.75.
    "3b-v5e-32": Recipe(topology="v5e:4x8", at_once=1, sft="matmuls", cadpo="gate"),
    # Adapters of the published rank train.
    # 16 chips of v5e: 11.2, 13.7 of 15.75.
    "7b-lora-v5e-16": Recipe(topology="v5e:4x4", lora_rank=8, at_once=1, sft="gate", cadpo="gate"),
    # 8 chips of v6e: 20.6, 25.7 of 31.24.
    "7b-lora-v6e-8": Recipe(topology="v6e:2x4", lora_rank=8, at_once=2, sft="gate", cadpo="gate"),
}


def fit(config: ConfigDict) -> None:
    """Sets what the recipe that config.variant names, if it names one, says of config.stage."""
    recipe = RECIPES.get(config.variant)
    if recipe is None:
        return
    config.topology = recipe.topology
    config.mesh.data = recipe.slices
    config.lora.rank = recipe.lora_rank
    if recipe.at_once:
        per_device = -(-config.data.batch_rows // recipe.chips)
        config.compute.microbatches = -(-per_device // recipe.at_once)
    config.compute.remat = getattr(recipe, config.stage)
    config.compute.head_keep = recipe.head_keep
