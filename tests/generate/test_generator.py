import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from saber_jax import sharding
from saber_jax.data import packing, sed
from saber_jax.data.examples import Response, encode_record, size_of
from saber_jax.data.records import FIELDS, Record
from saber_jax.data.tokenizer import SPECIALS, load_tokenizer, train_sentencepiece
from saber_jax.data.withhold import withhold
from saber_jax.generate import __main__ as generate_main
from saber_jax.generate import decoding
from saber_jax.generate import generator as generating
from saber_jax.models import saber
from saber_jax.models.config import saber_config
from saber_jax.train import checkpoint

NEW_TOKENS = 6


def _record(seed: int, *, frames: int, samples: int, language: str = "en") -> Record:
    rng = np.random.default_rng(seed)
    return Record(
        clip_id=f"clip{seed}",
        language=language,
        frames=rng.integers(0, 256, (frames, 56, 84, 3), np.uint8),
        seconds_per_grid=0.5,
        audio=rng.integers(-9000, 9000, samples, np.int16),
        annotation=dict.fromkeys(FIELDS, "text"),
        labels={},
        provenance={},
    )


RECORDS = [
    _record(1, frames=4, samples=9000),
    _record(2, frames=2, samples=0, language="zh"),
    _record(3, frames=0, samples=40_000),
]

# Its video goes on after its sound, beyond the positions of the short question that follows both.
INTERLEAVED = dataclasses.replace(
    _record(7, frames=4, samples=9000),
    seconds_per_grid=1.9,
    audio_in_video=True,
    question="Sarcasm?",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [sed.prompt_text(language, True, True) for language in ("en", "zh")]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    headings = [sed.heading(field) for field in FIELDS]
    vocab = saber_config("tiny").text.vocab
    return train_sentencepiece(texts, path, vocab_size=vocab, symbols=headings)


@pytest.fixture(scope="module")
def params():
    # Drawn with NumPy: saber.init takes longer to compile than all of these tests to run.
    rng = np.random.default_rng(8)  # The third token of the first answer is in no other.
    return jax.tree.map(
        lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32),
        saber.abstract(saber_config("tiny")),
    )


def _generator(params, tokenizer):
    generator = generating.Generator(
        params, saber_config("tiny"), tokenizer, max_new_tokens=NEW_TOKENS, batch_size=2
    )
    # One shape for all tests, so one compilation.
    generator.reserve(map(generating.clip_size, RECORDS))
    return generator


@pytest.fixture(scope="module")
def uncached(params, tokenizer):
    """Greedy tokens for RECORDS and INTERLEAVED without a kv cache: the whole sequence is run
    again for every token."""
    records = [*RECORDS, INTERLEAVED]
    examples = [encode_record(record, tokenizer, responses=()) for record in records]
    sizes = [size_of(example) for example in examples]
    budget = packing.Budget(
        length=max(size.text for size in sizes) + NEW_TOKENS,
        patches=max(size.patches for size in sizes),
        chunks=max(size.chunks for size in sizes),
        targets=NEW_TOKENS,
        segments=1,
    )

    @jax.jit
    def logits(batch):
        return saber.logits(params, saber.hidden(params, batch, saber_config("tiny")))

    tokens: list[list[int]] = [[] for _ in records]
    for step in range(NEW_TOKENS):
        rows = [
            [dataclasses.replace(example, responses=(_response(said),))]
            for example, said in zip(examples, tokens, strict=True)
        ]
        scores = logits(packing.pack_rows(rows, budget))
        for row, said in enumerate(tokens):
            said.append(int(scores[row, sizes[row].text + step - 1].argmax()))
    return tokens


@pytest.fixture(scope="module")
def greedy(uncached):
    return uncached[: len(RECORDS)]


def _response(tokens: list[int]) -> Response:
    ids = np.array(tokens, np.int32)
    return Response(tokens=ids, sections=np.ones_like(ids))


def test_greedy_equals_the_full_forward_repeated_for_every_token(params, tokenizer, greedy):
    answers = _generator(params, tokenizer).respond(RECORDS)
    assert answers == [tokenizer.decode(tokens) for tokens in greedy]
    assert len(set(answers)) == len(answers)


