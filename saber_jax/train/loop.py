"""The training loop: runs a jitted step over batches, fetches metrics one step late, and saves."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable

import jax

from saber_jax.batch import Batch
from saber_jax.data.loader import GlobalBatches
from saber_jax.runs.distributed import Preempted, Preemption
from saber_jax.runs.phases import Attempt, PhaseClock
from saber_jax.train.best import Best
from saber_jax.train.checkpoint import Checkpoints
from saber_jax.train.metrics import MetricsWriter
from saber_jax.train.nonfinite import MUST_BE_FINITE, NonFinite
from saber_jax.train.profile import Profile
from saber_jax.train.progress import Console, Counts, Meter, StepSchedule
from saber_jax.train.step import Metrics, TrainState
from saber_jax.train.validate import Validation


@dataclasses.dataclass(frozen=True)
class Observers:
    """Everything that observes a run: metric files, console, meter, profiler, and the clock that
    the watchdog reads. `hosts` gives metrics of all hosts, `attempt` is written by one of them, and
    `nonfinite` handles steps with non-finite values. `best` keeps the best weights and decides
    when to end early."""

    writer: MetricsWriter
    console: Console
    meter: Meter
    profile: Profile
    batches: GlobalBatches
    nonfinite: NonFinite
    clock: PhaseClock = dataclasses.field(default_factory=PhaseClock)
    attempt: Attempt | None = None
    schedule: StepSchedule | None = None
    hosts: Callable[[], dict[str, float]] = dict
    best: Best | None = None

    def report(
        self, step: int, metrics: Metrics, counted: Counts, seconds: float, waited: float
    ) -> None:
        """Fetches and reports a step's metrics. Raises what `nonfinite` raises."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        broken = [n for n in MUST_BE_FINITE if not math.isfinite(values.get(n, 0.0))]
        if broken:
            self.nonfinite.handle(step, values, broken[0])
            values = {name: value for name, value in values.items() if math.isfinite(value)}
            values["skipped"] = 1.0
        # NaN is a mean over no elements, for example of a conflict type that the batch lacks.
        values = {name: value for name, value in values.items() if not math.isnan(value)}
        values |= {"seconds": seconds, "input_wait": waited}
        values |= self.meter.measure(counted, seconds) | self.hosts()
        if self.schedule is not None:
            # Those that were left out are passed too, as they are in the plan of a resumed run.
            passed = int(counted["examples"]) + int(counted["left_out"])
            values |= self.schedule.after(step, passed)
        self.writer.write(step, values)
        self.console.add(step, values)
        if values["left_out"]:  # The same number in every process.
            self.batches.agree()

    def validate(
        self, validation: Validation, state: TrainState, step: int, preemption: Preemption
    ) -> bool | None:
        """Runs validation on the weights after `step` steps and reports its metrics. Returns
        whether the run should end early, None if SIGTERM ended the validation."""
        self.clock.enter("validate")
        values = validation.run(state, step, preemption.reached)
        if values is None:
            return None
        self.writer.write(step, values)
        return self.best is not None and self.best.seen(values, state, step)


def run(
    state: TrainState,
    step_fn: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    *,
    steps: int,
    checkpoints: Checkpoints,
    meta: dict,
    observers: Observers,
    probe: Callable[[TrainState, Batch], Metrics] | None = None,
    probe_every: int = 1,
    validation: Validation | None = None,
) -> TrainState:
    """Steps from `state.step` to `steps`; `probe` adds its metrics to every `probe_every`-th step.

    `validation` runs before the first step, between steps and after the last, and writes separate
    lines to metrics.jsonl, with the number of completed steps.

    The run ends before `steps` if `observers.best` says so.

    Raises what `observers.nonfinite` raises for a step with non-finite values, and Preempted after
    SIGTERM, between two steps or two batches of validation, once the state is saved.
    """

    def save(done: int) -> None:
        observers.clock.enter("save")
        # A resumed run keeps the metrics up to its checkpoint, so they come first.
        observers.writer.sync()
        about = {"step": done, "data": observers.batches.state()}
        if observers.best is not None:
            about["best"] = observers.best.state()
        checkpoints.save(state, meta | about)
        observers.writer.weights(done, state.trainable)
        if observers.attempt is not None:
            observers.attempt.write(done)

    pending: tuple | None = None
    clock = time.perf_counter()
    with Preemption() as preemption, contextlib.closing(observers.profile):
        first = int(state.step)
        for step in range(first, steps):
            if validation is not None and validation.due(step):
                if pending is not None:
                    observers.report(*pending)
                    pending = None
                enough = observers.validate(validation, state, step, preemption)
                if enough or (enough is None and step > first):
                    save(step)
                if enough is None:
                    raise Preempted(f"stopped in the validation at step {step}")
                if enough:
                    return state
                clock = time.perf_counter()
            waiting = time.perf_counter()
            observers.clock.enter("input", step)
            batch = next(observers.batches)
            waited = time.perf_counter() - waiting
            # The first step compiles, and so does the first probe.
            observers.clock.enter("compile" if step == first else "step")
            with observers.profile.step(step):
                counted = observers.meter.count(batch)
                state, metrics = step_fn(state, batch)
                if probe is not None and step % probe_every == 0:
                    metrics |= probe(state, batch)
            observers.clock.enter("step")
            # Fetching this step's metrics here would make the device wait for the host.
            if pending is not None:
                observers.report(*pending)
            now = time.perf_counter()
            pending = (step, metrics, counted, now - clock, waited)
            clock = now
            observers.profile.after(step, state)
            done = step + 1
            stop = preemption.reached()
            if stop or done == steps or checkpoints.due(done):
                # Checked before saving, because a restart trusts the last checkpoint.
                observers.report(*pending)
                pending = None
                save(done)
            if stop and done < steps:
                raise Preempted(f"stopped after step {done} of {steps} and saved it")
        if (
            validation is not None
            and observers.validate(validation, state, steps, preemption) is None
        ):
            raise Preempted(f"stopped in the validation at step {steps}")
    return state
