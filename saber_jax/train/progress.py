"""Speed and padding of a run, and its progress line on the console."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from saber_jax import sharding
from saber_jax.batch import Batch
from saber_jax.runs.console import log
from saber_jax.train import flops
from saber_jax.train.optimizer import OptimizerConfig, schedules
from saber_jax.train.stage import Stage

Counts = dict[str, jax.Array]

# Name of a budget -> name in flops.counts of what fills it.
BUDGETS = {"text": "tokens", "patches": "patches", "chunks": "chunks", "targets": "targets"}


class Meter:
    """Speed and padding of steps of one `Stage`, over all of its devices."""

    def __init__(self, stage: Stage):
        self._cfg, self._trainable = stage.cfg, tuple(stage.state.trainable)
        self._sizes = {
            name: math.prod(leaf.shape)
            for name, leaf in (stage.state.trainable | stage.state.frozen).items()
        }
        batch = stage.batch
        self._room = {
            "text": math.prod(batch.text.segments.shape),
            "patches": math.prod(batch.vision.frame.shape),
            "chunks": math.prod(batch.audio.lengths.shape),
            "targets": math.prod(batch.targets.weights.shape),
        }
        self._count = jax.jit(flops.counts, out_shardings=sharding.replicated(stage.mesh))
        device = stage.mesh.devices.flat[0]
        self._devices, self._kind = stage.mesh.size, device.device_kind

    def count(self, batch: Batch) -> Counts:
        """Counts on the device, without waiting for the result."""
        return self._count(batch)

    def measure(self, counted: Counts, seconds: float) -> dict[str, float]:
        """padding/BUDGET, a share; left_out, examples; model_tflop/TOWER; speed/..._per_second;
        speed/mfu, a share, where the device's peak is known."""
        values = {name: float(value) for name, value in jax.device_get(counted).items()}
        work = flops.train_flops(self._cfg, self._sizes, self._trainable, values)
        result = {
            f"padding/{name}": 1 - values[filled] / self._room[name] if self._room[name] else 0.0
            for name, filled in BUDGETS.items()
        }
        result["left_out"] = values["left_out"]
        result |= {f"model_tflop/{tower}": value / 1e12 for tower, value in work.items()}
        result |= {f"speed/{n}_per_second": values[n] / seconds for n in ("tokens", "examples")}
        share = flops.mfu(sum(work.values()), seconds, self._devices, self._kind)
        return result if share is None else result | {"speed/mfu": share}


class StepSchedule:
    """The learning rate and epoch of each step, under TRL's names."""

    def __init__(
        self,
        config: OptimizerConfig,
        steps: int,
        *,
        adapters: bool,
        passed: int,
        epochs: Callable[[int], float],
    ):
        """`passed` counts the examples of all steps before, including those that could not be
        read; `epochs` tells how many epochs so many examples are."""
        group = "adapters" if adapters else "rest"
        # For all steps at once, because a schedule computes on the device.
        rates = jnp.broadcast_to(schedules(config, steps)[group](jnp.arange(steps)), steps)
        self._rates = jax.device_get(rates)
        self._passed, self._epochs = passed, epochs

    def after(self, step: int, examples: int) -> dict[str, float]:
        """{"learning_rate", "epoch"} after `step`, which had so many; called step by step."""
        self._passed += examples
        return {
            "learning_rate": float(self._rates[step]),
            "epoch": self._epochs(self._passed),
        }


@dataclasses.dataclass(kw_only=True)
class Console:
    """One line from process 0 every `every` steps, of the mean over them; none for `every` 0.

    sft 50/550  loss 3.412  1.02 s/step  2,310 tokens/s  10.8 clips/s  padding text 9%
        patches 4% chunks 12% targets 20%  input wait 0%  MFU 41%  8:30 to go
    """

    stage: str
    items: str  # What a row holds: "clips", "pairs".
    steps: int
    every: int

    def __post_init__(self):
        self._first: int | None = None
        self._since: list[Mapping[str, float]] = []

    def begin(self) -> None:
        """Announces compilation, during which nothing is printed."""
        if self.every:
            log(f"{self.stage}: compiling the train step (a minute or so, once)")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """`values` are the step's metrics, with `seconds`, `input_wait` and `Meter.measure`'s."""
        if not self.every or jax.process_index() != 0:
            return
        self._since.append(values)
        done = step + 1
        if self._first is None:
            self._first = step
            took = f"first step took {values['seconds']:.1f} s, compilation included"
            log(f"{self._head(done)}  {_learning(values)}  {took}")
            self._since.clear()
        elif done % self.every == 0 or done == self.steps:
            mean = _means(self._since)
            left = _duration((self.steps - done) * mean["seconds"])
            log(f"{self._head(done)}  {_learning(mean)}  {self._speed(mean)}  {left} to go")
            self._since.clear()

    def _head(self, done: int) -> str:
        return f"{self.stage} {done:{len(str(self.steps))}}/{self.steps}"

    def _speed(self, mean: Mapping[str, float]) -> str:
        seconds = mean["seconds"]
        padding = " ".join(f"{name} {mean[f'padding/{name}']:.0%}" for name in BUDGETS)
        parts = [
            f"{seconds:.2f} s/step",
            f"{mean['speed/tokens_per_second']:,.0f} tokens/s",
            f"{mean['speed/examples_per_second']:,.1f} {self.items}/s",
            f"padding {padding}",
            f"input wait {mean['input_wait'] / seconds:.0%}",
        ]
        return "  ".join(
            [*parts, *([f"MFU {mean['speed/mfu']:.1%}"] if "speed/mfu" in mean else [])]
        )


def _duration(seconds: float) -> str:
    """8:30, 1:08:30 or 49:08:30: days are hours too."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _means(lines: list[Mapping[str, float]]) -> dict[str, float]:
    """Means by name over the lines that have it; some metrics are not logged at every step."""
    found: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _learning(values: Mapping[str, float]) -> str:
    shown = ("loss", "rewards/accuracies", "rewards/margins")
    return "  ".join(f"{n.split('/')[-1]} {values[n]:.3f}" for n in shown if n in values)
