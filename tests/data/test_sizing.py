"""What fits, what is thinned, what is left out and how it is named."""

import dataclasses
import json

import numpy as np
import pytest

from saber_jax.data import media, sizing
from saber_jax.data.examples import encode_record, measure_record, size_of, thinned
from saber_jax.data.packing import Budget
from saber_jax.data.quarantine import LeftOut, Quarantine, TooManyBadError
from saber_jax.data.records import BadRecordError
from saber_jax.data.tasks import Mixture
from tests import synthetic
from tests.data.test_loader import Source, examples_of

BUDGET = Budget(length=640, patches=216, chunks=3, targets=384, segments=3)


class Uneven(Source):
    """Clip 3 is ten frame pairs long, clip 4 has more sound than a row; clip 6 is unreadable."""

    def outline(self, index: int):
        if index == 6:
            raise BadRecordError("bad block")
        long, loud = index == 3, index == 4
        return synthetic.record(
            index, words=3, frames=20 if long else 4, seconds=9.0 if loud else 1.3
        )


@pytest.fixture(scope="module")
def selected(tokenizer):
    examples = examples_of(tokenizer, Uneven(8))
    measured = sizing.measure(examples, 8, range(8))
    return examples, sizing.select(measured, BUDGET)


def test_a_clip_too_long_for_a_row_keeps_fewer_frames_and_all_of_its_sound(selected, tokenizer):
    examples, selection = selected
    assert selection.thinned.tolist() == [3] and selection.frame_pairs[3] == 6
    whole, kept = (e[3] for e in (examples, examples.with_frame_pairs(selection.frame_pairs)))
    assert len(whole.patches) == 360 and len(kept.patches) == 216
    np.testing.assert_array_equal(whole.mel, kept.mel)
    assert tuple(selection.sizes[0, 3]) == tuple(vars(size_of(kept)).values())
    # It still lasts as long: positions reach (nearly) as far in time.
    assert kept.prompt.positions[0].max() >= whole.prompt.positions[0].max() - 20


def test_a_request_without_video_keeps_its_size_where_others_keep_fewer_frames(tokenizer):
    mixture = Mixture({"sed": 1.0, "speech_content": 1.0}, alone=True, seed=3)
    assert [request.only for request in mixture.requests] == [None, "audio"]
    examples = examples_of(tokenizer, Uneven(4), requests=mixture.requests)
    selection = sizing.select(sizing.measure(examples, 4, range(4)), BUDGET)
    assert selection.usable.tolist() == [0, 1, 2, 3] and selection.thinned.tolist() == [3]
    kept = examples.with_frame_pairs(selection.frame_pairs)
    for asked in range(len(mixture.requests)):
        sizes = dataclasses.astuple(size_of(kept[3 + 4 * asked]))
        assert tuple(selection.sizes[asked, 3]) == sizes


def test_what_is_left_out_is_named_with_file_index_and_reason(selected):
    examples, selection = selected
    assert selection.usable.tolist() == [0, 1, 2, 3, 5, 7]
    loud, unreadable = selection.left_out(BUDGET, examples)
    assert (loud.index, loud.clip_id, loud.reason) == (4, "clip4", "too_large")
    assert "chunks 5 > 3" in loud.detail and loud.file.endswith("[4]")
    assert (unreadable.index, unreadable.reason) == (6, "bad_record")
    assert "bad block" in unreadable.detail


def test_a_frame_larger_than_attention_reaches_is_left_out_by_name(tokenizer):
    examples = examples_of(tokenizer, Uneven(3))
    measured = sizing.measure(examples, 3, range(3))
    assert list(sizing.select(measured, BUDGET).frame_patches) == [36, 36, 36]
    narrow = dataclasses.replace(BUDGET, frame_patches=35)
    selection = sizing.select(measured, narrow)
    assert not len(selection.usable)
    assert selection.left_out(narrow, examples)[0].detail == "frame_patches 36 > 35"
    assert len(sizing.select(measured, dataclasses.replace(BUDGET, frame_patches=36)).usable) == 3


def test_shares_of_several_processes_add_up_to_the_whole(selected):
    examples, _ = selected
    whole = sizing.measure(examples, 8, range(8))
    parts = sum(
        (sizing.measure(examples, 8, range(p, 8, 3)) for p in (1, 2)),
        start=sizing.measure(examples, 8, range(0, 8, 3)),
    )
    for name in vars(whole):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


@pytest.mark.parametrize("frames,seconds", [(0, 1.0), (4, 0.0), (2, 0.01), (6, 5.2)])
def test_sizes_from_shapes_equal_sizes_of_the_encoded(tokenizer, frames, seconds):
    record = synthetic.record(1, frames=frames, seconds=seconds)
    size, tokens = measure_record(record, tokenizer)
    example = encode_record(record, tokenizer)
    assert size == size_of(example)
    np.testing.assert_array_equal(tokens, example.responses[0].tokens)
    assert media.mel_frames(len(record.audio)) == len(media.log_mel(record.audio))


def test_thinning_keeps_the_first_and_the_last_frame():
    record = synthetic.record(2, frames=12)
    few = thinned(record, 2)
    assert few.frames.shape[0] == 4 and few.seconds_per_grid == 3 * record.seconds_per_grid
    np.testing.assert_array_equal(few.frames[[0, -1]], record.frames[[0, -1]])


def entry(index: int) -> LeftOut:
    return LeftOut(
        index=index, clip_id=f"c{index}", file=f"f[{index}]", reason="bad_record", detail="torn"
    )


def test_quarantine_lists_everything_and_ends_the_run_past_its_limit(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, total=200, limit=0.01, writes=True)
    quarantine.add([])
    assert path.read_text() == ""
    quarantine.add([entry(7), entry(7), entry(3)])
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [3, 7]
    with pytest.raises(TooManyBadError, match=r"3 of 200 .*max_bad_fraction=0\.01.* f\[3\]"):
        quarantine.add([entry(9)])
    assert len(path.read_text().splitlines()) == 3  # On the disk before the error.


def quarantine_of(path, *, resumes: bool) -> Quarantine:
    return Quarantine(path, total=200, limit=0.1, writes=True, resumes=resumes)


def listed(path) -> list[str]:
    return [json.loads(line)["clip_id"] for line in path.read_text().splitlines()]


def test_a_resumed_quarantine_knows_what_was_left_out_before(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine_of(path, resumes=False).add([entry(7), entry(3), entry(1)])
    resumed = quarantine_of(path, resumes=True)
    resumed.add([entry(1)])  # Which measuring finds at every start.
    assert listed(path) == ["c1", "c3", "c7"]  # Should the run be killed now.
    resumed.recall([1, 3])  # 7 was found after the checkpoint and will be found again.
    assert resumed.indices == [1, 3] and listed(path) == ["c1", "c3"]
    resumed.add([entry(8)])
    assert listed(path) == ["c1", "c3", "c8"]


def test_the_list_of_a_start_that_was_refused_does_not_outlive_it(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine_of(path, resumes=False).add([entry(7)])
    quarantine_of(path, resumes=False).add([])  # Its record has been repaired.
    assert listed(path) == []


def test_what_is_left_out_after_a_rollback_is_listed(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine = quarantine_of(path, resumes=False)
    quarantine.note([entry(5)])
    assert listed(path) == ["c5"]
    quarantine.add([entry(5)])
    assert listed(path) == ["c5"]


def test_unigram_entropy_of_a_fair_coin_is_log_two():
    assert sizing.unigram_entropy(np.array([0, 10, 0, 10])) == pytest.approx(np.log(2))
