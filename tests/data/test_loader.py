"""The order of batches, resuming, and what a broken record does."""

import dataclasses
import itertools
import threading
import time
import weakref
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from saber_jax.data import encoded, loader, sizing
from saber_jax.data.examples import size_of
from saber_jax.data.packing import Budget
from saber_jax.data.pairs import Pair
from saber_jax.data.planning import Plan
from saber_jax.data.records import BadRecordError
from saber_jax.data.sources import Sources
from saber_jax.data.tasks import Mixture
from tests import synthetic

BUDGET = Budget(length=640, patches=216, chunks=3, targets=384, segments=3)


class Source:
    """A RecordSource of made-up records; reading `broken` ones raises `error`."""

    path, split, fingerprint = "made-up", "train", "made-up"

    def __init__(
        self,
        count: int,
        broken: Sequence[int] = (),
        error: Exception = BadRecordError("bad block"),
        names: str = "clip",
    ):
        self._count, self._broken, self._error, self._names = count, broken, error, names

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int):
        if index in self._broken:
            raise self._error
        return self.outline(index)

    def outline(self, index: int):
        record = synthetic.record(index, words=3)
        return dataclasses.replace(record, clip_id=f"{self._names}{index}")

    def index(self, clip_id: str) -> int:
        if not clip_id.startswith(self._names):
            raise KeyError(clip_id)
        return int(clip_id.removeprefix(self._names))

    def where(self, index: int) -> str:
        return f"made-up-00000-of-00001[{index}]"


def examples_of(tokenizer, *sources: Source, **options) -> encoded.Examples:
    return encoded.Examples(Sources(sources, [len(s) for s in sources]), tokenizer, **options)


@pytest.fixture(scope="module")
def examples(tokenizer):
    return examples_of(tokenizer, Source(17))


@pytest.fixture(scope="module")
def plan(examples, tmp_path_factory):
    measured = loader.measure(examples, tmp_path_factory.mktemp("sizes") / "sizes.npz")
    return Plan(measured.sizes, BUDGET, seed=3)


def batches(examples, plan, *, steps: int, start: int = 0, threads: int = 2, workers: int = 0):
    rows = loader.HostRows(plan.rows(2 * steps), 2, start)
    stream = loader.stream(rows, examples, plan.budget, threads=threads, workers=workers)
    return list(stream)


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
    for (expected, about), (got, about_got) in zip(whole[4:], rest, strict=True):
        jax.tree.map(np.testing.assert_array_equal, expected, got)
        assert about == about_got


def test_measured_sizes_survive_in_the_cache(examples, tmp_path, monkeypatch):
    measured = loader.measure(examples, tmp_path / "sizes.npz")
    with monkeypatch.context() as patched:
        patched.delattr(encoded.Examples, "measure")  # Nothing is measured twice.
        again = loader.measure(examples, tmp_path / "sizes.npz")
    for field in dataclasses.fields(measured):
        np.testing.assert_array_equal(getattr(measured, field.name), getattr(again, field.name))
    sizes = measured.sizes
    assert sizes.shape == (1, 17, 6)
    assert measured.token_counts.sum() == sizes[0, :, -1].sum()
    assert sizes[0, 0, 0] == size_of(examples[0]).text


