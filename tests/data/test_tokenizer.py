import pickle
import random

import pytest
import tokenizers

from saber_jax.data import records, sed
from saber_jax.data.tokenizer import (
    SPECIALS,
    SentencePieceTokenizer,
    copy,
    load_beside,
    load_tokenizer,
    train_sentencepiece,
)
from saber_jax.runs import checksums

HEADINGS = [sed.heading(field) for field in records.FIELDS]
TEXTS = [
    "[video_desc] A man in a red shirt stands in a kitchen.\n[facial_exp_desc] He smiles broadly.",
    "[video_desc] 一个穿红色上衣的男人站在厨房里。\n[facial_exp_desc] 他微笑，眉毛上扬。",
    sed.prompt_text("en", True, True),
    sed.prompt_text("zh", True, True),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> SentencePieceTokenizer:
    out = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    return train_sentencepiece(TEXTS, out, vocab_size=400, symbols=HEADINGS)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level BPE without merges but with the special tokens of Qwen2.5-Omni."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(list(SPECIALS))
    out = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    model.save(str(out))
    return load_tokenizer(out.parent)


@pytest.fixture(params=["small", "byte_level"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def random_text(rng: random.Random) -> str:
    kinds = [
        lambda: chr(rng.randrange(0x250)),
        lambda: chr(rng.randrange(0x4E00, 0x9FFF)),
        lambda: chr(rng.randrange(0x1F300, 0x1F700)),
        lambda: rng.choice(["\u2581", " ", "   ", "\n", "\n\n", "\t", "\x00", "\u0301", "\ufeff"]),
        lambda: rng.choice(["kitchen", "红色", "<0x41>", "<unk>", "<s>", "<unused_3>", "[video"]),
        lambda: rng.choice([*SPECIALS, *HEADINGS]),
    ]
    return "".join(rng.choice(kinds)() for _ in range(rng.randrange(12)))


def test_any_text_comes_back_exactly(tokenizer):
    rng = random.Random(0)
    for text in [*TEXTS, *(random_text(rng) for _ in range(3000))]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_around_a_special_token_is_encoded_as_if_alone(tokenizer):
    rng = random.Random(1)
    for _ in range(500):
        left, right = random_text(rng), random_text(rng)
        middle = rng.choice(SPECIALS)
        parts = [*tokenizer.encode(left), tokenizer.id(middle), *tokenizer.encode(right)]
        assert tokenizer.encode(left + middle + right) == parts


def test_a_heading_is_one_token_of_the_small_vocabulary(small):
    for heading in HEADINGS:
        assert small.encode(f"a {heading} b").count(small.id(heading)) == 1


def test_special_tokens_have_the_ids_the_tiny_model_expects(small):
    assert [small.id(special) for special in SPECIALS] == list(range(1, 12))
    assert small.vocab_size == 400


def test_the_same_texts_give_the_same_file(small, tmp_path):
    again = train_sentencepiece(TEXTS, tmp_path / "again.model", vocab_size=400, symbols=HEADINGS)
    assert again.path.read_bytes() == small.path.read_bytes()


@pytest.mark.parametrize(
    "texts", [["a"], ["你好"], ["word " * 50], [chr(0x4E00 + i) for i in range(999)], ["^-]\\["]]
)
def test_the_size_is_exact_however_little_or_varied_the_text(texts, tmp_path):
    made = train_sentencepiece(texts, tmp_path / "t.model", vocab_size=320, symbols=HEADINGS)
    assert made.vocab_size == 320
    text = "unseen 你 text"
    assert made.decode(made.encode(text)) == text


def test_a_vocabulary_without_room_or_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size must exceed"):
        train_sentencepiece(TEXTS, tmp_path / "t.model", vocab_size=270, symbols=HEADINGS)
    with pytest.raises(ValueError, match="empty"):
        train_sentencepiece(["\n"], tmp_path / "t.model", vocab_size=400, symbols=HEADINGS)


def test_a_missing_token_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"no token '<\|nothing\|>'"):
        tokenizer.id("<|nothing|>")


def test_tokenizers_travel_to_other_processes(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert copy.path == tokenizer.path


def test_the_size_of_a_released_vocabulary_counts_special_tokens(byte_level):
    assert byte_level.vocab_size == 256 + len(SPECIALS)


def test_loading_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model or tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(ValueError, match=r"vocab\.txt"):
        load_tokenizer(tmp_path / "vocab.txt")


def test_a_changed_bit_is_named_also_where_the_vocabulary_loads(small, tmp_path, capsys):
    path = copy(small.path, tmp_path)
    assert load_beside(tmp_path).vocab_size == 400 and not capsys.readouterr().err
    data = path.read_bytes()
    path.write_bytes(data.replace(b"[video_desc]", b"[video_desb]"))
    with pytest.raises(ValueError, match=r"tokenizer\.model is damaged"):
        load_tokenizer(tmp_path)
    checksums.beside(path).unlink()
    assert load_beside(tmp_path).vocab_size == 400  # As of earlier versions, or written by hand.
    assert "changed bits in it go unnoticed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00 no vocabulary"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be used as a vocabulary"):
        load_tokenizer(path)
