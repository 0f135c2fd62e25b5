"""The loop: nothing broken is saved, a polite stop loses nothing, a trace covers its steps."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saber_jax import sharding
from saber_jax.data.quarantine import LeftOut
from saber_jax.runs.files import read_jsonl
from saber_jax.train import loop
from saber_jax.train.checkpoint import Checkpoints
from saber_jax.train.nonfinite import NonFinite, RolledBack, left_out, skipping
from saber_jax.train.profile import Profile
from saber_jax.train.progress import Console
from saber_jax.train.step import TrainState
from saber_jax.train.validate import BatchSums, Validation

STEPS = 6


class Batches:
    """A stand-in for GlobalBatches."""

    def __init__(self, batches):
        self._rest = iter(batches)

    def __next__(self):
        return {"x": jnp.float32(next(self._rest))}

    def state(self):
        return {}


class Recorder:
    """A stand-in for the metrics writer and for the meter."""

    def __init__(self):
        self.lines = []

    def sync(self):
        pass

    def write(self, step, values):
        if "loss" in values:
            self.lines.append((step, values["loss"]))

    def weights(self, step, trainable):
        pass

    def count(self, batch):
        return {}

    def measure(self, counted, seconds):
        return {}


@jax.jit
def add_batch(state, batch):
    """A step whose weight is the sum of the batches so far, and its loss too."""
    with jax.named_scope("addition"):
        w = state.trainable["w"] + batch["x"]
    rest = {"left_out": jnp.zeros(()), "grad_norm": jnp.ones(()), "update_norm": jnp.ones(())}
    return TrainState(state.step + 1, {"w": w}, {}, state.opt_state), {"loss": w[0]} | rest


def zero():
    everywhere = sharding.replicated(sharding.make_mesh(data=1, fsdp=-1, tensor=1))
    step = jax.device_put(jnp.zeros((), jnp.int32), everywhere)
    w, moment = jax.device_put((jnp.zeros(4), jnp.zeros(4)), everywhere)
    return TrainState(step, {"w": w}, {}, {"moment": moment})


def records(step):
    yield LeftOut(index=step, clip_id=f"clip{step}", file="file", reason="nonfinite", detail="")


def go(folder, batches, *, window="", step=add_batch, policy="stop", limit=1, validation=None):
    """Runs and returns (state, reported lines); checkpoints every second step."""
    checkpoints = Checkpoints(folder, every=2)
    state = zero() if checkpoints.latest() is None else checkpoints.restore(zero(), {})
    recorder = Recorder()
    observers = loop.Observers(
        writer=recorder,
        console=Console(stage="sft", items="clips", steps=STEPS, every=0),
        meter=recorder,
        profile=Profile(window, folder, steps=STEPS),
        batches=Batches(batches[int(state.step) :]),
        nonfinite=NonFinite(workdir=folder, policy=policy, limit=limit, records=records),
    )
    try:
        after = loop.run(
            state,
            step,
            steps=STEPS,
            checkpoints=checkpoints,
            meta={},
            observers=observers,
            validation=validation,
        )
    finally:
        checkpoints.close()
    return after, recorder.lines


@pytest.mark.parametrize("broken", [1, 3, 5])
def test_what_is_not_finite_is_never_saved(tmp_path, broken):
    batches = [np.nan if i == broken else 1.0 for i in range(STEPS)]
    with pytest.raises(FloatingPointError, match=f"loss is nan at step {broken}"):
        go(tmp_path, batches)
    kept = Checkpoints(tmp_path, every=2)
    assert kept.latest() == (broken - 1 if broken > 1 else None)
    kept.close()
    after, lines = go(tmp_path, [1.0] * STEPS)
    assert after.trainable["w"][0] == STEPS
    assert lines[0][0] == broken - 1


def skipped(folder, bad, **options):
    batches = [np.nan if i in bad else 1.0 for i in range(STEPS)]
    step = jax.jit(skipping(add_batch), donate_argnums=0)
    return go(folder, batches, step=step, policy="skip", **options)


def test_a_skipped_step_changes_nothing_and_names_its_records(tmp_path, capsys):
    after, lines = skipped(tmp_path, [3], limit=1)
    np.testing.assert_array_equal(after.trainable["w"], np.full(4, STEPS - 1))
    assert [step for step, _ in lines] == [0, 1, 2, 4, 5]
    [line] = read_jsonl(tmp_path / "nonfinite.jsonl")
    assert (line["step"], line["what"], line["done"]) == (3, "loss is nan", "skip")
    assert [record["clip_id"] for record in line["records"]] == ["clip3"]
    assert (
        "loss is nan at step 3, whose batch holds clip3 (file): skipped" in capsys.readouterr().out
    )


def test_more_than_so_many_steps_are_not_skipped(tmp_path):
    with pytest.raises(FloatingPointError, match=r"clip4.* config\.nonfinite_limit=2 allows"):
        skipped(tmp_path, [1, 2, 4], limit=2)
    # A restart does not count what it repeats.
    with pytest.raises(FloatingPointError, match=r"clip4.* config\.nonfinite_limit=2 allows"):
        skipped(tmp_path, [1, 2, 4], limit=2)


def test_a_rollback_names_the_records_that_are_left_out_from_now_on(tmp_path):
    batches = [np.nan if i == 3 else 1.0 for i in range(STEPS)]
    with pytest.raises(RolledBack, match="clip3"):
        go(tmp_path, batches, policy="rollback")
    assert [entry.clip_id for entry in left_out(tmp_path)] == ["clip3"]


def test_a_stop_names_the_records_and_what_can_be_done(tmp_path):
    batches = [np.nan if i == 3 else 1.0 for i in range(STEPS)]
    with pytest.raises(FloatingPointError, match=r"clip3 \(file\).*on_nonfinite=skip.*rollback"):
        go(tmp_path, batches)
    assert left_out(tmp_path) == []


def test_an_unknown_policy_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"config\.on_nonfinite must be stop, skip, rollback, got 'no'"
    ):
        go(tmp_path, [1.0] * STEPS, policy="no")


def test_a_polite_stop_saves_the_step_it_is_at_and_the_next_run_goes_on(tmp_path):
    def told_to_stop(state, batch):
        if batch["x"] == 3.0:
            signal.raise_signal(signal.SIGTERM)
        return add_batch(state, batch)

    batches = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    whole, lines = go(tmp_path / "whole", batches)
    with pytest.raises(loop.Preempted, match="after step 3 of 6 and saved it"):
        go(tmp_path / "stopped", batches, step=told_to_stop)
    after, rest = go(tmp_path / "stopped", batches)
    assert rest == lines[3:]
    np.testing.assert_array_equal(after.trainable["w"], whole.trainable["w"])


class Validating:
    """Validations of three batches after every third step; SIGTERM comes in the second batch of
    the one at step `stopped_at`."""

    def __init__(self, stopped_at=None):
        self.measured, self._stopped_at = [], stopped_at

    def validation(self):
        return Validation(batches=lambda: range(3), measure=self._measure, every=3, steps=STEPS)

    def _measure(self, state, batch):
        self.measured.append((int(state.step), batch))
        if self.measured[-1] == (self._stopped_at, 1):
            signal.raise_signal(signal.SIGTERM)
        return BatchSums(nll=jnp.ones(6), tokens=jnp.ones(6), left_out=jnp.zeros((), jnp.int32))


@pytest.mark.parametrize("step", [0, 3, 6])
def test_a_polite_stop_in_a_validation_saves_its_step_and_repeats_it(tmp_path, step):
    batches, validating = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], Validating(stopped_at=step)
    whole, lines = go(tmp_path / "whole", batches)
    with pytest.raises(loop.Preempted, match=f"stopped in the validation at step {step}"):
        go(tmp_path / "stopped", batches, validation=validating.validation())
    assert validating.measured[-2:] == [(step, 0), (step, 1)]
    again = Validating()
    after, rest = go(tmp_path / "stopped", batches, validation=again.validation())
    assert again.measured[:3] == [(step, batch) for batch in range(3)]
    assert rest == lines[step:]
    np.testing.assert_array_equal(after.trainable["w"], whole.trainable["w"])


def test_metrics_are_on_the_disk_before_the_checkpoint_that_stands_on_them(tmp_path, monkeypatch):
    happened = []
    monkeypatch.setattr(Recorder, "sync", lambda self: happened.append(len(self.lines)))
    monkeypatch.setattr(Checkpoints, "save", lambda self, state, meta: happened.append("saved"))
    go(tmp_path, [1.0] * STEPS)
    assert happened == [2, "saved", 4, "saved", 6, "saved"]


def test_a_trace_holds_its_steps_and_no_others(tmp_path):
    go(tmp_path, [1.0] * STEPS, window="2:4")
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    events = [
        dict(event.stats)
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert sorted({event["step_num"] for event in events}) == [2, 3]
    assert (tmp_path / "profile" / "memory.prof").stat().st_size > 0


@pytest.mark.parametrize("window", ["4:2", "3", "a:b", "2:7", "-1:2"])
def test_a_window_that_is_no_window_of_the_run_is_refused(tmp_path, window):
    with pytest.raises(ValueError, match=r"profile\.steps must be first:last"):
        Profile(window, tmp_path, steps=STEPS)


def test_the_console_says_the_mean_of_an_interval_in_one_line(capsys):
    console = Console(stage="cadpo", items="pairs", steps=4, every=2)
    for step in range(4):
        values = {"loss": float(step), "rewards/margins": 0.5, "seconds": 2.0, "input_wait": 0.1}
        values |= {f"padding/{name}": 0.25 for name in ("text", "patches", "chunks", "targets")}
        values |= {"speed/tokens_per_second": 1234.0, "speed/examples_per_second": 2.0}
        sometimes = {"probe": 1.0} if step == 3 else {}
        console.add(step, values | {"speed/mfu": 0.4} | sometimes)
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("cadpo 1/4  loss 0.000  margins 0.500  first step took 2.0 s")
    assert rest == [
        "cadpo 2/4  loss 1.000  margins 0.500  2.00 s/step  1,234 tokens/s  2.0 pairs/s  padding "
        "text 25% patches 25% chunks 25% targets 25%  input wait 5%  MFU 40.0%  0:04 to go",
        "cadpo 4/4  loss 2.500  margins 0.500  2.00 s/step  1,234 tokens/s  2.0 pairs/s  padding "
        "text 25% patches 25% chunks 25% targets 25%  input wait 5%  MFU 40.0%  0:00 to go",
    ]
