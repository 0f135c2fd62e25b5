"""Checkpoint directories: export and load are inverse, and everything wrong is refused at once."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saber_jax.data.tokenizer import SPECIALS
from saber_jax.hf import export, load
from saber_jax.hf.config import from_hf, to_hf
from saber_jax.hf.tokenizer import convert
from saber_jax.models.config import saber_config
from tests.hf.directories import CONFIG, TEXTS, edit, equal, refusal, rewrite


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


def test_a_tensor_without_the_prefix_of_the_others_is_refused(copy):
    """Of `x` and `thinker.x`, one would silently be left out."""

    def add(weights):
        weights |= {f"thinker.{name}": weights.pop(name) for name in list(weights)}
        weights["lm_head.weight"] = 2 * weights["thinker.lm_head.weight"]

    rewrite(copy, add)
    assert "unexpected lm_head.weight: the others begin with thinker." in refusal(copy)


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
        ("preprocessor_config.json", {"chunk_length": 30}, "chunk_length must be 300, got 30"),
        ("preprocessor_config.json", {"padding_value": 1}, "padding_value must be 0.0, got 1"),
        ("preprocessor_config.json", {"padding_side": "left"}, "padding_side must be right"),
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


def test_a_pointer_in_the_place_of_the_processor_s_settings_is_named(copy):
    path = copy / "preprocessor_config.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "preprocessor_config.json is a pointer of Git LFS" in refusal(copy)


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


def test_the_omni_layout_holds_the_thinker_and_no_speech(params, vocabulary, tmp_path):
    out = tmp_path / "omni"
    export.export(params, CONFIG, out, vocabulary, layout="omni", shard_bytes=300_000)
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
def test_the_converted_tokenizer_gives_the_same_ids_and_text(vocabulary, exported, text):
    converted = convert(vocabulary.path)
    ids = vocabulary.encode(text)
    assert converted.encode(text, add_special_tokens=False).ids == ids
    assert converted.decode(ids, skip_special_tokens=False) == text
    assert (exported / "tokenizer.model").read_bytes() == vocabulary.path.read_bytes()
