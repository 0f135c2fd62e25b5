"""The reference cache: what it holds, what it does when interrupted, what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saber_jax import sharding
from saber_jax.data import reading
from saber_jax.data.examples import encode_record
from saber_jax.data.withhold import VIEWS
from saber_jax.models.config import saber_config
from saber_jax.train import checkpoint, references
from saber_jax.train.references import ReferenceCache, ReferenceInputs, References, complete
from tests import synthetic

SOURCE = ReferenceInputs(weights="w", processor="p", tokens="t", media="m", dtype="float32")
KEYS = [bytes([i]) * 16 for i in range(5)]
COUNTS = np.array([3, 1, 4, 2, 5])


class Model:
    """Scores target t of pair i with -(10 i + t), two pairs a row, two rows a batch and
    an empty one."""

    def __init__(self, stop_after=None, lost=()):
        self.asked, self._stop_after, self._lost = [], stop_after, lost

    def plan(self, indices):
        return [indices[i : i + 2] for i in range(0, len(indices), 2)]

    def batches(self, rows):
        for i in range(0, len(rows), 2):
            if i // 2 == self._stop_after:
                raise KeyboardInterrupt
            read = [[i for i in row if i not in self._lost] for row in rows[i : i + 2]]
            yield [*read, [], []][:3], self._lost

    def log_probs(self, batch):
        values = np.zeros((3, 9), np.float32)
        for row, indices in zip(values, batch, strict=True):
            self.asked += indices
            parts = [-(10.0 * i + np.arange(COUNTS[i])) for i in indices]
            row[: sum(map(len, parts))] = np.concatenate([*parts, []])
        return values

    def fill(self, cache, keys=KEYS):
        return complete(cache, keys, COUNTS, self.plan, self.batches, self.log_probs, batch_rows=2)


def test_every_pair_gets_the_log_probs_of_its_own_targets(tmp_path):
    cache = ReferenceCache(tmp_path, "whole", SOURCE)
    assert Model().fill(cache) == 5
    for again in (cache, ReferenceCache(tmp_path, "whole", SOURCE)):
        for i, key in enumerate(KEYS):
            np.testing.assert_array_equal(again.values[key], -(10.0 * i + np.arange(COUNTS[i])))


def test_a_full_cache_asks_the_model_nothing_and_new_pairs_only_for_themselves(tmp_path):
    Model().fill(ReferenceCache(tmp_path, "whole", SOURCE), KEYS[:3])
    model = Model()
    assert model.fill(ReferenceCache(tmp_path, "whole", SOURCE)) == 2
    assert model.asked == [3, 4]
    assert Model(stop_after=0).fill(ReferenceCache(tmp_path, "whole", SOURCE)) == 0


def test_a_pair_that_cannot_be_read_stays_missing_and_its_neighbours_keep_their_own(tmp_path):
    cache = ReferenceCache(tmp_path, "whole", SOURCE)
    Model(lost=(0, 3)).fill(cache)
    assert cache.values.keys() == {KEYS[i] for i in (1, 2, 4)}
    for i in (1, 2, 4):
        np.testing.assert_array_equal(cache.values[KEYS[i]], -(10.0 * i + np.arange(COUNTS[i])))
    again = Model()
    again.fill(cache)
    assert again.asked == [0, 3]


@pytest.mark.parametrize("where", [0.05, 0.4, 0.8])
def test_a_damaged_file_is_named_kept_aside_and_computed_again(tmp_path, capsys, where):
    whole = ReferenceCache(tmp_path, "whole", SOURCE)
    Model().fill(whole)
    [file] = sorted((tmp_path / "whole").glob("*.array_record"))
    data = bytearray(file.read_bytes())
    used = np.flatnonzero(np.frombuffer(data, np.uint8))  # Most of so small a file is padding.
    data[used[int(len(used) * where)]] ^= 4
    file.write_bytes(data)
    capsys.readouterr()
    again = ReferenceCache(tmp_path, "whole", SOURCE)
    if again.values:  # The bit is in no record.
        assert not capsys.readouterr().err
    else:
        assert f"{file.name}.damaged and computed again" in capsys.readouterr().err
        Model().fill(again)
    for key, values in whole.values.items():
        np.testing.assert_array_equal(again.values[key], values)


def test_a_file_that_storage_withholds_is_not_renamed_and_read_later(tmp_path, monkeypatch):
    whole = ReferenceCache(tmp_path, "whole", SOURCE)
    Model().fill(whole)
    [file] = sorted((tmp_path / "whole").glob("*.array_record"))
    away, pauses = file.with_name("away"), []
    monkeypatch.setattr(reading.time, "sleep", pauses.append)
    file.rename(away)
    file.mkdir()  # Reading it fails: "read() failed: Is a directory".
    with pytest.raises(OSError, match=f"failed 3 times: .*{file.name}"):
        ReferenceCache(tmp_path, "whole", SOURCE)
    assert pauses == [1, 2] and not list(file.parent.glob("*.damaged"))
    file.rmdir()
    away.rename(file)
    assert ReferenceCache(tmp_path, "whole", SOURCE).values.keys() == whole.values.keys()


def test_a_file_that_is_computed_again_overwrites_no_other(tmp_path):
    for keys in (KEYS[:2], KEYS):
        Model().fill(ReferenceCache(tmp_path, "whole", SOURCE), keys)
    for damaged in (1, 2):  # The same pairs are damaged a second time.
        file, _ = sorted((tmp_path / "whole").glob("*.array_record"))
        file.write_bytes(b"")
        model = Model()
        model.fill(ReferenceCache(tmp_path, "whole", SOURCE))
        assert len(list((tmp_path / "whole").glob("*.damaged"))) == damaged
        assert len(model.asked) < len(KEYS)
    assert Model().fill(ReferenceCache(tmp_path, "whole", SOURCE)) == 0


def test_a_killed_computation_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "FLUSH_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        Model(stop_after=1).fill(ReferenceCache(tmp_path, "whole", SOURCE))
    model = Model()
    model.fill(ReferenceCache(tmp_path, "whole", SOURCE))
    assert model.asked == [4]


def test_a_computation_that_is_told_to_stop_keeps_what_it_has(tmp_path, monkeypatch):
    answers = iter([False, True])
    monkeypatch.setattr(references.distributed, "told_to_stop", lambda: next(answers))
    with pytest.raises(references.distributed.Preempted, match="are kept"):
        Model().fill(ReferenceCache(tmp_path, "whole", SOURCE))
    monkeypatch.undo()
    model = Model()
    model.fill(ReferenceCache(tmp_path, "whole", SOURCE))
    assert model.asked == []


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ReferenceInputs)])
def test_a_cache_of_anything_else_is_refused_by_name(tmp_path, name):
    ReferenceCache(tmp_path, "whole", SOURCE)
    with pytest.raises(ValueError, match=rf"{name}: {getattr(SOURCE, name)} there, other here"):
        ReferenceCache(tmp_path, "whole", dataclasses.replace(SOURCE, **{name: "other"}))


def test_log_probs_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(FloatingPointError, match="1 pairs are not finite"):
        ReferenceCache(tmp_path, "whole", SOURCE).add({KEYS[0]: np.array([np.nan], np.float32)})


def test_views_that_nobody_asked_for_are_nan(tmp_path):
    caches = [ReferenceCache(tmp_path, view, SOURCE) for view in ("whole", "video")]
    for cache in caches:
        Model().fill(cache)
    got = References(caches, KEYS)[2]
    assert got.shape == (len(VIEWS), 4)
    filled = np.isfinite(got).all(1)
    assert [view for view, full in zip(VIEWS, filled, strict=True) if full] == ["whole", "video"]


def test_weights_digest_sees_order_and_single_bits_but_not_the_mesh(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    numbers = iter(range(9))

    def digest(text):
        place = tmp_path / str(next(numbers))
        checkpoint.save_params(
            place, {"text": jax.tree.map(jnp.asarray, text)}, saber_config("tiny")
        )
        return checkpoint.digest(place)

    swapped = values.copy()
    swapped[0, 0], swapped[1, 3] = values[1, 3], values[0, 0]
    bit = values.copy()
    bit.view(np.uint32)[2, 2] ^= 1
    others = [{"w": swapped}, {"w": bit}, {"w": values.reshape(6, 4)}, {"v": values}]
    assert len({digest(text) for text in ({"w": values}, *others)}) == 5
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=1)
    spread = jax.device_put(values, sharding.batch_sharding(mesh))
    assert len(spread.sharding.device_set) == 2
    assert digest({"w": spread}) == digest({"w": values})


def test_processor_digest_changes_with_pixels_sound_and_prompt(tokenizer):
    record = synthetic.record(0)
    louder = dataclasses.replace(record, audio=record.audio // 2)
    brighter = dataclasses.replace(record, frames=record.frames // 2)
    slower = dataclasses.replace(record, seconds_per_grid=1.0)
    other = dataclasses.replace(record, language="zh")
    digests = {
        references.processor_digest([encode_record(r, tokenizer)])
        for r in (record, louder, brighter, slower, other)
    }
    assert len(digests) == 5
