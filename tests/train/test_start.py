import dataclasses
from types import SimpleNamespace

from jax.sharding import AbstractMesh

from configs import sft
from saber_jax import sharding
from saber_jax.train import checkpoint, start
from saber_jax.train import stage as stages


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
