"""An export opens in transformers without our code, and says the same there."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from saber_jax.data import chat
from saber_jax.data.tokenizer import train_sentencepiece
from saber_jax.hf import names
from saber_jax.hf.chat_template import CHAT_TEMPLATE
from saber_jax.hf.export import export
from saber_jax.hf.load import load_params
from tests.hf import reference
from tests.models.batches import CONFIG, Audio, Image, Text, conversation

TALK = conversation(1, Text(3), Image((1, 6, 8)), Audio(150), Text(5))


@pytest.fixture(scope="module")
def model():
    return reference.thinker()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "hf"
    texts = ["A woman smiles, but her voice trembles.", "声音里有悲伤。"]
    vocabulary = out.with_name("tokenizer.model")
    tokenizer = train_sentencepiece(texts * 20, vocabulary, vocab_size=330, symbols=())
    weights = reference.weights(model)
    params = names.from_disk(lambda entry: weights[entry.name], CONFIG)
    export(params, CONFIG, out, tokenizer)
    export(params, CONFIG, omni(out), tokenizer, layout="omni")
    return out


def omni(exported):
    """The same export in the layout of the whole model."""
    return exported.with_name("omni")


def logits(model):
    with torch.no_grad():
        return model(**reference.inputs([TALK]), use_cache=False).logits.numpy()


def test_the_export_opens_in_transformers_with_equal_logits(model, exported):
    kind = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    opened, report = kind.from_pretrained(
        exported, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(logits(opened), logits(model))
    assert opened.generation_config.eos_token_id == [CONFIG.tokens.eos, CONFIG.tokens.pad]


def test_the_omni_export_opens_in_transformers_with_equal_logits(model, exported):
    whole = transformers.Qwen2_5OmniForConditionalGeneration.from_pretrained(
        omni(exported), attn_implementation="eager"
    )
    assert not whole.has_talker and whole.speaker_map == {}
    np.testing.assert_array_equal(logits(whole.thinker), logits(model))
    alone, report = transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        omni(exported), output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(logits(alone), logits(model))


@pytest.mark.parametrize("system", [False, True])
def test_the_chat_template_writes_what_we_write(exported, system):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ours = [chat.Message(role="system", content=("Be brief.",))] if system else []
    theirs = [{"role": "system", "content": "Be brief."}] if system else []
    clip, sound = chat.Video(grid=(1, 4, 4), seconds_per_grid=1.0), chat.Audio(frames=100)
    ours += [
        chat.Message(role="user", content=(clip, sound, "What is ", chat.Image(grid=(1, 4, 4)))),
        chat.Message(role="assistant", content=("A face.",)),
        chat.Message(role="user", content=("Whose?",)),
    ]
    asked = [
        {"type": "video", "video": "a.mp4"},
        {"type": "input_audio", "input_audio": {}},
        {"type": "text", "text": "What is "},
        {"type": "image_url", "image_url": {"url": "a.png"}},
    ]
    theirs += [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "A face."},
        {"role": "user", "content": [{"type": "text", "text": "Whose?"}]},
    ]
    written = tokenizer.apply_chat_template(theirs, tokenize=False, add_generation_prompt=True)
    assert written == chat.render(ours)
    closed = tokenizer.apply_chat_template(theirs, tokenize=False)
    assert closed == chat.render(ours, open_answer=False)


def test_the_processor_opens_in_transformers(exported):
    pytest.importorskip("torchvision")
    processor = transformers.AutoProcessor.from_pretrained(omni(exported))
    assert type(processor).__name__ == "Qwen2_5OmniProcessor"
    assert processor.chat_template == CHAT_TEMPLATE


def test_the_config_says_what_both_generations_of_transformers_read(exported):
    config = json.loads((exported / "config.json").read_text())
    text = config["text_config"]
    assert text["rope_theta"] == 1e6 and text["rope_scaling"]["mrope_section"] == [2, 3, 3]
    assert config["tie_word_embeddings"] is text["tie_word_embeddings"] is False
    assert config["vision_start_token_id"] == CONFIG.tokens.vision_bos


def test_what_transformers_saves_loads_bit_for_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, config = load_params(tmp_path)
    assert config == CONFIG
    want = reference.weights(model)
    for entry, array in names.to_disk(loaded, CONFIG):
        np.testing.assert_array_equal(array, want[entry.name], err_msg=entry.name)


def test_the_exported_tokenizer_opens_in_transformers(exported):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    text = "<|im_start|>A woman smiles,  声音.\n<|AUDIO|><|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 2 and ids[-2:] == [4, 3]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.audio_token == "<|AUDIO|>"


def test_the_exported_preprocessor_opens_in_transformers(exported):
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(exported)
    assert (extractor.feature_size, extractor.n_samples) == (128, 4_800_000)
