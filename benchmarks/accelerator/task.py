"""What one process measures: a variant, its network, its clip and its model FLOPs."""

import dataclasses

import numpy as np

from benchmarks import cadpo
from saber_jax.batch import Batch
from saber_jax.data.examples import Example
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.data.records import Record
from saber_jax.models import saber
from saber_jax.models.config import LoraConfig, SaberConfig, saber_config
from saber_jax.train import flops
from saber_jax.tree import flatten

LORA = LoraConfig(rank=8, alpha=32.0, targets=("text/*",), dropout=0.05)
NEW_TOKENS = {True: 8, False: 128}  # Tokens of an answer, by whether the run is quick.
VARIANTS = (
    *("cadpo", "cadpo_sdpa", "sft", "sft_sdpa", "generate_8", "generate_8_sdpa"),
    *("cadpo_flash", "generate_32", "generate_32_sdpa", "sft_flash", "cadpo_compile"),
)
"""In the order in which they run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What one process measures."""

    size: str
    variant: str
    seconds: float  # How long the process may take.
    quick: bool

    @property
    def stage(self) -> str:
        return self.variant.split("_")[0]

    @property
    def peer(self) -> str:
        """ "sdpa", "flash" or "compile" of transformers; "" for ours."""
        last = self.variant.split("_")[-1]
        return last if last in ("sdpa", "flash", "compile") else ""

    @property
    def answers(self) -> int:
        return int(self.variant.split("_")[1])

    @property
    def cfg(self) -> SaberConfig:
        """The network, with the few token ids that the benchmark's tokenizer has."""
        if self.quick:
            text = dataclasses.replace(cadpo.CONFIG.text, layers=1)
            vision = dataclasses.replace(cadpo.CONFIG.vision, depth=2, full_attention_layers=(1,))
            audio = dataclasses.replace(cadpo.CONFIG.audio, layers=1)
            return dataclasses.replace(cadpo.CONFIG, text=text, vision=vision, audio=audio)
        return dataclasses.replace(saber_config(self.size), tokens=saber_config("tiny").tokens)

    @property
    def dtype(self) -> str:
        return "float32" if self.quick else "bfloat16"

    def pair(self) -> tuple[Record, Example]:
        return cadpo.pair(*((2, 30) if self.quick else (20, 450)))


def batch_of(task: Task, example: Example) -> Batch[np.ndarray]:
    """One row: the pair, or its first answer alone. Text slots are a multiple of 128."""
    answer = len(example.responses[0].tokens)
    room = {"patches": len(example.patches), "chunks": len(example.mel), "segments": 1}
    slots = len(example.prompt.tokens)
    if task.stage == "cadpo":
        length = slots + -(slots + 2 * answer) % 128
        budget = Budget(length=length, response=answer, targets=2 * answer, **room)
        return pack_rows([[example]], budget)
    length = slots + answer + -(slots + answer) % 128
    example = dataclasses.replace(example, responses=example.responses[:1], reference=None)
    return pack_rows([[example]], Budget(length=length, targets=answer, **room))


def model_flops(task: Task, cfg: SaberConfig, batch: Batch) -> float:
    """Model FLOPs of a step that trains adapters and freezes everything else."""
    sizes = flops.parameter_sizes(flatten(saber.abstract(cfg)))
    counted = {name: float(value) for name, value in flops.counts(batch).items()}
    trainable = [name for name in sizes if name.startswith("lora/")]
    return sum(flops.train_flops(cfg, sizes, trainable, counted).values())