def test_sizes_of_other_examples_are_not_taken_for_these(tokenizer, tmp_path):
    cache = tmp_path / "sizes.npz"
    pair = Pair(clip_id="clip7", chosen="[video_desc] a room", rejected="[video_desc] a person")
    others = dataclasses.replace(pair, chosen=pair.chosen + " with a window and a door")
    replaced = Source(17)
    replaced.fingerprint = "replaced"
    mixture = Mixture({"sed": 1.0, "acoustic_feat": 1.0}, seed=3)
    some = [
        examples_of(tokenizer, Source(17)),
        examples_of(tokenizer, replaced),
        examples_of(tokenizer, Source(17), requests=mixture.requests),
        examples_of(tokenizer, Source(17), pairs=[pair]),
        examples_of(tokenizer, Source(17), pairs=[others]),
    ]
    assert len({examples.fingerprint for examples in some}) == len(some)
    for examples in some:
        loader.measure(examples, cache)
        assert sizing.load(cache, examples.fingerprint) is not None


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 and no more", None])
def test_damaged_sizes_are_named_and_measured_again(examples, tmp_path, damage, caplog):
    cache = tmp_path / "sizes.npz"
    whole = loader.measure(examples, cache)
    raw = cache.read_bytes()
    cache.write_bytes(raw[: len(raw) // 2] if damage is None else damage)
    again = loader.measure(examples, cache)
    np.testing.assert_array_equal(again.sizes, whole.sizes)
    assert f"{cache} is damaged" in caplog.text
    assert sizing.load(cache, examples.fingerprint) is not None


def test_every_epoch_draws_its_tasks_anew_and_every_row_still_fits(tokenizer, tmp_path):
    mixture = Mixture({"sed": 1.0, "acoustic_feat": 1.0}, wordings=2, seed=3)
    asked = examples_of(tokenizer, Source(17), requests=mixture.requests)
    sizes = loader.measure(asked, tmp_path / "sizes.npz").sizes
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
    for batch, _ in batches(asked, plan, steps=3):  # pack_rows raises where a row is too small.
        assert batch.targets.weights.any()


def test_without_a_mixture_everybody_is_asked_for_six_sections(examples, plan):
    sections = [r.sections for i in plan.row(0) for r in examples[i].responses]
    assert all(set(s.tolist()) == set(range(1, 7)) for s in sections)


def test_measured_without_pixels_equals_encoded(examples, tokenizer):
    pair = Pair(clip_id="clip7", chosen="[video_desc] a room", rejected="[video_desc] a person")
    for some in (examples, examples_of(tokenizer, Source(9), pairs=[pair])):
        [size], frame_pairs, tokens = some.measure(0)
        encoded = some[0]
        assert size == size_of(encoded) and frame_pairs == 2
        np.testing.assert_array_equal(tokens, np.concatenate([r.tokens for r in encoded.responses]))


def test_a_bad_record_leaves_an_empty_segment_and_its_name(tokenizer, examples, plan):
    broken = examples_of(tokenizer, Source(17, broken=[5]))
    whole, with_hole = batches(examples, plan, steps=4), batches(broken, plan, steps=4)
    assert len(whole) == len(with_hole) == 4
    assert sum(b.left_out.sum() for b, _ in whole) == 0
    changed = [about for b, about in with_hole if b.left_out.any()]
    shape = whole[0][0].text.tokens.shape
    assert changed and all(b.text.tokens.shape == shape for b, _ in with_hole)
    [entry] = changed[0].left_out
    assert (entry.index, entry.file) == (5, "made-up: made-up-00000-of-00001[5]")
    assert "bad block" in entry.detail
    skipped = batches(examples.without([5]), plan, steps=4)  # As after a resume.
    for (a, _), (b, _) in zip(skipped, with_hole, strict=True):
        np.testing.assert_array_equal(a.text.tokens, b.text.tokens)


def test_the_first_that_can_be_used_are_found_behind_those_that_cannot(tokenizer):
    examples = examples_of(tokenizer, Source(6, broken=[0, 3])).without([1])
    assert [e.clip_id for e in examples.readable(range(6), 2)] == ["clip2", "clip4"]
    assert [e.clip_id for e in examples.readable([0, 1, 5], 2)] == ["clip5"]


def test_the_provenance_is_that_of_a_record_that_can_be_read(tokenizer):
    class Unreadable(Source):
        def outline(self, index: int):
            if index == 0:
                raise BadRecordError("bad block")
            return dataclasses.replace(super().outline(index), provenance={"from": index})

    examples = examples_of(tokenizer, Unreadable(3))
    assert examples.provenance(range(3)) == {"from": 1} and examples.provenance([0]) == {}


@pytest.mark.parametrize("error", [TypeError("oops"), StopIteration("over")])
def test_a_fault_of_the_program_names_the_record_and_never_looks_like_the_end(
    tokenizer, plan, error
):
    broken = examples_of(tokenizer, Source(17, broken=[5], error=error))
    with pytest.raises(RuntimeError, match=r"00001\[5\] failed with .*fault of the program"):
        batches(broken, plan, steps=6)


def test_a_record_that_storage_withholds_ends_the_run_and_is_not_left_out(tokenizer, plan):
    error = OSError(5, "storage failed 3 times", "shard-00000-of-00001[5]")
    broken = examples_of(tokenizer, Source(17, broken=[5], error=error))
    with pytest.raises(OSError, match=r"failed 3 times: 'shard-00000-of-00001\[5\]'"):
        batches(broken, plan, steps=6)


def test_a_stream_that_ends_too_soon_is_an_error(monkeypatch, examples, plan):
    stream = loader.stream(loader.HostRows(plan.rows(6), 2), examples, plan.budget, threads=1)
    next(stream)
    monkeypatch.setattr(loader.HostRows, "batches", 9)
    with pytest.raises(RuntimeError, match="after 3 of 9 batches"):
        list(stream)


def test_pairs_are_joined_to_their_clips_and_carry_their_references(tokenizer):
    pair = Pair(clip_id="clip7", chosen="[video_desc] a room", rejected="[video_desc] a person")
    examples = examples_of(tokenizer, Source(9), pairs=[pair])
    assert len(examples) == 1 and examples[0].clip_id == "clip7"
    values = np.array([[-3.0, -5.0]], np.float32)
    scored = examples.with_references([values])
    assert scored[0].reference is values and examples[0].reference is None


def test_the_loader_never_holds_more_rows_than_it_says(monkeypatch, examples, plan):
    alive, most, lock = set(), 0, threading.Lock()
    pack = loader.Pack.map

    def counted(self, row):
        nonlocal most
        batch = pack(self, row)
        with lock:
            alive.add(key := object())
            most = max(most, len(alive))
        weakref.finalize(batch[0].text.tokens, alive.discard, key)
        return batch

    monkeypatch.setattr(loader.Pack, "map", counted)
    rows = loader.HostRows(plan.rows(60), 3)
    for _ in loader.stream(rows, examples, plan.budget, threads=2):
        time.sleep(0.02)  # A step that takes longer than making its batch: buffers run full.
    assert most <= loader.most_rows(3, threads=2, workers=0)
