"""The adapters of a LoRA run in peft: the same logits as merged ones, and as ours."""

import dataclasses
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import jax
import peft
import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from saber_jax.hf import check, export, load, names
from saber_jax.models import saber
from saber_jax.models.config import LoraConfig
from saber_jax.train import checkpoint
from tests.hf import reference, vocabulary
from tests.models.batches import CONFIG, Audio, Image, Text, conversation

TALK = conversation(1, Text(3), Image((1, 6, 8)), Audio(150), Text(5))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A HuggingFace directory, and the checkpoint that hf.load makes from it."""
    out = tmp_path_factory.mktemp("base") / "hf"
    weights = reference.weights(reference.thinker())
    params = names.from_disk(lambda entry: weights[entry.name], CONFIG)
    tokenizer = vocabulary.write(out.with_name("vocabulary"))
    export.export(params, CONFIG, out, tokenizer)
    assert load.main(["--hf_dir", str(out), "--out", str(out.with_name("work"))]) == 0
    return out


def adapters_on(base, run, *targets: str):
    """The work directory of a LoRA run, with large random adapters."""
    cfg = dataclasses.replace(CONFIG, lora=LoraConfig(rank=3, alpha=6.0, targets=targets))
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), saber.abstract(cfg)["lora"]
    )
    described = checkpoint.describe_base(run, base.with_name("work"))
    checkpoint.save_params(run, {"lora": adapters}, cfg, base=described)
    vocabulary.write(run)
    return run


def opened(directory):
    kind = Qwen2_5OmniThinkerForConditionalGeneration
    return kind.from_pretrained(directory, attn_implementation="eager").eval()


def logits(model):
    with torch.no_grad():
        return model(**reference.inputs([TALK]), use_cache=False).logits.numpy()


def test_adapters_in_peft_say_what_the_merged_export_says(base, tmp_path):
    run = adapters_on(base, tmp_path / "run", "text/*")
    assert export.main(["--checkpoint", str(run), "--out", str(tmp_path / "merged")]) == 0
    assert export.main(["--checkpoint", str(run), "--out", str(tmp_path / "peft"), "--peft"]) == 0
    want, plain = logits(opened(tmp_path / "merged")), logits(opened(base))
    config = peft.PeftConfig.from_pretrained(tmp_path / "peft")
    assert config.base_model_name_or_path == str(base)
    assert check.problems(tmp_path / "peft") == (2 * 7 * CONFIG.text.layers, [])
    adapted = peft.PeftModel.from_pretrained(opened(base), tmp_path / "peft").eval()
    trained = [name for name, _ in adapted.named_modules() if name.endswith("lora_A.default")]
    assert len(trained) == 7 * CONFIG.text.layers
    assert not any("audio" in name or "visual" in name for name in trained)
    assert np.abs(want - plain).max() > 0.1
    np.testing.assert_allclose(logits(adapted), want, atol=1e-5 * np.abs(want).max())


def test_adapters_of_other_towers_are_not_given_to_peft_which_would_lose_them(
    base, tmp_path, capsys
):
    run = adapters_on(base, tmp_path / "run", "text/*", "audio/conv1/*")
    assert export.main(["--checkpoint", str(run), "--out", str(tmp_path / "p"), "--peft"]) == 1
    assert "['audio_tower.conv1.weight']" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_adapters_on_a_model_that_was_trained_here_need_its_export_named(base, tmp_path, capsys):
    shutil.copytree(base.with_name("work"), tmp_path / "work")
    about = checkpoint.read_model_file(tmp_path / "work")
    del about["source"], about["model"]  # Only hf.load writes the source.
    checkpoint.write_model_file(tmp_path / "work", CONFIG, **about)
    run = adapters_on(tmp_path / "hf", tmp_path / "run", "text/*")
    command = ["--checkpoint", str(run), "--out", str(tmp_path / "peft"), "--peft"]
    assert export.main(command) == 1
    assert "say with --base where" in capsys.readouterr().err
    assert export.main([*command, "--base", "me/stage-1"]) == 0
    config = peft.PeftConfig.from_pretrained(tmp_path / "peft")
    assert config.base_model_name_or_path == "me/stage-1"
