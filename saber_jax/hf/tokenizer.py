"""A vocabulary as the files that transformers reads."""

import json
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from saber_jax.data.tokenizer import SPACE, SPECIALS, SentencePieceTokenizer, Tokenizer
from saber_jax.hf.settings import TOKENS
from saber_jax.models.config import SaberConfig
from saber_jax.runs.files import read_bytes

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


def check_tokenizer(tokenizer: Tokenizer, cfg: SaberConfig) -> None:
    """Raises ValueError if a vocabulary is not the one that a config.json is about.

    Clips are written into a conversation with the ids of the vocabulary; transformers looks for
    those of the config, and would find no clip, or words in the place of one.
    """
    wrong = [
        f"{NAMED[f'{name}_token']} is {there}, but {TOKENS[name]} {here}"
        for name in (key.removesuffix("_token") for key in NAMED)
        if (there := tokenizer.id(NAMED[f"{name}_token"])) != (here := getattr(cfg.tokens, name))
    ]
    if tokenizer.vocab_size > cfg.text.vocab:
        wrong.append(f"it has {tokenizer.vocab_size} ids, but vocab_size is {cfg.text.vocab}")
    if wrong:
        raise ValueError(
            f"{tokenizer.path} belongs to another model than config.json: {'; '.join(wrong)}. Take "
            "both from one checkpoint."
        )


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Writes FILES; a SentencePiece model is converted to tokenizer.json and copied as well."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        convert(tokenizer.path).save(str(out / "tokenizer.json"))
        (out / "tokenizer.model").write_bytes(read_bytes(tokenizer.path))
    else:
        (out / "tokenizer.json").write_bytes(read_bytes(tokenizer.path))
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
    source = sentencepiece.SentencePieceProcessor(model_proto=read_bytes(path))
    pieces = [source.id_to_piece(token) for token in range(source.vocab_size())]
    first_byte = source.piece_to_id("<0x00>")
    symbols = pieces[1:first_byte]
    learned = [p for i, p in enumerate(pieces) if i >= first_byte + 256 and not source.is_unused(i)]
    ranks = [-source.get_score(source.piece_to_id(piece)) for piece in learned]
    if not source.is_byte(first_byte) or ranks != list(range(len(learned))):
        raise ValueError(
            f"{path} is not a byte-pair vocabulary with byte fallback, as data_prep.build trains "
            "them. Use such a one, or give a tokenizer.json."
        )
    model = models.BPE(
        vocab={piece: token for token, piece in enumerate(pieces)},
        merges=_merges(learned),
        unk_token=pieces[0],
        byte_fallback=True,
    )
    converted = tokenizers.Tokenizer(model)
    converted.normalizer = normalizers.Replace(" ", SPACE)
    converted.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    for symbol in symbols:
        added = AddedToken(symbol, normalized=False, special=symbol in SPECIALS)
        (converted.add_special_tokens if added.special else converted.add_tokens)([added])
    return converted


def _merges(learned: list[str]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the earliest learned first.

    SentencePiece stores no merges: it joins whatever gives the best-ranked piece.
    """
    known = set(learned)
    return [
        (piece[:cut], piece[cut:])
        for piece in learned
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
