"""Training as a whole: a killed run and its continuation equal an uninterrupted one."""

import json

import jax
import numpy as np
import pytest

from configs import cadpo, sft
from data_prep import dataset
from saber_jax import main
from saber_jax.train import checkpoint, loop
from saber_jax.train.step import flatten
from tests import synthetic


@pytest.fixture(scope="module")
def records(tmp_path_factory, tokenizer):
    """Built records of eight made-up clips, and preference pairs for them."""
    out = tmp_path_factory.mktemp("records")
    made = [synthetic.record(i, words=2) for i in range(8)]
    dataset.write(out, {"train": made, "preference": made}, lambda record: record)
    (out / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    return out


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Every run here compiles the same step."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)


def config_for(module, records, root, **changes):
    config = module.get_config("tiny")
    config.root = str(root)
    config.data.path = str(records)
    config.steps, config.checkpoint_every = 4, 2
    config.data.batch_rows = 2
    config.data.length, config.data.patches, config.data.chunks = 256, 72, 1
    config.data.segments, config.data.targets, config.compute.head_chunk = 1, 128, 128
    for key, value in changes.items():
        config[key] = value
    return config


def metrics_of(root, stage):
    lines = (root / stage / "metrics.jsonl").read_text().splitlines()
    timing = ("seconds", "input_wait", "speed/")
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(timing)} for line in lines
    ]


def params_of(root, stage):
    return flatten(checkpoint.load_model(root / stage)[0])


@pytest.fixture(scope="module")
def whole(records, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    main.train(config_for(sft, records, root))
    return root


def test_a_killed_run_goes_on_to_the_same_weights_and_metrics(
    records, whole, tmp_path, monkeypatch
):
    write = loop.MetricsWriter.write

    def dying(self, step, values):
        write(self, step, values)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.MetricsWriter, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        main.train(config_for(sft, records, tmp_path))
    assert not (tmp_path / "sft" / "summary.json").exists()
    monkeypatch.undo()

    main.train(config_for(sft, records, tmp_path))
    assert metrics_of(tmp_path, "sft") == metrics_of(whole, "sft")
    expected = params_of(whole, "sft")
    for name, leaf in params_of(tmp_path, "sft").items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


def test_the_loss_falls(whole):
    losses = [line["loss"] for line in metrics_of(whole, "sft")]
    assert losses[-1] < losses[0]


def test_a_work_directory_of_another_config_is_refused_by_name(records, whole):
    config = config_for(sft, records, whole)
    config.optimizer.peak_lr = 0.5
    with pytest.raises(ValueError, match=r"optimizer\.peak_lr: 0\.002 there, 0\.5 here"):
        main.train(config)


def test_cadpo_starts_at_zero_margin_from_cached_references(records, whole):
    with (whole / "pairs.jsonl").open("w") as file:
        for i in range(8):
            pair = {"chosen": "[video_desc] calm red room", "rejected": "[video_desc] quiet person"}
            file.write(json.dumps({"clip_id": f"clip{i}", **pair}) + "\n")
    config = config_for(cadpo, records, whole)
    config.data.pairs = str(whole / "pairs.jsonl")
    config.data.response = 64
    main.train(config)
    first, *_, last = metrics_of(whole, "cadpo")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert last["rewards/margins"] > 0
    stored = np.load(whole / "cadpo" / "reference.npz")
    assert stored["log_probs"].shape == (8, 2)
