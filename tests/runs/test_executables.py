"""A compiled program comes back from its file, and only for the program that it was made of."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from configs import sft
from saber_jax import main, sharding
from saber_jax.runs import executables

OPTIONS = {"xla_flag": "true"}


def lowered(factor=2.0):
    def step(state, batch):
        return {"w": state["w"] * factor + batch}, {"sum": batch.sum()}

    part = jax.ShapeDtypeStruct((4,), jnp.float32)
    return jax.jit(step, donate_argnums=0).lower({"w": part}, part)


@pytest.fixture
def folder(tmp_path):
    made = lowered()
    executables.save(made, made.compile(), epath.Path(tmp_path), OPTIONS)
    return epath.Path(tmp_path)


def load(program, folder, options=OPTIONS):
    return executables.load(program, folder, options, jax.devices()[:1])


def test_a_loaded_program_does_the_same_without_a_compilation(folder, capsys):
    step = load(lowered(), folder)
    assert "need not be compiled" in capsys.readouterr().out
    state, batch, compiled = {"w": jnp.ones(4)}, jnp.arange(4.0), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    after, metrics = step(state, batch)
    assert not compiled
    lowered(5.0).compile()
    assert compiled
    assert after["w"].tolist() == [2.0, 3.0, 4.0, 5.0] and metrics["sum"] == 6.0
    assert state["w"].is_deleted()  # Donated, as in the program.


def test_another_program_or_other_options_are_compiled_and_said(folder, capsys):
    assert load(lowered(3.0), folder) is None
    assert load(lowered(), folder, {}) is None
    assert capsys.readouterr().out.count("has 1 executables, but none of this program") == 2


def test_without_any_executable_nothing_is_said(tmp_path, capsys):
    assert load(lowered(), epath.Path(tmp_path)) is None
    assert load(lowered(), epath.Path(tmp_path / "none")) is None
    assert not capsys.readouterr().out


def test_a_damaged_file_costs_a_compilation_and_not_the_run(folder, capsys):
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert load(lowered(), folder) is None
    assert "cannot be loaded" in capsys.readouterr().err


def test_a_run_takes_the_step_that_was_compiled_ahead(tmp_path, capsys):
    config, part = sft.get_config("tiny"), jax.ShapeDtypeStruct((4,), jnp.float32)
    config.root = str(tmp_path)
    step = jax.jit(lambda state, batch: (state + batch, batch.sum()))
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    stage = SimpleNamespace(train_step=lambda skip: step, state=part, batch=part, mesh=mesh)
    assert main.step_of(config, stage) is step
    lowered = step.lower(part, part)
    folder = epath.Path(tmp_path / main.EXECUTABLES)
    executables.save(lowered, lowered.compile(), folder, main.FLAGS)
    assert isinstance(main.step_of(config, stage), jax.stages.Compiled)
    assert "the step need not be compiled" in capsys.readouterr().out
