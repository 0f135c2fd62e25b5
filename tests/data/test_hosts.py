"""Any number of hosts reads the same data: counted, killed, resumed on another number of them."""

import dataclasses
import itertools
import json
import os
import signal

import jax
import numpy as np
import pytest

from saber_jax.data import loader
from saber_jax.data.examples import encode_record
from saber_jax.data.packing import Budget
from saber_jax.data.planning import Plan, Position
from tests import synthetic
from tests.data.test_loader import Source, examples_of

BUDGET = Budget(length=400, patches=72, chunks=3, targets=384, segments=3)
EXAMPLES, BATCH_ROWS = 47, 5


class Numbered:
    """Examples without media; the kappa of each is its number."""

    def __init__(self, tokenizer):
        record = synthetic.record(0, frames=0, seconds=0.0, words=2)
        self._example = encode_record(record, tokenizer)

    def encode(self, index, hidden):
        return dataclasses.replace(self._example, kappa=float(index))


@pytest.fixture(scope="module")
def numbered(tokenizer):
    return Numbered(tokenizer)


def plan() -> Plan:
    rng = np.random.default_rng(0)
    text = rng.integers(150, 350, EXAMPLES)  # What they claim: rows hold one or two.
    none = 0 * text
    return Plan(np.stack([text, none, none, none, none, none + 60], 1)[None], BUDGET, seed=5)


def read(
    numbered, plan, hosts: int, start: int, stop: int, *, workers: int = 0
) -> tuple[list[list[int]], dict]:
    """Ids of each step's batch in its rows' order, as `hosts` hosts read them; the last state."""
    padded = -(-BATCH_ROWS // hosts) * hosts
    rows = plan.rows(stop * BATCH_ROWS)
    streams = [
        loader.stream(
            loader.HostRows(rows, BATCH_ROWS, start, local=range(padded)[host::hosts]),
            numbered,
            BUDGET,
            threads=2,
            workers=workers,
        )
        for host in range(hosts)
    ]
    steps, state = [], {}
    for parts in zip(*streams, strict=True):
        # Hosts hold every `hosts`-th row here: nothing may depend on rows being neighbours.
        ids = [
            part.pairs.kappa[i][part.pairs.valid[i]].astype(int).tolist()
            for i, (part, _) in itertools.product(range(padded // hosts), parts)
        ]
        steps.append(list(itertools.chain.from_iterable(ids)))
        states = [about.position for _, about in parts]
        assert all(other == states[0] for other in states)
        state = states[0]
    return steps, state


@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
def test_every_number_of_hosts_reads_the_same_batches_and_loses_none(numbered, hosts):
    expected, _ = read(numbered, plan(), 1, 0, 14)
    steps, _ = read(numbered, plan(), hosts, 0, 14)
    assert steps == expected
    ids = list(itertools.chain.from_iterable(steps))
    assert sorted(ids[:EXAMPLES]) == list(range(EXAMPLES))


@pytest.mark.parametrize("before,after", list(itertools.permutations((1, 2, 3, 4), 2)))
def test_a_run_resumed_on_another_number_of_hosts_loses_and_repeats_no_example(
    numbered, before, after
):
    expected, _ = read(numbered, plan(), 1, 0, 14)
    first, state = read(numbered, plan(), before, 0, 5)
    # What a checkpoint holds, through JSON as Orbax stores it.
    resumed = plan().entered(Position(**json.loads(json.dumps(state))))
    rest, _ = read(numbered, resumed, after, 5, 14)
    assert first + rest == expected


@pytest.mark.slow
@pytest.mark.parametrize("before,after", [((2, 0), (3, 2)), ((3, 2), (1, 0))])
def test_a_run_resumed_with_other_loader_processes_loses_and_repeats_no_example(
    numbered, before, after
):
    (hosts, workers), (more_hosts, more_workers) = before, after
    expected, _ = read(numbered, plan(), 1, 0, 14)
    first, state = read(numbered, plan(), hosts, 0, 5, workers=workers)
    resumed = plan().entered(Position(**json.loads(json.dumps(state))))
    rest, _ = read(numbered, resumed, more_hosts, 5, 14, workers=more_workers)
    assert first + rest == expected


@pytest.fixture(scope="module")
def seventeen(tokenizer):
    budget = Budget(length=640, patches=216, chunks=3, targets=384, segments=3)
    examples = examples_of(tokenizer, Source(17))
    sizes = np.array([[dataclasses.astuple(examples.measure(i)[0][0]) for i in range(17)]])
    return examples, Plan(sizes, budget, seed=3)


def stream_of(examples, plan, steps: int, **options):
    return loader.stream(loader.HostRows(plan.rows(2 * steps), 2), examples, plan.budget, **options)


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_in_the_same_order(seventeen):
    examples, plan = seventeen
    alone = stream_of(examples, plan, 6, threads=1)
    worked = stream_of(examples, plan, 6, threads=2, workers=2)
    for expected, got in zip(alone, worked, strict=True):
        jax.tree.map(np.testing.assert_array_equal, expected[0], got[0])
        assert expected[1] == got[1]


@pytest.mark.slow
def test_an_exception_in_a_worker_process_ends_the_run_with_the_record_named(seventeen, tokenizer):
    broken = examples_of(tokenizer, Source(17, broken=[5], error=TypeError("oops")))
    stream = stream_of(broken, seventeen[1], 6, threads=1, workers=1)
    with pytest.raises(Exception, match=r"made-up-00000-of-00001\[5\] failed with TypeError: oops"):
        list(stream)


class Killer(Source):
    """Kills the process that reads record 5, as the system does when memory runs out."""

    def __getitem__(self, index: int):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.slow
def test_a_killed_worker_process_ends_the_run(seventeen, tokenizer):
    broken = examples_of(tokenizer, Killer(17))
    stream = stream_of(broken, seventeen[1], 6, threads=1, workers=2)
    with pytest.raises(RuntimeError):
        list(stream)
