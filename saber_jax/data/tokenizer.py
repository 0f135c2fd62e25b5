"""Text to token ids: a small SentencePiece vocabulary, or the released one as tokenizer.json."""

import io
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from saber_jax.runs import checksums, files

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|vision_pad|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
)
"""In SentencePiece vocabularies trained here these have the ids 1..11, in this order."""

SPACE = "\u2581"
"""How SentencePiece stores a space; the same character in a text needs care."""


class Tokenizer(Protocol):
    """The interface of a vocabulary."""

    path: Path

    @property
    def vocab_size(self) -> int:
        """Number of ids, the unused ones included."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special strings inside it become their single ids."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special strings included."""
        ...

    def id(self, special: str) -> int:
        """Id of a token of this exact text; ValueError if the vocabulary has none."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a .model or .json file, or tokenizer.model / tokenizer.json of a directory.

    Raises FileNotFoundError if there is none, ValueError for another kind of file, a damaged one or
    a pointer of Git LFS in its place. Damage is certain to be found if the file has checksums.
    """
    path = Path(path)
    candidates = [path / name for name in ("tokenizer.model", "tokenizer.json")]
    if found := [file for file in candidates if files.exists(file)]:
        path = found[0]
    elif path.is_dir():
        raise FileNotFoundError(f"No tokenizer.model or tokenizer.json in {path}.")
    if not files.exists(path):
        raise FileNotFoundError(f"No tokenizer file {path}.")
    with files.opened(path) as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com/spec"):
            raise ValueError(
                f"{path} is a pointer of Git LFS in the place of the file. Fetch the file: `git "
                "lfs pull` in its directory, or `hf download`."
            )
    kinds = {".model": SentencePieceTokenizer, ".json": HuggingFaceTokenizer}
    if path.suffix in kinds:
        checksums.check(path)
        try:
            return kinds[path.suffix](path)
        except Exception as error:  # The libraries raise RuntimeError, Exception itself and others.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} cannot be used as a vocabulary: {reason}") from error
    raise ValueError(f"A tokenizer is a .model or tokenizer.json file, got {path}.")


def load_beside(records: str | Path) -> Tokenizer:
    """The vocabulary in a folder of records. Says on stderr if it has no checksums."""
    tokenizer = load_tokenizer(records)
    if not files.exists(checksums.beside(tokenizer.path)):
        print(checksums.unchecked(tokenizer.path), file=sys.stderr)
    return tokenizer


def copy(source: str | Path, folder: Path) -> Path:
    """Copies a vocabulary to `folder`/tokenizer.model or .json, with checksums."""
    target = folder / f"tokenizer{Path(source).suffix}"
    with checksums.written(target):
        files.write_bytes(target, files.read_bytes(source))
    return target


class SentencePieceTokenizer:
    """A SentencePiece .model file. Decoding an encoded text gives exactly that text back."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._model = sentencepiece.SentencePieceProcessor(model_proto=files.read_bytes(self.path))
        first_byte = self._model.piece_to_id("<0x00>")
        if not self._model.is_byte(first_byte):
            raise ValueError("it was trained without byte_fallback; some texts would be lost.")
        self._bytes = [self._model.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
        # User-defined symbols are the pieces between the unknown one and the bytes.
        before = [token for token in range(first_byte) if not self._model.is_unknown(token)]
        normal = [token for token in before if not self._model.is_control(token)]
        self._symbols = {self._model.id_to_piece(token): token for token in normal}
        # Symbols are split off here, because SentencePiece may join a symbol with its surroundings;
        # so text around a symbol is encoded as if it were alone.
        longest_first = sorted([*self._symbols, SPACE], key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._splitter.split(text):
            if part in self._symbols:
                ids.append(self._symbols[part])
            elif part == SPACE:  # As bytes, or it would come back as a space.
                ids += [self._bytes[value] for value in part.encode()]
            elif part:
                ids += self._model.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(token) for token in ids])

    def id(self, special: str) -> int:
        token = self._model.piece_to_id(special)
        if self._model.id_to_piece(token) != special:
            raise ValueError(_absent(special, self.path))
        return token

    def __reduce__(self):
        return (type(self), (self.path,))


class HuggingFaceTokenizer:
    """A tokenizer.json file, such as the one released with Qwen2.5-Omni."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._model = tokenizers.Tokenizer.from_buffer(files.read_bytes(self.path))
        # One more than the largest id, because the ids may have gaps.
        self._size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def vocab_size(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(token) for token in ids], skip_special_tokens=False)

    def id(self, special: str) -> int:
        token = self._model.token_to_id(special)
        if token is None:
            raise ValueError(_absent(special, self.path))
        return token

    def __reduce__(self):
        return (type(self), (self.path,))


