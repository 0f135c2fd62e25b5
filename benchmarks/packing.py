"""How full rows are: ours, padding to the longest, first fit by text alone.

    python -m benchmarks.packing [--quick]

Lengths are made up like SABER's (benchmarks/lengths.py), rows are 4,096 long (of pairs: the region
that both answers share), and the other budgets are those that python -m saber_jax.data.budgets
chooses for a part of the data. Peers get batches as large as their method fills them:

- padding to the longest: eight conversations at a time in shuffled order, every text, picture and
  sound buffer padded to the longest of its batch;
- first fit by text: conversations go into the first of 64 open rows of 4,096 with room, as packers
  of text do, and the media buffers of a row are as large as the fullest row needs.

To both peers a pair is two conversations, each with the whole prompt, as it is to other trainers.

The last line reports the worst of our shares relative to its goal (text 97%, patches and chunks
92%); the goal is 1.0.
"""

import argparse
import time

import numpy as np

from benchmarks import lengths, result
from saber_jax.data import budgets, planning, sizing
from saber_jax.data.packing import Budget

LENGTH = 4096
GOALS = {"text": 0.97, "patches": 0.92, "chunks": 0.92}
CASES = {
    "release, SFT": (lengths.supervised, lengths.RELEASE),
    "exact, SFT": (lengths.supervised, lengths.EXACT),
    "release, CA-DPO": (lengths.pairs, lengths.RELEASE),
    "exact, CA-DPO": (lengths.pairs, lengths.EXACT),
}


def ours(sizes: np.ndarray, sampling) -> tuple[dict, Budget, float]:
    """(shares that are filled, budget chosen on a part of the data, microseconds per example)."""
    measured = sizing.Measurements(sizes[None], _frame_pairs(sizes, sampling), np.ones(1))
    best, _ = budgets.choose(measured, LENGTH)
    selection = sizing.select(measured, best.budget)
    start = time.process_time()
    rows = planning.plan_rows(selection.sizes[0], selection.usable, best.budget)
    spent = (time.process_time() - start) / len(selection.usable) * 1e6
    filled = planning.fill(selection.sizes[0], rows, best.budget)
    filled["left out"] = 1 - len(selection.usable) / len(sizes)
    filled["thinned"] = len(selection.thinned) / len(sizes)
    return filled, best.budget, spent


def _frame_pairs(sizes: np.ndarray, sampling) -> np.ndarray:
    patches = sizes[:, planning.SIZE_NAMES.index("patches")]
    height, width = sampling.frame_size(360, 640, 4)
    return patches // ((height // 14) * (width // 14))


def conversations(sizes: np.ndarray) -> np.ndarray:
    """(text, patches, chunks) of every conversation. A pair is two conversations with one clip."""
    of = dict(zip(planning.SIZE_NAMES, sizes.T, strict=True))
    answers = [of["chosen"], of["rejected"]] if of["rejected"].any() else [of["chosen"]]
    each = [np.stack([of["text"] + a, of["patches"], of["chunks"]], 1) for a in answers]
    return np.stack(each, 1).reshape(-1, 3)


def padded_to_longest(sizes: np.ndarray, batch: int = 8) -> dict[str, float]:
    each = conversations(sizes)
    batches = each[: len(each) // batch * batch].reshape(-1, batch, 3)
    share = batches.sum((0, 1)) / (batches.max(1).sum(0) * batch)
    return dict(zip(GOALS, share.tolist(), strict=True))


def first_fit_by_text(sizes: np.ndarray, open_rows: int = 64) -> dict[str, float]:
    needs = conversations(sizes)
    used, closed = np.zeros((0, 3), int), []
    for need in needs[needs[:, 0] <= LENGTH]:
        room = np.flatnonzero(used[:, 0] + need[0] <= LENGTH)
        if len(room):
            used[room[0]] += need
            continue
        if len(used) == open_rows:
            closed.append(used[0])
            used = used[1:]
        used = np.concatenate([used, need[None]])
    rows = np.concatenate([np.array(closed).reshape(-1, 3), used])
    share = rows.mean(0) / np.array([LENGTH, *rows[:, 1:].max(0)])
    return dict(zip(GOALS, share.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer examples")
    quick = parser.parse_args().quick
    examples = 6_000 if quick else 40_000
    worst, shares, costs = np.inf, {}, []
    for case, (make, sampling) in CASES.items():
        sizes = make(examples, sampling, np.random.default_rng(1))
        filled, budget, spent = ours(sizes, sampling)
        costs.append(spent)
        print(f"\n{case}: {budget}, {spent:.0f} us an example to plan")
        rows = {
            "ours": filled,
            "padding to the longest": padded_to_longest(sizes),
            "first fit by text": first_fit_by_text(sizes),
        }
        for name, row in rows.items():
            print(f"  {name:24s}" + "  ".join(f"{key} {share:.1%}" for key, share in row.items()))
        shares[case] = {key: round(filled[key], 4) for key in (*GOALS, "left out", "thinned")}
        worst = min(worst, *(filled[key] / goal for key, goal in GOALS.items()))
    result.finish(
        "packing",
        value=round(float(worst), 4),
        unit="worst share / its goal",
        goal=1.0,
        reached=worst >= 1.0,
        quick=quick,
        device=result.device(),
        shares=shares,
        planning_us_per_example=round(float(np.median(costs)), 1),
    )


if __name__ == "__main__":
    main()
