"""What a call in a process of its own may do to the process that asks for it: nothing."""

import dataclasses
import os
import signal
import time

import numpy as np
import pytest

from saber_jax.data import isolation
from saber_jax.data.frame_sampling import MediaError


@dataclasses.dataclass(frozen=True)
class Task:
    """Returns its number, late if it is even, or kills the process that it runs in."""

    number: int
    crashes: bool = False

    def __call__(self) -> int:
        if self.crashes:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05 if self.number % 2 == 0 else 0)
        return self.number


def test_what_runs_ahead_keeps_its_order_and_a_crash_to_itself():
    taken = []

    def tasks():
        for number in range(24):
            taken.append(number)
            yield Task(number, crashes=number == 3)

    for number, (task, result) in enumerate(isolation.ahead(tasks(), 2)):
        assert task.number == number and len(taken) <= number + 8
        want = "the file cannot be decoded: the decoder crashed" if task.crashes else str(number)
        assert str(result) == want
    assert len(taken) == 24


@pytest.fixture(scope="module")
def worker():
    return isolation.Worker(seconds=1, memory=1 << 30)


@pytest.mark.parametrize(
    "function, argument, why",
    [
        (time.sleep, 60, "longer than 1 s"),
        (np.ones, 1 << 30, "more than 1 GiB of memory"),
        (os.abort, None, "the decoder crashed"),
    ],
)
def test_a_hang_too_much_memory_and_a_crash_are_named_and_the_next_call_is_made(
    worker, function, argument, why
):
    with pytest.raises(MediaError, match=why):
        worker.call(function, *([] if argument is None else [argument]))
    assert worker.call(abs, -7) == 7


def test_other_errors_come_back_as_they_are_with_where_they_were_raised(worker):
    with pytest.raises(FileNotFoundError) as found:
        worker.call(os.stat, "/nowhere")
    assert found.value.filename == "/nowhere" and "in serve" in found.value.__notes__[0]


def test_a_worker_is_kept_for_the_next_call_and_ends_with_its_owner():
    worker = isolation.Worker()
    process = worker.call(os.getpid)
    assert worker.call(os.getpid) == process != os.getpid()
    del worker
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