def test_an_answer_goes_on_from_the_text_where_frames_lie_later(params, tokenizer, uncached):
    prompt = encode_record(INTERLEAVED, tokenizer, responses=()).prompt
    assert prompt.next_position <= prompt.positions.max()
    answers = _generator(params, tokenizer).respond([RECORDS[0], INTERLEAVED])
    assert answers == [tokenizer.decode(uncached[i]) for i in (0, len(RECORDS))]


class _OtherEnd:
    """A tokenizer in which another token ends an answer."""

    def __init__(self, tokenizer, end):
        self._tokenizer, self._end = tokenizer, end
        self.vocab_size, self.path = tokenizer.vocab_size, tokenizer.path
        self.encode, self.decode = tokenizer.encode, tokenizer.decode

    def id(self, special):
        return self._end if special == "<|im_end|>" else self._tokenizer.id(special)


@pytest.mark.parametrize(
    ("mesh", "part"),
    [({"fsdp": 2, "tensor": 1}, (1, 2)), ({"fsdp": 1, "tensor": 2}, (2, 1))],
)
def test_a_mesh_gives_the_same_answers_from_a_cache_in_parts(
    params, tokenizer, greedy, monkeypatch, mesh, part
):
    cfg, mesh = saber_config("tiny"), sharding.make_mesh(data=1, **mesh)
    places = sharding.parameter_shardings(saber.axes(cfg), saber.abstract(cfg), mesh)

    def proceed(params, layers, state, cache, *args, **options):
        keys = cache[0]["k"]
        shapes.append(keys.sharding.shard_shape(keys.shape)[:2])
        return original(params, layers, state, cache, *args, **options)

    original, shapes = decoding.proceed, []
    monkeypatch.setattr(decoding, "proceed", proceed)
    generator = generating.Generator(
        jax.device_put(params, places), cfg, tokenizer, max_new_tokens=NEW_TOKENS, batch_size=2
    )
    generator.reserve(map(generating.clip_size, RECORDS))
    assert generator.respond(RECORDS) == [tokenizer.decode(tokens) for tokens in greedy]
    assert set(shapes) == {part}  # Of two rows and two kv heads.
    shapes.clear()
    assert _sampled(generator, 3) == [[tokenizer.decode(tokens)] * 3 for tokens in greedy]
    assert set(shapes) == {(3 * part[0], part[1])}


COLLECTIVE = re.compile(r"= \w+\[([\d,]*)\]\S* (?:all|reduce|collective)-[a-z]+(?:-start)?\(")


def test_a_token_moves_neither_weights_nor_cache_between_devices():
    cfg, new = saber_config("tiny"), 4
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=2)
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    cache = sharding.cache_sharding(cfg.text.kv_heads, mesh)

    def shaped(shape, dtype, place=rows):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    params = jax.tree.map(
        lambda leaf, place: shaped(leaf.shape, leaf.dtype, place),
        saber.abstract(cfg),
        saber.shardings(cfg, mesh),
    )
    heads, size = cfg.text.kv_heads, cfg.text.head_dim
    slots = {"prompt_": 64, "": new}
    layer = {f"{of}k": shaped((2, heads, size, n), jnp.float32, cache) for of, n in slots.items()}
    layer |= {f"{of}v": shaped((2, heads, n, size), jnp.float32, cache) for of, n in slots.items()}
    numbers = ("tokens", "positions", "first", "begun", "counts")
    state = {name: shaped((2,), jnp.int32) for name in numbers}
    state |= {"slot": shaped((), jnp.int32, everywhere), "finished": shaped((2,), bool)}
    state |= {"answers": shaped((2,), jnp.uint32)}
    one = shaped((), jnp.int32, everywhere)
    program = decoding.Program(
        cfg=cfg,
        dtype=jnp.float32,
        greedy=True,
        prompt_slots=64,
        max_new_tokens=new,
        samples=1,
        max_frame_patches=None,
        cache=cache,
    )
    compiled = decoding.proceed.lower(
        params,
        None,
        state | {"out": shaped((2, new), jnp.int32)},
        [layer] * cfg.text.layers,
        one,
        one,
        decoding.TokenChoice(one, one, one, one, one),
        program=program,
    ).compile()
    moved = [
        int(np.prod([int(n) for n in shape.split(",") if n]))
        for shape in COLLECTIVE.findall(compiled.as_text())
    ]
    assert moved and max(moved) <= 2 * cfg.text.width  # The activations of two tokens.


