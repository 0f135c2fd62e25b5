"""Finds row budgets for a data set: plans rows with candidate budgets and prints the best.

    python -m saber_jax.data.budgets --records DIR [--split train] [--pairs DIR] [--length 4096]

The settings are printed to stdout and the tables to stderr, so that a shell can pass them on:

    python -m saber_jax.main --config=... $(python -m saber_jax.data.budgets --records DIR)

`--length` is the number of text slots of a row; for pairs, those of the part that both answers
share. The other budgets follow from the sizes of the examples per text slot. Among budgets that are
at least 92% full of media and leave out at most 0.8% of the examples, the one with the fullest text
slots is chosen; slightly emptier ones are preferred if attention can then use longer blocks. A
budget for the longest clip of a data set would be two thirds empty most of the time, so longer
clips keep fewer frames, and clips with more sound than a row holds are left out and named.
`batch_rows` is the number of rows of one pass over the data, at most --most_rows: with more, an
optimizer step would contain clips twice. With --batch_examples it is the number of rows that a step
of so many examples needs.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from saber_jax.data import encoded, planning, sizing
from saber_jax.data.packing import Budget
from saber_jax.data.pairs import read_pairs
from saber_jax.data.records import BadRecordError, RecordSource
from saber_jax.data.sources import Sources
from saber_jax.data.steps import StepSize
from saber_jax.data.tokenizer import load_beside
from saber_jax.flags import Parser

SAMPLE = 3 * planning.WINDOW
"""At most this many examples are sampled to try budgets on."""

ROUGHLY, FINALISTS, ROUGH_LOSS = 2048, 6, 0.02
"""All budgets are first tried on ROUGHLY examples of the sample. The FINALISTS best of them are
then tried on the whole sample. In the first round media budgets may be ROUGH_LOSS emptier."""

PLANNED_EPOCHS = 3
"""Epochs whose steps are planned to find out how many rows a step needs."""

MOST_SEGMENTS = 64
LEAST_MEDIA = 0.92
MOST_LEFT_OUT = 0.008

# Budgets are rounded up to multiples of these. Two responses of LENGTH_STEP fill the 128 slots that
# the attention kernels work on; the vocabulary head takes TARGET_STEP targets at a time.
LENGTH_STEP, TARGET_STEP = 64, 256

# Attention on a TPU uses the longest blocks, up to LONGEST_BLOCK slots, that divide a row, and its
# responses too if that leaves LONG_BLOCK (see models/kernels.py). Rows with longer blocks are
# preferred if they are at most WORTH emptier.
LANES, LONGEST_BLOCK, LONG_BLOCK, WORTH = 128, 512, 384, 0.01


@dataclasses.dataclass(frozen=True)
class Choice:
    """A budget, and its effect on a data set as shares from 0 to 1."""

    budget: Budget
    fill: dict[str, float]
    left_out: float
    thinned: float

    @property
    def media(self) -> float:
        return min(self.fill["patches"], self.fill["chunks"])

    def score(self, least_media: float = LEAST_MEDIA) -> tuple[bool, float]:
        """Larger is better."""
        good = self.media >= least_media and self.left_out <= MOST_LEFT_OUT
        value = self.fill["text"] + WORTH * _block(self.budget) / LONGEST_BLOCK
        return good, value if good else self.media - 10 * self.left_out

    def flags(self) -> str:
        return " ".join(f"--config.data.{k}={v}" for k, v in vars(self.budget).items())


def choose(measured: sizing.Measurements, length: int) -> tuple[Choice, list[Choice]]:
    """The best budget with rows of `length`, and all that were tried.

    Raises ValueError when no example can be used.
    """
    measured = _sample(measured)
    few = _some(measured, slice(ROUGHLY))
    rough = [choice for budget in _candidates(measured, length) if (choice := _try(few, budget))]
    # With fewer examples to choose from, rows are slightly emptier than in training.
    rough.sort(key=lambda choice: choice.score(LEAST_MEDIA - ROUGH_LOSS))
    tried = [choice for one in rough[-FINALISTS:] if (choice := _try(measured, _open(one.budget)))]
    if not tried:
        raise ValueError(
            f"No example fits into rows of {length}. Raise --length, or look at the records with "
            "python -m saber_jax.data.show."
        )
    return max(tried, key=Choice.score), tried


def _report_bad(examples: encoded.Examples, measured: sizing.Measurements) -> None:
    """Prints how many examples cannot be used, and why the first of them cannot.

    Raises ValueError if none can.
    """
    readable = _readable(measured)
    bad = np.flatnonzero(~readable)
    if not len(bad):
        return
    try:
        examples.measure(int(bad[0]))
        reason = ""  # It could be read this time.
    except BadRecordError as error:
        reason = f" The first: {error}"
    text = f"{len(bad)} of {len(readable)} examples cannot be used.{reason}"
    if not readable.any():
        raise ValueError(text)
    print(text, file=sys.stderr)


def _readable(measured: sizing.Measurements) -> Bool[np.ndarray, " N"]:
    return (measured.sizes != sizing.BAD).all((0, 2))


def _sample(measured: sizing.Measurements) -> sizing.Measurements:
    good = np.flatnonzero(_readable(measured))
    return _some(measured, np.random.default_rng(0).permutation(good)[:SAMPLE])


def _some(
    measured: sizing.Measurements, which: slice | Int[np.ndarray, " n"]
) -> sizing.Measurements:
    return sizing.Measurements(
        measured.sizes[:, which], measured.frame_pairs[which], measured.token_counts
    )


def _patch_step(patches: Int[np.ndarray, "K N"]) -> int:
    """The greatest common divisor of all clips' numbers of patches, at least 64.

    If all frames have the same size it is the patches of a frame pair. A budget between two
    multiples could never be filled.
    """
    step = int(np.gcd.reduce(patches.ravel()))
    return step * -(-64 // step) if step else 64


def _candidates(measured: sizing.Measurements, length: int) -> Iterator[Budget]:
    """Budgets near what the average row needs when its text is full."""
    mean = dict(zip(planning.SIZE_NAMES, measured.sizes.mean((0, 1)), strict=True))
    rows = mean["text"] / length  # Rows per example.
    answer = max(mean["chosen"], mean["rejected"]) / rows
    responses = {_up(answer * k, LENGTH_STEP) for k in (0.98, 1.02, 1.06) if answer}
    responses |= {
        response
        for response in _around(answer, LENGTH_STEP)
        if (length + 2 * response) % LONGEST_BLOCK == 0
    }
    step = _patch_step(measured.sizes[..., planning.SIZE_NAMES.index("patches")])
    patches = {_up(mean["patches"] / rows * k, step) for k in (0.98, 1.01, 1.035, 1.06)}
    need = mean["chunks"] / rows
    chunks = range(max(1, int(need * 0.98)), int(np.ceil(need / LEAST_MEDIA)) + 1)
    for response, n_v, n_a in itertools.product(
        sorted(responses) or [0], sorted(patches), chunks if need else [0]
    ):
        yield Budget(
            length=length,
            response=response,
            patches=n_v,
            chunks=n_a,
            targets=length + 2 * response,
            segments=MOST_SEGMENTS,
            frame_patches=int(measured.frame_patches.max()),
        )


def _open(budget: Budget) -> Budget:
    """Without limits on targets and segments."""
    return dataclasses.replace(budget, targets=budget.slots, segments=MOST_SEGMENTS)


def _up(value: float, step: int) -> int:
    return int(np.ceil(value / step)) * step


def _around(need: float, step: int) -> range:
    """Multiples of `step` within a few percent of `need`; there may be none if it is small."""
    return range(_up(need * 0.98, step), int(need * 1.06) + 1, step) if need else range(0)


def _block(budget: Budget) -> int:
    slots = _up(budget.slots, LANES)
    dividing = [b for b in range(LANES, LONGEST_BLOCK + 1, LANES) if slots % b == 0]
    of_regions = [b for b in dividing if budget.response % b == 0 and b >= LONG_BLOCK]
    return max(of_regions or dividing)


def _try(measured: sizing.Measurements, budget: Budget) -> Choice | None:
    """Plans rows twice: without limits on targets and segments, then with the targets that 99.5% of
    those rows need and the segments that all do."""
    selection = sizing.select(measured, budget)
    usable = selection.usable
    if not len(usable):
        return None
    sizes = selection.sizes[0]
    rows = planning.plan_rows(sizes, usable, budget)
    targets = sizes[:, planning.SIZE_NAMES.index("targets")]
    of_rows = [targets[row].sum() for row in rows]
    budget = dataclasses.replace(
        budget,
        targets=_up(max(np.quantile(of_rows, 0.995), targets[usable].max()), TARGET_STEP),
        segments=max(map(len, rows)),
    )
    rows = planning.plan_rows(sizes, usable, budget)
    total = sizes.shape[0]
    return Choice(
        budget,
        planning.fill(sizes, rows, budget),
        left_out=1 - len(usable) / total,
        thinned=len(selection.thinned) / total,
    )


def describe(measured: sizing.Measurements) -> str:
    """Mean, median, 99% quantile and maximum of every size."""
    lines = ["                mean   median      99%     most"]
    for name, values in zip(planning.SIZE_NAMES, measured.sizes[0].T, strict=True):
        if values.any():
            numbers = (values.mean(), *np.quantile(values, (0.5, 0.99)), values.max())
            lines.append(f"{name:10s}" + "".join(f"{number:9.0f}" for number in numbers))
    return "\n".join(lines)


def table(choices: Sequence[Choice]) -> str:
    """One line per choice, the best last."""
    lines = [
        "length response patches chunks targets segments |  text patches chunks | left out thinned"
    ]
    for choice in sorted(choices, key=Choice.score):
        b, f = choice.budget, choice.fill
        lines.append(
            f"{b.length:6d} {b.response:8d} {b.patches:7d} {b.chunks:6d} {b.targets:7d} "
            f"{b.segments:8d} | {f['text']:5.1%} {f['patches']:7.1%} {f['chunks']:6.1%} | "
            f"{choice.left_out:8.2%} {choice.thinned:7.2%}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; see the module docstring."""
    parser = Parser(
        prog="python -m saber_jax.data.budgets",
        description=__doc__,
    )
    parser.add_argument("--records", required=True, help="what python -m data_prep.build wrote")
    parser.add_argument("--split", default="train")
    parser.add_argument("--pairs", help="preference pairs: budgets for configs/cadpo.py")
    parser.add_argument("--length", type=int, default=4096, help="text slots of a row")
    parser.add_argument("--most_rows", type=int, default=256, help="of an optimizer step")
    parser.add_argument(
        "--batch_examples",
        type=int,
        default=0,
        help="clips or pairs of an optimizer step; 0: as many as --most_rows hold",
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that measure")
    flags = parser.parse_args(argv)
    if flags.batch_examples < 0:
        parser.error(f"--batch_examples must be 0 or more, got {flags.batch_examples}")
    try:
        sources = Sources([RecordSource(flags.records, flags.split)], [1.0])
        pairs = read_pairs(flags.pairs) if flags.pairs else None
        examples = encoded.Examples(sources, load_beside(flags.records), pairs)
        total = len(examples)
        measured = sizing.measure(examples, total, range(total), workers=flags.workers, quiet=False)
        _report_bad(examples, measured)
        best, tried = choose(measured, flags.length)
    except (ValueError, OSError) as error:
        print(f"saber_jax.data.budgets: {error}", file=sys.stderr)
        return 1
    print(f"{total} examples\n{describe(measured)}\n\n{table(tried)}\n", file=sys.stderr)
    if flags.batch_examples:
        rows = rows_of_a_step(measured, best.budget, flags.batch_examples)
        step = (
            f"--config.data.batch_rows={rows} --config.data.batch_examples={flags.batch_examples}"
        )
    else:
        rows = min(flags.most_rows, rows_of_a_pass(measured, best.budget))
        step = f"--config.data.batch_rows={rows}"
    print(f"{best.flags()} {step}")
    return 0


def rows_of_a_pass(measured: sizing.Measurements, budget: Budget) -> int:
    """Number of rows for one pass over the examples that fit."""
    selection = sizing.select(measured, budget)
    return len(planning.plan_rows(selection.sizes[0], selection.usable, budget))


def rows_of_a_step(measured: sizing.Measurements, budget: Budget, examples: int) -> int:
    """The most rows that a step of so many examples needs, in the first PLANNED_EPOCHS epochs.

    Another order of the examples may need slightly more.
    """
    selection = sizing.select(measured, budget)
    step = StepSize(examples=examples, rows=examples)  # In rows of their own all have room.
    plan = planning.Plan(selection.sizes, budget, 0, draw=lambda _: selection.usable, step=step)
    count = PLANNED_EPOCHS * step.steps(len(selection.usable))
    rows = plan.rows(count * step.rows)
    return max(sum(map(bool, rows[i : i + step.rows])) for i in range(0, len(rows), step.rows))


if __name__ == "__main__":
    sys.exit(main())
