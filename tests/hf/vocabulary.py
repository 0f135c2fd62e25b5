"""A vocabulary with the ids of tests/models/batches.py, for checkpoints of that network."""

from pathlib import Path

import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from saber_jax.data.tokenizer import HuggingFaceTokenizer
from tests.models.batches import CONFIG, IDS

SPECIALS = {
    "<|endoftext|>": IDS.pad,
    "<|im_start|>": IDS.im_start,
    "<|im_end|>": IDS.eos,
    "<|AUDIO|>": IDS.audio,
    "<|audio_bos|>": IDS.audio_bos,
    "<|audio_eos|>": IDS.audio_eos,
    "<|vision_bos|>": IDS.vision_bos,
    "<|vision_eos|>": IDS.vision_eos,
    "<|IMAGE|>": IDS.image,
    "<|VIDEO|>": IDS.video,
}


def write(directory: Path) -> HuggingFaceTokenizer:
    """Writes tokenizer.json: the placeholders, and words `w10`, `w11` and so on."""
    words = {f"w{id}": id for id in range(len(SPECIALS), CONFIG.text.vocab)}
    model = models.WordLevel({**SPECIALS, **words}, unk_token="<|endoftext|>")
    whole = tokenizers.Tokenizer(model)
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    whole.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIALS])
    directory.mkdir(parents=True, exist_ok=True)
    whole.save(str(directory / "tokenizer.json"))
    return HuggingFaceTokenizer(directory / "tokenizer.json")
