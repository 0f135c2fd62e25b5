import dataclasses
import json
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from saber_jax import sharding
from saber_jax.data import examples
from saber_jax.runs import files
from saber_jax.train import metrics, samples
from saber_jax.train.metrics import MetricsWriter
from tests import synthetic
from tests.bucket import bucket


def _events(workdir):
    """{tag: kind} of everything in the event files, which are length-framed protocol buffers."""
    found = {}
    for path in (workdir / "tensorboard").glob("events*"):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (length,) = struct.unpack_from("<Q", raw, at)
            event = Event.FromString(raw[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                found[value.tag] = value
    return found


def test_scalars_texts_and_histograms_reach_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path, start=0)
    writer.write(0, {"loss": 1.5, "rewards/margins": 0.25})
    writer.text(0, "answer", "line\nline")
    writer.histograms(0, {"sizes": np.arange(10), "nothing": np.zeros(0)})
    writer.close()
    events = _events(tmp_path)
    assert events["train/loss"].simple_value == 1.5
    assert events["rewards/margins"].simple_value == 0.25
    assert events["answer/text_summary"].tensor.string_val == [b"    line\n    line"]
    assert events["sizes"].histo.num == 10
    assert "nothing" not in events


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_are_sampled_evenly_over_every_axis(sharded, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "MOST_SAMPLED", 64)
    # Entry = its row, so that the sample shows which rows it comes from.
    wide = jnp.broadcast_to(jnp.arange(4.0)[:, None, None], (4, 32, 48))
    params = {"wide": wide, "bias": jnp.arange(3.0)}
    if sharded:
        mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1)
        params = jax.device_put(params, sharding.replicated(mesh))
    sampled = metrics._sampled(params)
    assert 32 <= sampled["wide"].size <= 64
    assert set(np.asarray(sampled["wide"])) == {0.0, 1.0, 2.0, 3.0}
    np.testing.assert_array_equal(sampled["bias"], [0, 1, 2])
    writer = MetricsWriter(tmp_path, start=0)
    writer.weights(7, params)
    writer.close()
    assert _events(tmp_path)["weights/bias"].histo.max == 2.0


def test_examples_are_shown_as_text_without_their_media(tmp_path, tokenizer):
    record = synthetic.record(1)
    pair = examples.encode_record(record, tokenizer, responses=("calm person", "red room"))
    writer = MetricsWriter(tmp_path, start=0)
    size = examples.size_of(pair)
    samples.show(writer, 0, [pair], np.array([dataclasses.astuple(size)]), tokenizer)
    writer.close()
    events = _events(tmp_path)
    text = events["examples/0/text_summary"].tensor.string_val[0].decode()
    assert "clip: clip1" in text
    assert "chosen: calm person" in text
    assert "rejected: red room" in text
    assert "<|VIDEO|>" not in text
    assert events["sizes/patches"].histo.max == size.patches > 0


def test_weights_and_biases_gets_the_scalars_if_asked_for(tmp_path, monkeypatch):
    logged, started = [], {}
    run = types.SimpleNamespace(log=lambda v, step: logged.append((step, v)), finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **settings: started.update(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "config.json").write_text(json.dumps({"seed": 3}))
    for start in (0, 1):
        writer = MetricsWriter(tmp_path, start=start, wandb="saber")
        first = dict(started)
        writer.write(start, {"loss": 1.0})
        writer.close()
    assert logged == [(0, {"loss": 1.0}), (1, {"loss": 1.0})]
    # The resumed run is the same one.
    assert first["id"] == started["id"]
    assert (started["project"], started["config"]) == ("saber", {"seed": 3})


def test_weights_and_biases_without_the_package_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        MetricsWriter(tmp_path, start=0, wandb="saber")


def test_metrics_reach_a_bucket_at_every_checkpoint_and_go_on_after_a_kill(tmp_path, monkeypatch):
    with bucket("runs") as made:
        for variable, value in made.environ.items():
            monkeypatch.setenv(variable, value)
        place = tmp_path / "buckets/runs"  # Nothing is mounted here.
        monkeypatch.setenv("SABER_MOUNTS", f"{place}=gs://runs")
        killed = metrics.MetricsWriter(place / "sft", start=0)
        for step in range(3):
            killed.write(step, {"loss": 1.0})
        killed.sync()
        killed.write(3, {"loss": 1.0})
        assert [row["step"] for row in files.read_jsonl(place / "sft/metrics.jsonl")] == [0, 1, 2]
        writer = metrics.MetricsWriter(place / "sft", start=2)
        writer.write(2, {"loss": 2.0})
        writer.close()
        found = files.read_jsonl(place / "sft/metrics.jsonl")
        assert [(row["step"], row["loss"]) for row in found] == [(0, 1.0), (1, 1.0), (2, 2.0)]
        assert files.listed(place / "sft/tensorboard", "events*")
        killed.close()  # Ends its thread.
    assert not place.exists()
