"""Runs a jitted step over batches: metrics fetched one step late, checkpoints, a progress bar."""

import math
import time
from collections.abc import Callable, Iterator

import jax
from tqdm import tqdm

from saber_jax.train.checkpoint import Checkpoints
from saber_jax.train.metrics import MetricsWriter
from saber_jax.train.step import Batch, Metrics, TrainState


def run(
    state: TrainState,
    step_fn: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Iterator[Batch],
    *,
    stage: str,
    steps: int,
    checkpoints: Checkpoints,
    meta: dict,
    writer: MetricsWriter,
) -> TrainState:
    """Steps from `state.step` to `steps`. Raises FloatingPointError at the first loss that is not
    finite, naming the steps between which it happened."""
    start = int(state.step)
    pending: tuple[int, Metrics, dict[str, float]] | None = None
    bar = tqdm(
        range(start, steps),
        initial=start,
        total=steps,
        desc=stage,
        unit="step",
        disable=jax.process_index() != 0,
    )
    clock = time.perf_counter()
    for step in bar:
        waiting = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - waiting
        state, metrics = step_fn(state, batch)
        # Fetching this step's metrics here would make the device wait for the host.
        if pending is not None:
            bar.set_postfix(_emit(writer, *pending), refresh=False)
        now = time.perf_counter()
        pending = (step, metrics, {"seconds": now - clock, "input_wait": waited})
        clock = now
        checkpoints.save(state, meta | {"step": step + 1})
    if pending is not None:
        _emit(writer, *pending)
    bar.close()
    checkpoints.save(state, meta | {"step": steps}, force=True)
    return state


def _emit(
    writer: MetricsWriter, step: int, metrics: Metrics, host: dict[str, float]
) -> dict[str, str]:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(
            f"The loss is {values['loss']} at step {step}; step {step - 1} was finite or the run "
            "began there. Lower config.optimizer.peak_lr, or look at this step's batch."
        )
    writer.write(step, values | host)
    shown = ("loss", "rewards/accuracies", "rewards/margins")
    return {name.split("/")[-1]: f"{values[name]:.3f}" for name in shown if name in values}
