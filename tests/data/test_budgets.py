"""The command that chooses budgets."""

import dataclasses

import numpy as np
import pytest

from benchmarks import lengths
from configs import cadpo, sft
from data_prep.records import dataset
from saber_jax.data import budgets, planning, sizing
from saber_jax.data.packing import Budget
from saber_jax.data.steps import StepSize
from saber_jax.models import kernels
from tests import synthetic


def measured(sizes: np.ndarray) -> sizing.Measurements:
    return sizing.Measurements(sizes[None], sizes[:, 3] // 240, np.ones(1, int))


def test_chosen_budgets_leave_little_empty_and_little_out(monkeypatch):
    monkeypatch.setattr(budgets, "SAMPLE", 1500)
    sizes = lengths.supervised(1500, lengths.EXACT, np.random.default_rng(3))
    best, tried = budgets.choose(measured(sizes), 4096)
    assert best.fill["text"] >= 0.97 and best.media >= 0.92 and best.left_out <= 0.008
    assert len(tried) > 4 and best.budget.length == 4096
    assert max(choice.score() for choice in tried) == best.score()
    # Smaller media buffers than the longest clip asks for.
    assert best.budget.patches < sizes[:, 3].max() + 1000 and best.budget.chunks < 15


def test_budgets_hold_whole_frame_pairs(monkeypatch):
    monkeypatch.setattr(budgets, "SAMPLE", 1500)
    sizes = lengths.supervised(1500, lengths.RELEASE, np.random.default_rng(3))
    best, _ = budgets.choose(measured(sizes), 4096)
    assert best.budget.patches % 480 == 0 and best.budget.patches > 4096


def test_blocks_are_those_of_the_kernel():
    for length, response in [(64, 0), (128, 0), (7744, 0), (6528, 0), (3072, 1152), (3072, 1280)]:
        row = Budget(length=length, response=response, patches=0, chunks=0, targets=1, segments=1)
        padded = -(-row.slots // kernels.LANES) * kernels.LANES
        assert budgets._block(row) == kernels._block(padded, response)


@pytest.mark.parametrize(("config", "draw"), [(sft, lengths.supervised), (cadpo, lengths.pairs)])
def test_the_released_sizes_have_budgets_that_suit_lengths_like_saber_s(config, draw):
    data = config.get_config("7b").data
    budget = Budget(**{field.name: data[field.name] for field in dataclasses.fields(Budget)})
    sizes = draw(1500, lengths.RELEASE, np.random.default_rng(3))
    selection = sizing.select(measured(sizes), budget)
    assert 1 - len(selection.usable) / len(sizes) < data.max_bad_fraction
    rows = planning.plan_rows(selection.sizes[0], selection.usable, budget)
    filled = planning.fill(selection.sizes[0], rows, budget)
    assert min(filled[name] for name in ("text", "patches", "chunks")) > 0.9


@pytest.mark.parametrize("examples", [7, 32, 500])
def test_a_step_of_so_many_examples_has_room_in_the_rows_that_are_printed(examples):
    data = sft.get_config("7b").data
    budget = Budget(**{field.name: data[field.name] for field in dataclasses.fields(Budget)})
    sizes = lengths.supervised(300, lengths.RELEASE, np.random.default_rng(3))
    rows = budgets.rows_of_a_step(measured(sizes), budget, examples)
    selection = sizing.select(measured(sizes), budget)

    def planned(rows: int) -> planning.Plan:
        step = StepSize(examples=examples, rows=rows)
        return planning.Plan(selection.sizes, budget, 0, draw=lambda _: selection.usable, step=step)

    count = -(-len(selection.usable) // examples)
    planned(rows).rows(count * rows).plan()
    with pytest.raises(ValueError, match=f"needs up to {rows} rows"):
        planned(rows - 1).rows(budgets.PLANNED_EPOCHS * count * (rows - 1)).plan()


def test_nothing_that_fits_is_one_clear_error():
    sizes = np.array([[900, 0, 0, 400, 3, 200]])
    with pytest.raises(ValueError, match="No example fits into rows of 64"):
        budgets.choose(measured(sizes), 64)


def test_records_that_cannot_be_used_are_counted_with_the_reason_of_the_first(
    tmp_path, tokenizer, capsys
):
    made = [synthetic.record(i, words=2) for i in range(3)]
    bad = dataclasses.replace(made[0], annotation={})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    dataset.write(whole, {"train": [bad, *made[1:]]}, lambda record: record)
    dataset.write(broken, {"train": [bad]}, lambda record: record)
    for folder in (whole, broken):
        (folder / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    assert budgets.main(["--records", str(whole), "--length", "768"]) == 0
    assert "1 of 3 examples cannot be used. The first: " in capsys.readouterr().err
    assert budgets.main(["--records", str(broken)]) == 1
    error = capsys.readouterr().err
    assert "1 of 1 examples cannot be used" in error and "video_desc" in error


def test_the_command_prints_flags_for_records_on_disk(tmp_path, tokenizer, capsys):
    made = [synthetic.record(i, words=2 + i % 3) for i in range(12)]
    dataset.write(tmp_path, {"train": made}, lambda record: record)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    assert budgets.main(["--records", str(tmp_path), "--length", "768"]) == 0
    *_, flags = capsys.readouterr().out.strip().splitlines()
    assert flags.startswith("--config.data.length=768 --config.data.patches=")
    # Twelve examples, in as many rows as they fill once.
    rows = int(flags.rpartition("--config.data.batch_rows=")[2])
    assert 1 <= rows <= 12
    assert budgets.main(["--records", str(tmp_path), "--length", "768", "--most_rows", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.endswith("--config.data.batch_rows=1\n")
    with_examples = ["--records", str(tmp_path), "--length", "768", "--batch_examples", "4"]
    assert budgets.main(with_examples) == 0
    out = capsys.readouterr().out
    assert out.endswith(" --config.data.batch_examples=4\n")
    assert 1 <= int(out.split("batch_rows=")[1].split()[0]) <= 4
    assert budgets.main(["--records", str(tmp_path), "--length", "16"]) == 1
    assert "No example fits" in capsys.readouterr().err