def test_an_answer_stops_before_the_end_token_and_other_rows_go_on(params, tokenizer, greedy):
    end = greedy[0][2]
    assert end not in greedy[0][:2] + greedy[1]
    answers = _generator(params, _OtherEnd(tokenizer, end)).respond(RECORDS[:2])
    assert answers == [tokenizer.decode(greedy[0][:2]), tokenizer.decode(greedy[1])]


def test_a_prompt_takes_the_place_of_an_answer_that_has_ended(
    params, tokenizer, greedy, monkeypatch
):
    def admit(params, batch, source, answers, state, *args, **options):
        ended.append((state["finished"].tolist(), source.tolist()))
        return original(params, batch, source, answers, state, *args, **options)

    original, ended = decoding.admit, []
    monkeypatch.setattr(decoding, "admit", admit)
    end = greedy[0][2]
    generator = generating.Generator(
        params,
        saber_config("tiny"),
        _OtherEnd(tokenizer, end),
        max_new_tokens=NEW_TOKENS,
        batch_size=2,
        prefill=1,
    )
    order = [1, 0, 0, 2, 1, 0]
    answers = generator.respond([RECORDS[i] for i in order])
    said = [greedy[0][:2], *greedy[1:]]
    assert answers == [tokenizer.decode(said[i]) for i in order]
    # Two places, of which the second is given away twice while the first answer still grows.
    assert ended[2:4] == [([False, True], [[-1, 0]])] * 2


def test_ids_that_the_tokenizer_does_not_know_are_never_generated(params, tokenizer, greedy):
    small = _OtherEnd(tokenizer, tokenizer.id("<|im_end|>"))
    small.vocab_size = min(max(tokens) for tokens in greedy)
    spoken = []
    small.decode = lambda tokens: spoken.extend(tokens) or ""
    _generator(params, small).respond(RECORDS)
    assert len(spoken) == NEW_TOKENS * len(RECORDS)
    assert max(spoken) < small.vocab_size


