import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from configs import sft
from saber_jax import sharding
from saber_jax.train import checkpoint, saved, start
from saber_jax.train import stage as stages
from saber_jax.tree import flatten


def test_a_run_warns_of_towers_that_fewer_devices_share(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "write_model_files", lambda *_, **__: None)
    config = sft.get_config("tiny")
    config.workdir = str(tmp_path)
    stage = stages.build(config, sharding.make_mesh(data=1, fsdp=-1, tensor=1))
    inputs = SimpleNamespace(provenance={}, tokenizer=None, describe=lambda: "some clips")
    start.describe(config, stage, None, inputs)
    assert "cut" not in capsys.readouterr().err
    sizes = dict(stage.mesh.shape) | {"fsdp_z": 101}
    many = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    start.describe(config, dataclasses.replace(stage, mesh=many), None, inputs)
    said = capsys.readouterr()
    assert "some clips" in said.out
    for tower in ("text", "vision", "audio"):
        assert f"WARNING: The weights of the {tower} tower are cut 2 ways, not 202" in said.err


def test_a_kill_while_the_random_base_is_saved_costs_only_that_save(tmp_path, monkeypatch):
    config = sft.get_config("tiny")
    config.lora.rank, config.steps, config.optimizer.vocabulary_steps = 4, 1, 0
    adapting = stages.build(config, sharding.make_mesh(**config.mesh))

    def kill(*args, **options):
        del args, options
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_model_file", kill)
        with pytest.raises(KeyboardInterrupt):
            start.base_checkpoint(config, adapting, tmp_path)
    assert saved.steps(tmp_path / "base")
    found = [start.base_checkpoint(config, adapting, tmp_path) for _ in range(2)]
    assert found == 2 * [tmp_path / "base"]
    assert not saved.problem(saved.newest(found[0]))
    drawn = start.params(config, adapting, found[0])
    again = checkpoint.load_params(found[0], start._bare(adapting.cfg))
    for name, leaf in flatten(again).items():
        np.testing.assert_array_equal(leaf, flatten(drawn)[name])
