"""Checkpoint directories: export and load are inverse, and everything wrong is refused at once."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saber_jax.data.sed import heading
from saber_jax.data.tokenizer import SPECIALS, train_sentencepiece
from saber_jax.hf import digests, export, load
from saber_jax.hf.config import from_hf, to_hf
from saber_jax.hf.tokenizer import convert
from saber_jax.models import saber
from saber_jax.models.config import saber_config
from tests.models import batches

# With the vocabulary below, and the ids that it gives to placeholders.
CONFIG = dataclasses.replace(
    batches.CONFIG,
    text=dataclasses.replace(batches.CONFIG.text, vocab=380),
    tokens=saber_config("tiny").tokens,
)

TEXTS = [
    "A woman smiles, but her voice trembles.\nShe looks away.",
    "  two  spaces, a tab\tand an emoji 😀 ",
    "他说他很开心，可是声音里有悲伤。",
    f"<|im_start|>user\n<|AUDIO|>hello<|im_end|>\n{heading('video_desc')} a man laughs",
]


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), saber.abstract(CONFIG)
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    out = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    headings = [heading("video_desc")]
    return train_sentencepiece(TEXTS * 20, out, vocab_size=380, symbols=headings)


@pytest.fixture(scope="module")
def exported(params, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "hf"
    export.export(params, CONFIG, out, tokenizer)
    return out


@pytest.fixture
def copy(exported, tmp_path):
    """An export that a test may damage, as if it came from elsewhere: without digests."""
    out = shutil.copytree(exported, tmp_path / "hf")
    (out / digests.FILE).unlink()
    return out


def equal(got, want):
    saber.check_tree(want, got)
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), got, want)))


@pytest.mark.parametrize("name", ["tiny", "3b", "7b"])
def test_config_json_survives(name):
    config = saber_config(name)
    assert from_hf(json.loads(json.dumps(to_hf(config, dtype="float32")))) == config


def test_both_places_of_the_rotary_settings_are_read():
    config = to_hf(CONFIG, dtype="float32")
    text = config["text_config"]
    del text["rope_scaling"]
    text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), "mrope_section": [2, 3, 3]}
    assert from_hf(config) == CONFIG


def test_export_then_load_is_bit_identical(params, exported):
    loaded, config = load.load_params(exported)
    assert config == CONFIG
    assert equal(loaded, params)


def test_the_commands_load_and_export_without_changing_a_bit(params, exported, tmp_path, capsys):
    work, again = tmp_path / "work", tmp_path / "again"
    assert load.main(["--hf_dir", str(exported), "--out", str(work)]) == 0
    assert load.main(["--hf_dir", str(exported), "--out", str(work)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert export.main(["--checkpoint", str(work), "--out", str(again)]) == 0
    assert "exporting: 100%" in capsys.readouterr().err
    assert equal(load.load_params(again)[0], params)
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in exported.iterdir())
    assert export.main(["--checkpoint", str(tmp_path), "--out", str(again)]) == 1
    assert load.main(["--hf_dir", str(tmp_path), "--out", str(tmp_path / "x")]) == 1
    assert load.main(["--hf_dir", str(exported), "--out", str(again)]) == 1


def test_a_tokenizer_of_another_model_is_refused(copy, tmp_path, capsys):
    edit(copy / "config.json", lambda config: config.update(audio_token_index=3))
    assert load.main(["--hf_dir", str(copy), "--out", str(tmp_path / "work")]) == 1
    assert "<|AUDIO|> is 4, but audio_token_index 3" in capsys.readouterr().err


def test_shards_and_the_omni_layout_load_alike(params, exported, tmp_path):
    out = tmp_path / "sharded"
    export.export(params, CONFIG, out, shard_bytes=300_000)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert equal(load.load_params(out)[0], params)
    omni = tmp_path / "omni"
    omni.mkdir()
    config = json.loads((exported / "config.json").read_text())
    (omni / "config.json").write_text(json.dumps({"thinker_config": config}))
    weights = {f"thinker.{n}": w for n, w in load_file(exported / "model.safetensors").items()}
    weights["talker.x"] = weights["token2wav.y"] = np.zeros(2, np.float32)
    save_file(weights, omni / "model.safetensors")
    assert equal(load.load_params(omni)[0], params)


def test_bfloat16_export_rounds_once(params, tmp_path):
    export.export(params, CONFIG, tmp_path / "hf", dtype="bfloat16")
    loaded, _ = load.load_params(tmp_path / "hf")
    rounded = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    assert equal(loaded, rounded)


def test_a_tied_head_is_the_embedding(copy):
    rewrite(copy, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"missing lm_head\.weight"):
        load.load_params(copy)
    edit(
        copy / "config.json", lambda config: config["text_config"].update(tie_word_embeddings=True)
    )
    text = load.load_params(copy)[0]["text"]
    np.testing.assert_array_equal(text["lm_head"], text["embed"].T)


def test_a_head_that_transformers_would_replace_by_the_embedding_is_refused(copy):
    def tie(config):
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True

    edit(copy / "config.json", tie)
    assert "ties the head to the embedding, but lm_head.weight differs" in refusal(copy)
    rewrite(copy, lambda w: w.update({load.HEAD: w[load.EMBED]}))
    load.open_checkpoint(copy)


def test_a_head_of_its_own_stays_one_in_a_copy_whatever_one_version_says(params, copy, tmp_path):
    """transformers 4 and 5 ask different levels of the config; the file has the last word."""
    edit(copy / "config.json", lambda c: c["text_config"].update(tie_word_embeddings=True))
    export.export_like(params, CONFIG, tmp_path / "out", load.open_checkpoint(copy))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("preprocessor_config.json", {"image_mean": [0.5] * 3}, "image_mean must be [0.48"),
        ("preprocessor_config.json", {"hop_length": "160"}, "hop_length must be 160, got '160'"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize must be True"),
        (
            "processor_config.json",
            {"feature_extractor": {"feature_size": 80}},
            "processor_config.json: feature_extractor.feature_size must be 128, got 80",
        ),
        ("video_preprocessor_config.json", [], None),
        (
            "preprocessor_config.json",
            {"max_pixels": 7, "rescale_factor": 0.00392156862745098},
            None,
        ),
    ],
)
def test_a_processor_that_sees_or_hears_otherwise_is_refused_by_name(copy, file, content, named):
    (copy / file).write_text(json.dumps(content))
    if named is None:
        load.open_checkpoint(copy)
    else:
        assert named in refusal(copy)


def rewrite(directory, change):
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refusal(directory) -> str:
    with pytest.raises(ValueError) as error:
        load.load_params(directory)
    return str(error.value)


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


def test_a_directory_without_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        load.load_params(tmp_path)


def test_export_replaces_an_export_when_told_to_but_no_other_directory(params, copy):
    with pytest.raises(FileExistsError, match="--overwrite to replace it"):
        export.export(params, CONFIG, copy)
    assert (copy / "tokenizer.json").exists()
    export.export(params, CONFIG, copy, overwrite=True)
    assert not (copy / "tokenizer.json").exists()
    (copy / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        export.export(params, CONFIG, copy, overwrite=True)
    assert (copy / "thesis.txt").exists()


def test_the_command_overwrites_when_told_to_only(exported, tmp_path, capsys):
    work, out = tmp_path / "work", tmp_path / "out"
    assert load.main(["--hf_dir", str(exported), "--out", str(work)]) == 0
    command = ["--checkpoint", str(work), "--out", str(out)]
    assert export.main(command) == 0
    before = (out / "config.json").stat().st_mtime_ns
    assert export.main(command) == 1
    assert "is there already" in capsys.readouterr().err
    assert (out / "config.json").stat().st_mtime_ns == before
    assert export.main([*command, "--layout", "omni", "--overwrite"]) == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen2_5_omni"


def test_the_omni_layout_holds_the_thinker_and_no_speech(params, tokenizer, tmp_path):
    out = tmp_path / "omni"
    export.export(params, CONFIG, out, tokenizer, layout="omni", shard_bytes=300_000)
    config = json.loads((out / "config.json").read_text())
    assert config["enable_audio_output"] is False and "talker_config" not in config
    assert config["architectures"] == ["Qwen2_5OmniForConditionalGeneration"]
    places = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(name.startswith("thinker.") for name in places)
    assert equal(load.load_params(out)[0], params)


def test_export_refuses_what_does_not_fit_and_leaves_nothing(params, tmp_path):
    with pytest.raises(ValueError, match="missing text/norm"):
        wrong = params | {"text": {k: v for k, v in params["text"].items() if k != "norm"}}
        export.export(wrong, CONFIG, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"dtype must be auto or one of .* got 'int4'"):
        export.export(params, CONFIG, tmp_path / "hf", dtype="int4")
    with pytest.raises(ValueError, match=r"layout must be one of thinker, omni, got 'talker'"):
        export.export(params, CONFIG, tmp_path / "hf", layout="talker")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [*TEXTS, *SPECIALS, "[video_desc]", "unseen wörds ∑ 龘", ""])
def test_the_converted_tokenizer_gives_the_same_ids_and_text(tokenizer, exported, text):
    converted = convert(tokenizer.path)
    ids = tokenizer.encode(text)
    assert converted.encode(text, add_special_tokens=False).ids == ids
    assert converted.decode(ids, skip_special_tokens=False) == text
    assert (exported / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