def test_streamed_texts_grow_into_the_answer(params, tokenizer, monkeypatch):
    monkeypatch.setattr(generating, "STREAM_TOKENS", 2)
    seen: dict[int, list[str]] = {}
    generator = _generator(params, tokenizer)
    answers = generator.respond(
        RECORDS, on_text=lambda row, text: seen.setdefault(row, []).append(text)
    )
    assert [seen[row][-1] for row in range(3)] == answers == generator.respond(RECORDS)
    assert [len(seen[row]) for row in range(3)] == [NEW_TOKENS // 2] * 3


def test_withholding_in_the_call_equals_withholding_the_record(params, tokenizer):
    generator = _generator(params, tokenizer)
    hidden = [withhold(record, "audio") for record in RECORDS]
    assert generator.respond(RECORDS, withhold="audio") == generator.respond(hidden)
    assert generator.respond(RECORDS, withhold="audio")[0] != generator.respond(RECORDS)[0]


def test_sampling_depends_on_the_seed_and_the_place_in_the_call(params, tokenizer):
    generator = _generator(params, tokenizer)
    warm = decoding.Sampling(temperature=1.0, top_p=0.9, seed=3)
    same = [RECORDS[0]] * 3
    answers = generator.respond(same, sampling=warm)
    assert answers == generator.respond(same, sampling=warm)
    assert len(set(answers)) == 3  # The third is alone in its batch, in the row of the first.
    other = dataclasses.replace(warm, seed=4)
    assert not set(answers) & set(generator.respond(same, sampling=other))


WARM = decoding.Sampling(temperature=1.0, seed=3)


def _sampled(generator, samples, sampling=decoding.GREEDY):
    """`samples` answers to every one of RECORDS, asked in batches of two."""
    numbered = [(0, RECORDS[:2]), (2, RECORDS[2:])]
    batches = generator.sample_batches(numbered, samples, sampling=sampling)
    return [answers for batch in batches for answers in batch]


def test_answers_that_share_a_prompt_are_what_separate_prompts_give(params, tokenizer, greedy):
    answers = _sampled(_generator(params, tokenizer), 3)
    assert answers == [[tokenizer.decode(tokens)] * 3 for tokens in greedy]


def test_a_prompt_is_kept_once_for_all_of_its_answers(params, tokenizer, monkeypatch):
    def proceed(params, layers, state, cache, *args, **options):
        shapes.append({name: len(kept) for name, kept in cache[0].items()})
        return original(params, layers, state, cache, *args, **options)

    original, shapes = decoding.proceed, []
    monkeypatch.setattr(decoding, "proceed", proceed)
    _sampled(_generator(params, tokenizer), 3)
    assert shapes == [{"prompt_k": 2, "prompt_v": 2, "k": 6, "v": 6}] * 2


def test_answers_to_one_prompt_differ_and_do_not_depend_on_the_call(params, tokenizer):
    generator = _generator(params, tokenizer)
    answers = _sampled(generator, 3, WARM)
    assert [len(set(of_record)) for of_record in answers] == [3] * 3
    (again,) = generator.sample_batches([(2, RECORDS[2:])], 3, sampling=WARM)
    assert again == answers[2:]


def test_a_tiny_top_p_takes_the_likeliest_token(params, tokenizer):
    generator = _generator(params, tokenizer)
    narrow = decoding.Sampling(temperature=1.0, top_p=1e-6)
    assert generator.respond(RECORDS, sampling=narrow) == generator.respond(RECORDS)


def test_after_reserving_nothing_is_compiled_again(params, tokenizer):
    generator = _generator(params, tokenizer)
    generator.respond(RECORDS)
    before = decoding.admit._cache_size()
    for record in RECORDS:
        generator.respond([record])
    assert decoding.admit._cache_size() == before


def test_a_missing_clip_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.mp4"):
        generating.record_of_clip(tmp_path / "gone.mp4", "en", None)


def test_a_picture_is_a_record_of_one_frame_without_sound(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "face.png")
    record = generating.record_of_clip(tmp_path / "face.png", "en", {"mode": "saber_release"})
    assert record.frames.shape == (1, 56, 84, 3) and len(record.audio) == 0
    assert record.provenance["sampling"]["mode"] == "saber_release"


def test_a_directory_without_a_checkpoint_is_an_error_on_one_line(tmp_path, capsys):
    code = generate_main.main(["--checkpoint", str(tmp_path), "--video", "clip.mp4"])
    assert code == 1
    assert "is not a checkpoint" in capsys.readouterr().err


def test_what_is_given_instead_of_a_checkpoint_gets_the_command_to_type(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen2_5OmniModel"]}')
    with pytest.raises(FileNotFoundError, match=r"saber_jax\.hf\.load --hf_dir"):
        checkpoint.read_model_file(tmp_path)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "model.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"Give one that it contains: .*sft"):
        checkpoint.read_model_file(tmp_path)


def test_special_tokens_are_the_ones_of_the_model(tokenizer):
    cfg = saber_config("tiny")
    assert tokenizer.id(SPECIALS[2]) == cfg.tokens.eos
    assert load_tokenizer(tokenizer.path).vocab_size == cfg.text.vocab


def test_a_record_with_a_question_of_its_own_is_asked_that(params, tokenizer):
    question = "Is this sarcasm? Answer yes or no. " * 12  # More words than were reserved.
    asked = dataclasses.replace(RECORDS[0], question=question)
    prompt = encode_record(asked, tokenizer, responses=()).prompt.tokens
    assert question.split()[0] in tokenizer.decode(prompt)
    assert len(prompt) > len(encode_record(RECORDS[0], tokenizer, responses=()).prompt.tokens)
    generator = _generator(params, tokenizer)
    usual, special = generator.respond([RECORDS[0], asked])
    assert usual != special
    assert usual == generator.respond([RECORDS[0]])[0]
