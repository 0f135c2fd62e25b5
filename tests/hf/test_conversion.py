"""HuggingFace -> Orbax -> HuggingFace: the same bytes, whatever stands around the thinker."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saber_jax import sharding
from saber_jax.hf import digests, export, load, tensors
from saber_jax.hf.config import from_hf, portable, to_hf
from saber_jax.hf.names import entries
from saber_jax.hf.tokenizer import write_tokenizer
from saber_jax.models import saber
from saber_jax.models.config import LoraConfig, SaberConfig
from saber_jax.train import checkpoint, saved, stream
from saber_jax.tree import flatten
from tests import full_disk
from tests.hf import vocabulary
from tests.models.batches import CONFIG
from tests.processes import running

TALKER = {
    "talker.model.layers.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "token2wav.codec.ids": np.arange(5, dtype=np.int64),
}


def omni_config() -> dict:
    return {
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
        "model_type": "qwen2_5_omni",
        "thinker_config": to_hf(CONFIG, dtype="bfloat16"),
        "talker_config": {"rope_theta": 1e6, "vocab_size": 8448},
        "enable_audio_output": True,
    }


@pytest.fixture(scope="module")
def omni(tmp_path_factory):
    """The full layout in bfloat16: two shards that talker and thinker share, and odd files."""
    out = tmp_path_factory.mktemp("omni") / "hf"
    out.mkdir()
    rng = np.random.default_rng(0)
    weights = {
        f"thinker.{name}": rng.normal(size=entry.shape).astype(ml_dtypes.bfloat16)
        for name, entry in entries(CONFIG).items()
    } | TALKER
    names = sorted(weights)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({n: weights[n] for n in held}, out / file, metadata={"format": "pt"})
    places = {name: file for file, held in shards.items() for name in held}
    (out / tensors.INDEX).write_text(json.dumps({"weight_map": places}))
    (out / "config.json").write_text(json.dumps(omni_config()))
    (out / "spk_dict.pt").write_bytes(b"speakers, never opened")
    (out / "chat_template.jinja").write_text("{{ messages }}")
    write_tokenizer(vocabulary.write(out.with_name("vocabulary")), out)
    return out


@pytest.fixture(scope="module")
def workdir(omni):
    out = omni.with_name("work")
    assert load.main(["--hf_dir", str(omni), "--out", str(out)]) == 0
    return out


def files(directory):
    """The files of an export without its digests."""
    kept = [path for path in directory.iterdir() if path.name != digests.FILE]
    return {path.name: path.read_bytes() for path in kept}


def test_the_full_layout_comes_back_byte_for_byte(omni, workdir, tmp_path, capsys):
    (omni / "old").mkdir(exist_ok=True)
    (omni / "pytorch_model.bin").write_bytes(b"stale")
    arguments = ["--checkpoint", str(workdir), "--source", str(omni), "--out", str(tmp_path / "hf")]
    assert export.main(arguments) == 0
    assert "not copied, because they are folders or other weights: old, pytorch_model.bin" in (
        capsys.readouterr().out
    )
    (omni / "pytorch_model.bin").unlink()
    (omni / "old").rmdir()
    assert files(tmp_path / "hf") == files(omni)
    assert export.main(arguments) == 1
    assert "is there already" in capsys.readouterr().err
    assert export.main([*arguments, "--overwrite"]) == 0  # An export may replace an export.


def test_weights_keep_their_dtype_on_disk_and_can_be_had_in_another(workdir):
    params = checkpoint.load_params(workdir, CONFIG)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    masters = checkpoint.load_params(workdir, CONFIG, dtypes={"text/norm": np.float32})
    assert masters["text"]["norm"].dtype == np.float32
    np.testing.assert_array_equal(masters["text"]["norm"], params["text"]["norm"])


def test_only_the_thinker_of_the_source_is_replaced(omni, workdir, tmp_path):
    params, cfg = stream.open_model(workdir)
    params["text"]["norm"] = np.full(CONFIG.text.width, 0.5, np.float32)
    export.export_like(params, cfg, tmp_path / "hf", load.open_checkpoint(omni))
    got, want = (
        load_file(d / "model-1.safetensors") | load_file(d / "model-2.safetensors")
        for d in (tmp_path / "hf", omni)
    )
    changed = [name for name in want if not np.array_equal(got[name], want[name])]
    assert changed == ["thinker.model.norm.weight"]
    assert got["thinker.model.norm.weight"].dtype == ml_dtypes.bfloat16
    assert [got[name].dtype for name in TALKER] == [np.float32, np.int64]


def test_a_source_of_another_shape_is_refused(omni, workdir, tmp_path):
    params, cfg = stream.open_model(workdir)
    other = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, rope_theta=7.0))
    with pytest.raises(ValueError, match=r"text\.rope_theta: 1000000\.0 there, 7\.0 here"):
        export.export_like(params, other, tmp_path / "hf", load.open_checkpoint(omni))
    assert not list(tmp_path.iterdir())


def test_an_untied_head_is_not_lost_in_a_source_that_ties_it(omni, workdir, tmp_path):
    params, cfg = stream.open_model(workdir)
    source = load.open_checkpoint(omni)
    tied = dataclasses.replace(
        source,
        tensors={**source.tensors, "lm_head.weight": source.tensors["model.embed_tokens.weight"]},
    )
    with pytest.raises(ValueError, match="one matrix for embedding and lm_head"):
        export.export_like(params, cfg, tmp_path / "hf", tied)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [({}, "BF16"), ({"text/norm": "float32"}, "BF16"), ({"": "float32"}, "F32")],
)
def test_an_export_of_its_own_takes_the_narrowest_dtype(workdir, tmp_path, stored, expected):
    dtypes = dict(stored)
    if "" in stored:
        dtypes = {name: "float32" for name in flatten(saber.abstract(CONFIG))}
    params = checkpoint.load_params(workdir, CONFIG, dtypes=dtypes)
    export.export(params, CONFIG, tmp_path / "hf")
    source = load.open_checkpoint(tmp_path / "hf")
    assert {tensor.dtype for tensor in source.tensors.values()} == {expected}
    name = {"BF16": "bfloat16", "F32": "float32"}[expected]
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == name


def test_a_config_of_transformers_5_gains_what_version_4_reads(omni):
    config = omni_config()
    assert portable(config) == config
    text = config["thinker_config"]["text_config"]
    rotary = {"rope_theta": text.pop("rope_theta"), "rope_type": "default"}
    rotary["mrope_section"] = text.pop("rope_scaling")["mrope_section"]
    text["rope_parameters"] = rotary
    del text["tie_word_embeddings"], config["thinker_config"]["tie_word_embeddings"]
    config["talker_config"] = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}
    got = portable(config)
    text = got["thinker_config"]["text_config"]
    assert text["rope_theta"] == 1e6 and text["rope_scaling"]["mrope_section"] == [2, 3, 3]
    assert text["rope_parameters"] == rotary
    assert got["talker_config"]["rope_theta"] == 5.0
    assert text["tie_word_embeddings"] is got["thinker_config"]["tie_word_embeddings"] is False
    assert from_hf(got) == CONFIG


def test_layers_of_several_dtypes_are_stored_in_one_that_holds_them_all(omni, tmp_path):
    other = tmp_path / "mixed"
    other.mkdir()
    for name, content in files(omni).items():
        (other / name).write_bytes(content)
    for file in ("model-1.safetensors", "model-2.safetensors"):
        weights = load_file(other / file)
        for name in [n for n in weights if n.endswith("model.layers.1.mlp.up_proj.weight")]:
            weights[name] = weights[name].astype(np.float32)
        save_file(weights, other / file, metadata={"format": "pt"})
    leaf = flatten(load.leaves(load.open_checkpoint(other)))["text/blocks/mlp/w_up"]
    assert leaf.dtype == np.float32
    assert load.main(["--hf_dir", str(other), "--out", str(tmp_path / "work")]) == 0
    params, cfg = stream.open_model(tmp_path / "work")
    export.export_like(params, cfg, tmp_path / "hf", load.open_checkpoint(other))
    assert files(tmp_path / "hf") == files(other)


def test_chunks_are_layers_cut_where_fsdp_cuts(workdir):
    leaf = stream.StreamedParameter(
        shape=(28, 3584, 18944),
        dtype=np.dtype(ml_dtypes.bfloat16),
        axes=("layers", "embed", "mlp"),
        pieces=(),
    )
    assert leaf.chunks == (1, 112, 18944)
    assert dataclasses.replace(leaf, axes=("layers", "mlp", "embed")).chunks == (
        1,
        3584,
        18944 // 32,
    )
    chunk = stream.open_leaves(saved.newest(workdir))["text/blocks/mlp/w_up"].chunks
    assert chunk == (1, CONFIG.text.width, CONFIG.text.mlp_dim)
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=1)
    split = checkpoint.load_params(workdir, CONFIG, saber.shardings(CONFIG, mesh))
    whole = checkpoint.load_params(workdir, CONFIG)
    assert not split["text"]["lm_head"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, split, whole)


def test_adapters_are_merged_a_layer_at_a_time(workdir, tmp_path):
    cfg = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2, alpha=4.0, targets=("text/*",)))
    run = adapters_on(workdir, tmp_path, cfg)
    merged, bare = stream.open_model(run)
    assert bare == CONFIG
    want = saber.merge_lora(jax.tree.map(np.asarray, checkpoint.load_params(run, cfg)), cfg)
    assert export.main(["--checkpoint", str(run), "--out", str(tmp_path / "hf")]) == 0
    loaded, _ = load.load_params(tmp_path / "hf")
    for name, leaf in flatten(want).items():
        np.testing.assert_array_equal(flatten(merged)[name][...], leaf, err_msg=name)
        np.testing.assert_array_equal(flatten(loaded)[name], leaf, err_msg=name)


def adapters_on(base, tmp_path, cfg: SaberConfig):
    """The work directory of a LoRA run on `base`, with random adapters."""
    run = tmp_path / "run"
    rng = np.random.default_rng(1)
    lora = jax.tree.map(
        lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), saber.abstract(cfg)["lora"]
    )
    described = checkpoint.describe_base(run, base)
    checkpoint.save_params(run, {"lora": lora}, cfg, base=described)
    vocabulary.write(run)
    return run


def test_a_run_without_adapters_has_none_to_give(workdir, tmp_path, capsys):
    arguments = ["--checkpoint", str(workdir), "--peft", "--out", str(tmp_path / "hf")]
    assert export.main(arguments) == 1
    assert "has no adapters" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("command", ["load", "export"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(command, omni, workdir, tmp_path, capfd):
    given = {"load": ("--hf_dir", omni), "export": ("--checkpoint", workdir)}[command]
    out = tmp_path / "out"
    with full_disk.files_of_at_most(4096):
        main = {"load": load.main, "export": export.main}[command]
        assert main([*map(str, given), "--out", str(out)]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if "exporting" not in line]
    [said] = filter(None, lines)  # The bar ends with an empty line.
    assert f"{out} could not be written: File too large" in said
    assert not list(tmp_path.iterdir())


def test_a_damaged_export_is_not_loaded_and_leaves_nothing(workdir, tmp_path, capfd):
    hub, out = tmp_path / "hub", tmp_path / "out"
    assert export.main(["--checkpoint", str(workdir), "--out", str(hub)]) == 0
    [file] = hub.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    capfd.readouterr()
    assert load.main(["--hf_dir", str(hub), "--out", str(out)]) == 1
    [said] = capfd.readouterr().err.splitlines()
    assert f"{file} is damaged" in said
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


SHARE = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
from saber_jax.hf import load, tensors
from saber_jax.runs import distributed
distributed.initialize()
read, whole = [], tensors.Tensor.read
tensors.Tensor.read = lambda self: (read.append(self.nbytes), whole(self))[1]
status = load.main(sys.argv[1:])
print("bytes read:", sum(read))
sys.exit(status)
"""