def _absent(special: str, path: Path) -> str:
    return (
        f"The vocabulary {path} has no token {special!r}. Use the tokenizer of the checkpoint, or "
        "train one with data_prep.build, which adds every token the model needs."
    )


def train_sentencepiece(
    texts: Iterable[str], out: str | Path, *, vocab_size: int, symbols: Sequence[str]
) -> SentencePieceTokenizer:
    """Trains a BPE vocabulary of exactly `vocab_size` ids; writes it and its checksums to `out`.

    Ids: 0 unknown, then SPECIALS, then `symbols`, 256 byte pieces, learned pieces. Texts too small
    for the size leave unused ids at the end. Raises ValueError if nothing is left to learn.
    """
    out = Path(out)
    reserved = (*SPECIALS, *symbols)
    learned = vocab_size - 1 - len(reserved) - 256
    if learned < 1:
        raise ValueError(
            f"vocab_size must exceed {vocab_size - learned} (unknown, {len(reserved)} symbols, 256 "
            f"bytes), got {vocab_size}."
        )
    # Two fifths of the learned pieces for single characters: measured best on short descriptions.
    lines = _training_lines(texts, reserved, letters=max(1, learned * 2 // 5))
    if not lines:
        raise ValueError("Cannot train a vocabulary: the texts are empty.")
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=proto,
        model_type="bpe",  # Uniform prose: a fifth fewer tokens than with "unigram".
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars=SPACE,
        byte_fallback=True,
        user_defined_symbols=list(reserved),
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        max_sentence_length=1 << 20,
        num_threads=1,  # Sums in a fixed order: the same texts give the same file.
        minloglevel=2,
    )
    model = proto.getvalue()
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    with checksums.written(out):
        out.write_bytes(_padded(model, vocab_size - size))
    return SentencePieceTokenizer(out)


def _training_lines(texts: Iterable[str], reserved: Sequence[str], letters: int) -> list[str]:
    """Lines without symbols, written with the `letters` commonest characters only.

    The other characters become bytes: Chinese has more than a small vocabulary has room for. So
    does a line break, which is one byte anyway.
    """
    cut = re.compile("|".join(map(re.escape, (*reserved, "\n", SPACE, "\x00", "\t"))))
    parts = [part for text in texts for part in cut.split(text)]
    common = Counter("".join(parts)).most_common(letters)
    if not common:
        return []
    rare = re.compile("[^" + re.escape("".join(letter for letter, _ in common)) + "]")
    return [line for part in parts for line in rare.split(part) if line.strip()]


def _padded(model: bytes, unused: int) -> bytes:
    """Appends pieces of the type "unused" to a serialised ModelProto.

    Written as protobuf bytes (field 1: piece, 2: score, 3: type 5) because the message classes that
    SentencePiece ships demand one particular protobuf release.
    """
    for index in range(unused):
        name = f"<unused_{index}>".encode()
        piece = b"\x0a" + bytes([len(name)]) + name + b"\x15" + bytes(4) + b"\x18\x05"
        model += b"\x0a" + bytes([len(piece)]) + piece
    return model
