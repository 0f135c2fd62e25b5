"""Recipes: settings that depend on the pod. `configs/sft.py:7b-v5e-256` is `:7b` on 256 v5e chips.

A recipe only sets where and how a step is computed. The examples of a step, its rows and their
budgets, the optimizer and the loss depend on the model size, so a run can continue on another pod
with the same results. On a pod with more chips than a step has rows, the other chips compute empty
rows, so larger steps cost no more there (docs/data.md, `Batches`).

According to the compiler, each recipe leaves at least a tenth of every device's memory free;
docs/aot_table.md and docs/gpu.md have its figures. To compute them again:

    python -m saber_jax.aot --config=configs/sft.py:7b-v5e-256
"""

import dataclasses
import math

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """`sft` and `cadpo` are config.compute.remat of the two stages. Like `head_keep`, they use free
    memory to avoid recomputation.

    `sequence` devices share each row. `at_once` is the number of rows per device, or per so many
    devices, that are processed at a time; 0 means all of them. With few rows at a time, a longer
    `head_chunk` saves reading the vocabulary projection. `topology` is in the format of
    `saber_jax.aot`. With several slices each has a copy of the weights, and only gradients are sent
    over the data center network.
    """

    topology: str = ""
    slices: int = 1
    lora_rank: int = 0
    at_once: int = 0
    sequence: int = 1
    sft: str
    cadpo: str
    head_keep: bool = True
    head_chunk: int = 256

    @property
    def chips(self) -> int:
        """Devices, one where no topology is named."""
        _, _, shape = self.topology.rpartition(":")
        return self.slices * math.prod(int(n) for n in shape.split("x") if n)


# Above each recipe: its chips, and the peak GiB per device of its stages by the compiler.
RECIPES = {
    # All weights train.
    # 256 chips of v5e: sft 13.8, cadpo 12.3 of 15.75.
    "7b-v5e-256": Recipe(topology="v5e:16x16", sft="matmuls", cadpo="gate"),
    # 256 chips of v6e: 14.1, 17.8 of 31.24.
    "7b-v6e-256": Recipe(topology="v6e:16x16", sft="matmuls", cadpo="matmuls", head_chunk=704),
    # 64 chips of v5p, which is sold in pairs of cores: 27.4, 19.9 of 95.73.
    "7b-v5p-128": Recipe(topology="v5p:4x4x4", sft="matmuls", cadpo="matmuls"),
    # Two slices of 128 chips of v5e: 10.2, 12.9 of 15.75.
    "7b-2xv5e-128": Recipe(topology="2*v5e:8x16", slices=2, sft="gate", cadpo="gate"),
    # 32 chips of v5e: 12.1, 10.9 of 15.75.
    "3b-v5e-32": Recipe(topology="v5e:4x8", at_once=1, sft="matmuls", cadpo="gate"),
    # Adapters of the published rank train.
    # 16 chips of v5e: 11.0, 13.5 of 15.75.
    "7b-lora-v5e-16": Recipe(topology="v5e:4x4", lora_rank=8, at_once=1, sft="gate", cadpo="gate"),
    # 8 chips of v6e: 20.4, 25.4 of 31.24.
    "7b-lora-v6e-8": Recipe(topology="v6e:2x4", lora_rank=8, at_once=2, sft="gate", cadpo="gate"),
    # Clips of up to three minutes (configs/long_clips.py): four chips share a row.
    # All weights: sft 8.1, cadpo 7.6 of 15.75.
    "7b-long-v5e-256": Recipe(
        topology="v5e:16x16", sequence=4, at_once=1, sft="attention", cadpo="attention"
    ),
    # Adapters: sft 9.1, cadpo 8.6 of 15.75.
    "7b-long-lora-v5e-16": Recipe(
        topology="v5e:4x4",
        sequence=4,
        lora_rank=8,
        at_once=1,
        sft="attention",
        cadpo="attention",
    ),
}

# One NVIDIA GPU. A topology is of TPUs, so these have none.
GPU_RECIPES = {
    # Adapters of the published rank train, on a card of 80 GB.
    "7b-lora-gpu": Recipe(lora_rank=8, at_once=1, sft="matmuls", cadpo="matmuls", head_chunk=704),
    # All weights train, on a card of 141 GB.
    "3b-gpu": Recipe(at_once=1, sft="matmuls", cadpo="matmuls", head_chunk=704),
}


def fit(config: ConfigDict) -> None:
    """Applies the recipe of config.variant, if it is one, for config.stage."""
    recipe = (RECIPES | GPU_RECIPES).get(config.variant)
    if recipe is None:
        return
    config.topology = recipe.topology
    config.mesh.data, config.mesh.sequence = recipe.slices, recipe.sequence
    config.lora.rank = recipe.lora_rank
    if recipe.at_once:
        per_device = -(-config.data.batch_rows * recipe.sequence // recipe.chips)
        config.compute.microbatches = -(-per_device // recipe.at_once)
    config.compute.remat = getattr(recipe, config.stage)
    config.compute.head_keep, config.compute.head_chunk = recipe.head_keep, recipe.head_chunk