def test_two_processes_read_and_write_a_half_each(omni, workdir, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SHARE, "--hf_dir", str(omni), "--out", str(tmp_path / "work")]
    variables = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | variables | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    read = [int(out.split("bytes read:")[1]) for out in outputs]
    total = sum(tensor.nbytes for tensor in load.open_checkpoint(omni).tensors.values())
    assert sum(read) == total and max(read) < 0.6 * total
    jax.tree.map(
        np.testing.assert_array_equal,
        checkpoint.load_params(tmp_path / "work", CONFIG),
        checkpoint.load_params(workdir, CONFIG),
    )


RESTORE = """
import sys
from pathlib import Path
import jax
from saber_jax import sharding
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig
from saber_jax.runs import distributed
from saber_jax.train import checkpoint
from saber_jax.tree import flatten

def read():
    return int(Path("/proc/self/io").read_text().split()[1])

distributed.initialize()
cfg = SaberConfig.from_dict(checkpoint.read_model_file(sys.argv[1])["model"])
places = saber.shardings(cfg, sharding.make_mesh(data=1, fsdp=8, tensor=1))
before = read()
params = jax.block_until_ready(checkpoint.load_params(sys.argv[1], cfg, places))
count = read() - before
held = {
    (name, str(shard.index)): shard.data.nbytes
    for name, leaf in flatten(params).items()
    for shard in leaf.addressable_shards
}
print(f"bytes: {count} {sum(held.values())}")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts bytes read")
def test_a_host_that_restores_reads_what_its_devices_hold(tmp_path, monkeypatch):
    """The network is small, so its chunks are made small too; real ones are cut at 8 MiB."""
    wide = dataclasses.replace(
        CONFIG,
        text=dataclasses.replace(CONFIG.text, layers=2, width=1024, mlp_dim=4096),
        vision=dataclasses.replace(CONFIG.vision, out_width=1024),
        audio=dataclasses.replace(CONFIG.audio, out_width=1024),
    )
    monkeypatch.setattr(stream, "CHUNK_BYTES", 2**16)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32), saber.abstract(wide)
    )
    export.export(params, wide, tmp_path / "hf", vocabulary.write(tmp_path / "vocabulary"))
    work = tmp_path / "work"
    assert load.main(["--hf_dir", str(tmp_path / "hf"), "--out", str(work)]) == 0
    with running(["-c", RESTORE, str(work)], tmp_path / "logs", count=2) as processes:
        assert processes.wait(300) == [0, 0], processes.text()
        counts = re.findall(r"bytes: (\d+) (\d+)", processes.text())
    assert len(counts) == 2, processes.text()
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for read, held in (map(int, pair) for pair in counts):
        assert held < 0.55 * total  # A half, and what every device has whole.
        assert held <= read < 1.05 * held
