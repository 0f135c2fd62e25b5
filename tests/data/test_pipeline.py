"""The order of batches, resuming, and what a broken record does."""

import dataclasses
import itertools

import numpy as np
import pytest

from saber_jax.data import pipeline
from saber_jax.data.packing import Budget
from saber_jax.data.pairs import Pair
from saber_jax.data.planning import Plan
from saber_jax.data.tasks import Mixture
from saber_jax.data.transforms import size_of
from tests import synthetic

BUDGET = Budget(length=640, patches=216, chunks=3, targets=384, segments=3)


class Source:
    """A RecordSource of made-up records, one of which may be broken."""

    path, split = "made-up", "train"

    def __init__(self, count: int, broken: int | None = None):
        self._count, self._broken = count, broken

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int):
        if index == self._broken:
            raise OSError("bad block")
        return synthetic.record(index, words=3)

    def index(self, clip_id: str) -> int:
        return int(clip_id.removeprefix("clip"))


@pytest.fixture(scope="module")
def examples(tokenizer):
    return pipeline.Examples(Source(17), tokenizer)


@pytest.fixture(scope="module")
def plan(examples, tmp_path_factory):
    sizes, _ = pipeline.measure(examples, tmp_path_factory.mktemp("sizes") / "sizes.npz")
    return Plan(sizes, BUDGET, seed=3)


def batches(examples, plan, *, steps: int, start: int = 0, threads: int = 2):
    rows = [plan.row(i) for i in range(2 * steps)]
    host = pipeline.HostBatches(examples, rows, plan.budget, 2, start)
    return list(pipeline.stream(host, threads=threads))


def drawn(plan, examples: int, *, skip: int = 0) -> list[int]:
    """`examples` examples in the order of the plan, after the first `skip`."""
    rows = (plan.row(r) for r in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(rows), skip, skip + examples))


def test_an_epoch_visits_every_example_once_and_the_next_in_another_order(plan):
    first, second = drawn(plan, 17), drawn(plan, 17, skip=17)
    assert sorted(first) == sorted(second) == list(range(17))
    assert first != second


def test_resumed_stream_repeats_the_uninterrupted_one_bit_for_bit(examples, plan):
    whole = batches(examples, plan, steps=6)
    rest = batches(examples, plan, steps=6, start=4, threads=1)
    assert len(whole) == 6 and len(rest) == 2
    for expected, got in zip(whole[4:], rest, strict=True):
        for key in expected:
            np.testing.assert_array_equal(expected[key], got[key], err_msg=key)


def test_measured_sizes_survive_in_the_cache(examples, tmp_path):
    sizes, counts = pipeline.measure(examples, tmp_path / "sizes.npz")
    again, counts_again = pipeline.measure(None, tmp_path / "sizes.npz")
    np.testing.assert_array_equal(sizes, again)
    assert counts == counts_again
    assert sizes.shape == (1, 17, 6)
    assert sum(counts.values()) == sizes[0, :, -1].sum()
    assert sizes[0, 0, 0] == size_of(examples[0]).text


def test_every_epoch_draws_its_tasks_anew_and_every_row_still_fits(tokenizer, tmp_path):
    mixture = Mixture({"sed": 1.0, "acoustic_feat": 1.0}, wordings=2, seed=3)
    asked = pipeline.Examples(Source(17), tokenizer, requests=mixture.requests)
    sizes, _ = pipeline.measure(asked, tmp_path / "sizes.npz")
    assert sizes.shape == (4, 17, 6)
    for k, i in [(0, 0), (1, 3), (3, 16)]:
        expected = size_of(asked[i + 17 * k])
        assert tuple(sizes[k, i]) == dataclasses.astuple(expected)
    plan = Plan(sizes, BUDGET, 3, mixture)
    ids = drawn(plan, 17)
    assert sorted(i % 17 for i in ids) == list(range(17))
    assert {i // 17 for i in ids} != {0}
    other = Plan(sizes, BUDGET, 3, Mixture({"sed": 1.0}, seed=3))
    assert other.fingerprint() != plan.fingerprint()
    for batch in batches(asked, plan, steps=3):  # pack_rows raises where a row is too small.
        assert batch["target_weights"].any()


def test_without_a_mixture_everybody_is_asked_for_six_sections(examples, plan):
    sections = [r.sections for i in plan.row(0) for r in examples[i].responses]
    assert all(set(s.tolist()) == set(range(1, 7)) for s in sections)


def test_a_broken_record_is_named_and_ends_the_stream(tokenizer, plan):
    broken = pipeline.Examples(Source(17, broken=5), tokenizer)
    with pytest.raises(RuntimeError, match=r"Record 5 of split 'train' in made-up.*bad block"):
        batches(broken, plan, steps=6)


def test_pairs_are_joined_to_their_clips_and_carry_their_references(tokenizer):
    pair = Pair(clip_id="clip7", chosen="[video_desc] a room", rejected="[video_desc] a person")
    examples = pipeline.Examples(Source(9), tokenizer, [pair])
    assert len(examples) == 1 and examples[0].clip_id == "clip7"
    values = np.array([[-3.0, -5.0]], np.float32)
    scored = examples.with_references([values])
    assert scored[0].reference is values and examples[0].reference is None


def test_unigram_entropy_of_a_fair_coin_is_log_two():
    assert pipeline.unigram_entropy({4: 10, 9: 10}) == pytest.approx(np.log(2))
