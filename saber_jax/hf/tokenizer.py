"""A vocabulary as the files that transformers reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers

from saber_jax.data.tokenizer import SPACE, SPECIALS, SentencePieceTokenizer, Tokenizer

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")

# Names under which the omni processor of transformers looks these tokens up.
NAMED = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Writes FILES; a SentencePiece model is converted to tokenizer.json and copied as well."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        convert(tokenizer.path).save(str(out / "tokenizer.json"))
        shutil.copyfile(tokenizer.path, out / "tokenizer.model")
    else:
        shutil.copyfile(tokenizer.path, out / "tokenizer.json")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": NAMED,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def convert(path: Path) -> tokenizers.Tokenizer:
    """The same vocabulary with the same ids for the `tokenizers` library.

    Raises ValueError for a SentencePiece model of another kind than the ones trained here.
    """
    generated: Any = sentencepiece_model_pb2  # Type checkers see no names in it.
    proto = generated.ModelProto.FromString(path.read_bytes())
    trainer, kinds = proto.trainer_spec, generated.ModelProto.SentencePiece
    if trainer.model_type != trainer.UNIGRAM or not trainer.byte_fallback:
        raise ValueError(f"{path} must be a unigram model with byte fallback to be converted.")
    learned = [p.score for p in proto.pieces if p.type == kinds.NORMAL]
    # Bytes and unused ids must not win over learned pieces, nor lower the cost of the unknown.
    lowest = min(learned)
    scores = [
        (piece.piece, piece.score if piece.type == kinds.NORMAL else lowest)
        for piece in proto.pieces
    ]
    model = models.Unigram(scores, unk_id=trainer.unk_id, byte_fallback=True)
    converted = tokenizers.Tokenizer(model)
    converted.normalizer = normalizers.Replace(" ", SPACE)
    converted.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    symbols = [p.piece for p in proto.pieces if p.type == kinds.USER_DEFINED]
    for symbol in symbols:
        added = AddedToken(symbol, normalized=False, special=symbol in SPECIALS)
        (converted.add_special_tokens if added.special else converted.add_tokens)([added])
    return converted
