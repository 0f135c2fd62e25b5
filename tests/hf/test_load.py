"""What is wrong with a checkpoint directory is refused, all of it at once and by its name."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saber_jax.hf import load
from tests.hf.directories import edit, equal, refusal, rewrite


def test_every_wrong_tensor_is_listed_in_one_error(copy):
    def change(weights):
        weights["visual.merger.mlp.1.weight"] = weights.pop("visual.merger.mlp.0.weight")
        weights["model.norm.weight"] = np.zeros(7, np.float32)
        weights["audio_tower.proj.bias"] = np.zeros(48, np.int8)

    rewrite(copy, change)
    message = refusal(copy)
    assert "4 problems" in message
    assert "missing visual.merger.mlp.0.weight (128, 128)" in message
    assert "unexpected visual.merger.mlp.1.weight" in message
    assert "model.norm.weight: expected shape (48,), got (7,)" in message
    assert "audio_tower.proj.bias: expected dtype F32, F16, BF16, got I8" in message


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_a_truncated_file_is_refused(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(copy)
    assert "model.safetensors is truncated" in message and "missing" not in message


def test_a_damaged_header_is_refused(copy):
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xfe{{"
    path.write_bytes(data)
    assert "model.safetensors has a damaged header" in refusal(copy)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("../secret.safetensors", "points outside the directory: '../secret.safetensors'"),
        ("/etc/passwd", "points outside the directory: '/etc/passwd'"),
        ("pytorch_model.bin", "only .safetensors is read, never pickles"),
        ("gone.safetensors", "shard gone.safetensors does not exist"),
    ],
)
def test_an_index_must_name_safetensors_inside_the_directory(copy, target, message):
    names = list(load_file(copy / "model.safetensors"))
    places = {name: "model.safetensors" for name in names} | {names[0]: target}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert message in refusal(copy)


def test_an_index_that_is_none_and_one_that_lies_are_refused(copy):
    index = copy / "model.safetensors.index.json"
    index.write_text("[]")
    assert "is not an index" in refusal(copy)
    names = list(load_file(copy / "model.safetensors"))
    places = {name: "model.safetensors" for name in [*names, "model.extra"]}
    index.write_text(json.dumps({"weight_map": places}))
    assert "model.extra is not in model.safetensors, where the index puts it" in refusal(copy)


def test_two_models_in_one_directory_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    first, second = copy / "first.safetensors", copy / "second.safetensors"
    save_file(weights, first)
    save_file({"model.norm.weight": weights["model.norm.weight"]}, second)
    places = {name: first.name for name in weights} | {"model.norm.weight": second.name}
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    message = refusal(copy)
    assert "it holds two models: model.safetensors" in message
    assert "model.norm.weight in first.safetensors and second.safetensors" in message
    (copy / "model.safetensors").unlink()
    index.unlink()
    assert "first.safetensors, second.safetensors hold is not known" in refusal(copy)


def test_an_adapter_beside_a_config_is_not_a_model(copy):
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    assert "adapter_model.safetensors holds adapters of peft" in refusal(copy)


def test_pickles_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pickles, which can run any code" in refusal(copy)


def test_unsupported_settings_are_listed_together_with_broken_files(copy):
    def change(config):
        config["text_config"]["use_sliding_window"] = True
        config["pad_token_id"] = None  # Then the released id, which is far outside.
        config["text_config"]["rope_scaling"]["rope_type"] = "yarn"
        del config["vision_config"]["hidden_size"]

    edit(copy / "config.json", change)
    (copy / "model.safetensors").unlink()
    message = refusal(copy)
    assert "use_sliding_window must be False, got True" in message
    assert "pad_token_id 151643 is outside the vocabulary of 380" in message
    assert "rope_type must be 'default', got 'yarn'" in message
    assert "vision_config.hidden_size is missing" in message
    assert "no model.safetensors" in message


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4932307584\n"


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_called_that(copy, tmp_path, capsys, file):
    if file == "tokenizer.json":
        (copy / "tokenizer.model").unlink()
    (copy / file).write_bytes(POINTER)
    assert load.main(["--hf_dir", str(copy), "--out", str(tmp_path / "work")]) == 1
    message = capsys.readouterr().err
    assert f"{file} is a pointer of Git LFS" in message and "git lfs pull" in message
    assert "missing" not in message


def test_an_index_may_point_at_pointers(copy):
    names = list(load_file(copy / "model.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").write_bytes(POINTER)
    assert "1 problem:" in refusal(copy) and "model.safetensors is a pointer" in refusal(copy)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"[]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_an_odd_header_is_refused_as_damaged(copy, header):
    length = len(header).to_bytes(8, "little")
    (copy / "model.safetensors").write_bytes(length + header + bytes(4))
    message = refusal(copy)
    assert "model.safetensors has a damaged header" in message and "missing" not in message


def test_tables_that_follow_from_the_config_are_passed_over(params, copy):
    def change(weights):
        weights["model.rotary_emb.inv_freq"] = np.ones(8, np.float32)
        weights["visual.rotary_pos_emb.inv_freq"] = np.ones(4, np.float32)
        name = "audio_tower.positional_embedding.positional_embedding"
        weights[name] = np.ones((1500, 40), np.float32)

    rewrite(copy, change)
    assert equal(load.load_params(copy)[0], params)


def test_what_stands_in_the_place_of_a_checkpoint_is_called_by_its_name(copy, tmp_path):
    def said(path):
        with pytest.raises(FileNotFoundError) as error:
            load.open_checkpoint(path)
        return str(error.value)

    assert "There is no directory" in said(tmp_path / "gone")
    assert "hf download Qwen/Qwen2.5-Omni-7B" in said("Qwen/Qwen2.5-Omni-7B")
    assert "is a file" in said(copy / "model.safetensors")
    cases = {
        "adapter_config.json": "holds adapters of peft",
        "model.json": "is a checkpoint of this project",
        "snapshots/0f1e/config.json": "snapshots/0f1e, which is in it",
        "model.gguf": "holds model.gguf, which is GGUF",
    }
    for number, (file, want) in enumerate(cases.items()):
        path = tmp_path / str(number) / file
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        assert want in said(tmp_path / str(number))
    # A training run has settings in a config.json.
    (tmp_path / "1" / "config.json").write_text('{"stage": "sft"}')
    assert "is a checkpoint of this project" in said(tmp_path / "1")


def test_a_directory_without_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        load.load_params(tmp_path)
