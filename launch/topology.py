"""TPU generations by their product names, and the shapes of their slices.

A slice is written GENERATION:TOPOLOGY, such as v5e:16x16 or v5p:4x4x8. Needs only Python, so that
it runs on a laptop.
"""

from __future__ import annotations  # A laptop's Python may be older than ours.

import ast
import dataclasses
import math
import re
from pathlib import Path

RECIPES = Path(__file__).resolve().parent.parent / "configs" / "pods.py"
CHIPS_PER_HOST = 4
# v5e and v6e also come as one host with eight chips, which the TPU API gives for this topology.
WIDE_HOST = ("2x4", 8)


@dataclasses.dataclass(frozen=True)
class Generation:
    """`node_pool` is GKE's name. `accelerator` is the prefix of the TPU API's accelerator type,
    which continues with the number of chips, or of cores if it counts `cores` per chip. `runtime`
    is the TPU VM's image. A generation without the last two is only available on GKE.
    """

    node_pool: str
    dimensions: int
    accelerator: str = ""
    cores: int = 1
    runtime: str = ""


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", 3, "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": Generation("tpu-v5-lite-podslice", 2, "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": Generation("tpu-v5p-slice", 3, "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": Generation("tpu-v6e-slice", 2, "v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": Generation("tpu7x", 3),
}


@dataclasses.dataclass(frozen=True)
class Slices:
    """`count` slices of one shape."""

    generation: str
    topology: str
    count: int = 1

    @property
    def chips(self) -> int:
        """Of one slice."""
        return math.prod(map(int, self.topology.split("x")))

    @property
    def hosts(self) -> int:
        """Of one slice, where hosts have four chips."""
        return max(1, self.chips // CHIPS_PER_HOST)

    @property
    def accelerator_type(self) -> str:
        about = GENERATIONS[self.generation]
        return f"{about.accelerator}-{self.chips * about.cores}"

    def __str__(self) -> str:
        many = f"{self.count}*" if self.count > 1 else ""
        return f"{many}{self.generation}:{self.topology}"


def parse(text: str) -> Slices:
    """Raises ValueError that says what is wrong with `text`, "v5e:16x16" or "2*v5e:8x16"."""
    many, _, one = text.rpartition("*")
    generation, _, topology = one.partition(":")
    sizes = topology.split("x")
    numbers = [*sizes, *([many] if many else [])]
    if generation not in GENERATIONS or not all(re.fullmatch("[1-9][0-9]*", n) for n in numbers):
        raise ValueError(
            "must be a generation and a topology such as v5e:16x16 or v5p:4x4x8, got "
            f"{text!r}. Generations: {', '.join(GENERATIONS)}."
        )
    dimensions = GENERATIONS[generation].dimensions
    if len(sizes) != dimensions:
        raise ValueError(
            f"has the wrong shape: topologies of {generation} have {dimensions} numbers, got "
            f"{topology}."
        )
    return Slices(generation, topology, int(many) if many else 1)


def of_recipe(config: str) -> Slices | None:
    """The slices of a config's recipe: configs/cadpo.py:7b-v5e-256 -> v5e:16x16.

    None if `config` is not a recipe for TPUs. Reads configs/pods.py as text, because a laptop may
    not be able to import it.
    """
    variant = config.partition(":")[2]
    for node in ast.walk(ast.parse(RECIPES.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values):  # noqa: B905 (Python 3.9)
            if isinstance(key, ast.Constant) and key.value == variant:
                settings = {k.arg: k.value for k in getattr(value, "keywords", [])}
                if "topology" not in settings:  # A recipe for GPUs.
                    return None
                return parse(ast.literal_eval(settings["topology"]))
    return None


def wanted(config: str, asked: str) -> Slices:
    """The slices that a run asks for: `asked`, the value of TPU_TYPE, or else those of its recipe.

    Raises ValueError where there is neither, or where the two differ.
    """
    recipe = of_recipe(config)
    if not asked:
        if recipe is None:
            raise ValueError(
                "which TPUs? Name a recipe of configs/pods.py, such as "
                "configs/cadpo.py:7b-v5e-256, or set TPU_TYPE, such as v5e:16x16."
            )
        return recipe
    try:
        shape = parse(asked)
    except ValueError as error:
        raise ValueError(f"TPU_TYPE {error}") from None
    if recipe is not None and shape != recipe:
        raise ValueError(
            f"TPU_TYPE is {shape}, but {config} is made for {recipe}. Leave TPU_TYPE away, or "
            "choose another recipe (configs/pods.py)."
        )
    return shape
