import dataclasses
import itertools

import numpy as np
import pytest

from saber_jax.data.examples import encode_record
from saber_jax.data.records import clip_size
from saber_jax.generate import prompts as generate_prompts
from saber_jax.generate.prompts import Packer, fullest
from tests import synthetic


@pytest.fixture(scope="module")
def examples(tokenizer):
    """Prompts of very different lengths."""
    seconds = [6.0, 0.5, 1.0, 4.0, 0.4]
    records = [synthetic.record(i, seconds=s, frames=4) for i, s in enumerate(seconds)]
    return [encode_record(record, tokenizer, responses=()) for record in records]


@pytest.mark.parametrize("groups", [1, 2])
def test_every_prompt_ends_where_the_batch_says(tokenizer, examples, groups):
    packer = Packer(tokenizer, groups=groups, prompts=6 // groups)
    batch, shape = packer.pack(examples)
    assert batch.text.tokens.shape == (groups * shape.rows, shape.length)
    grouped = batch.text.tokens.reshape(groups, -1)
    for number, example in enumerate(examples):
        group = number // (6 // groups)
        end, length = batch.ends.flat[number], batch.lengths.flat[number]
        np.testing.assert_array_equal(grouped[group, end - length : end], example.prompt.tokens)
    assert batch.lengths.flat[5] == 1  # The sixth prompt does not exist.


def test_short_prompts_share_rows(tokenizer, examples):
    _, shape = Packer(tokenizer, groups=1, prompts=5).pack(examples)
    lengths = [len(example.prompt.tokens) for example in examples]
    assert shape.rows < 5
    assert max(lengths) <= shape.prompt < max(lengths) + 32
    assert sum(lengths) <= shape.rows * shape.length < 1.1 * sum(lengths)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_prefill_reads_the_prompts_that_its_rows_hold(tokenizer, groups, monkeypatch):
    monkeypatch.setattr(generate_prompts, "ROW_SLOTS", 500)
    seconds = np.random.default_rng(1).uniform(1, 6, 24)
    records = [synthetic.record(i, seconds=s, frames=4) for i, s in enumerate(seconds)]
    packer = Packer(tokenizer, groups=groups, prompts=4)
    packer.reserve(map(clip_size, records))
    reserved, ahead = packer.shape, [encode_record(r, tokenizer, responses=()) for r in records]
    assert reserved.rows == max(1, 500 // reserved.length)
    used, slots = 0, 0
    while ahead:
        chosen = packer.choose(ahead[: packer.lookahead])
        assert chosen[0] == 0
        part = [ahead[i] for i in chosen]
        batch, shape = packer.pack(part)
        assert shape == reserved
        share = -(-len(part) // groups)
        told = batch.lengths[:, :share].reshape(-1)[: len(part)]
        np.testing.assert_array_equal(told, [len(e.prompt.tokens) for e in part])
        used, slots = used + told.sum(), slots + batch.text.tokens.size
        ahead = [example for i, example in enumerate(ahead) if i not in chosen]
    # Several groups get equally many prompts, in their order.
    assert used > (0.9 if groups == 1 else 0.7) * slots


@pytest.mark.parametrize("most", [1, 3, 8])
def test_the_fullest_choice_is_that_of_all_choices(most):
    rng = np.random.default_rng(most)
    for _ in range(20):
        sizes = rng.integers(1, 40, 7).tolist()
        capacity = int(rng.integers(sizes[0], 120))
        chosen = fullest(sizes, capacity, most)
        others = itertools.chain.from_iterable(
            itertools.combinations(range(1, 7), n) for n in range(min(most, 7))
        )
        sums = [sizes[0] + sum(sizes[i] for i in other) for other in others]
        assert chosen[0] == 0 and len(set(chosen)) == len(chosen) <= most
        assert sum(sizes[i] for i in chosen) == max(total for total in sums if total <= capacity)


def test_a_choice_is_of_few_and_early_sizes():
    assert fullest([5, 4, 3, 2, 1, 4, 6], 10, 4) == [0, 2, 3]
    assert fullest([5, 5, 5], 10, 2) == [0, 1]


def test_rows_are_of_a_length_that_many_prompts_fill(tokenizer):
    seconds = np.random.default_rng(0).uniform(10, 30, 64)
    records = [synthetic.record(i, seconds=s, frames=4) for i, s in enumerate(seconds)]
    packer = Packer(tokenizer, groups=1, prompts=64)
    packer.reserve(map(clip_size, records))
    examples = [encode_record(record, tokenizer, responses=()) for record in records]
    _, shape = packer.pack(examples)
    used = sum(len(example.prompt.tokens) for example in examples)
    assert shape.rows > 1
    assert used > 0.9 * shape.rows * shape.length


def test_what_was_reserved_is_enough(tokenizer, examples):
    records = [synthetic.record(i, seconds=s) for i, s in enumerate([6.0, 0.5, 1.0, 4.0, 0.4])]
    packer = Packer(tokenizer, groups=1, prompts=3)
    packer.reserve(map(clip_size, records))
    shapes = {packer.pack(examples[first : first + 3])[1] for first in (0, 3)}
    assert len(shapes) == 1


def test_room_only_grows(tokenizer, examples):
    packer = Packer(tokenizer, groups=1, prompts=2)
    _, large = packer.pack(examples[:2])
    _, again = packer.pack(examples[1:3])
    assert dataclasses.astuple(again) >= dataclasses.astuple(large)
    assert again.length == large.length
