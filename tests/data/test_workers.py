"""Loader processes and a SIGTERM that reaches every process of a session."""

import os
import signal
import time

import grain

from saber_jax.data.workers import in_processes, sigterm_held

COUNT = 40


class Slow:
    """Elements that are slow to make; each is the id of the process that made it."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, int]:
        time.sleep(0.02)
        return {"index": index, "process": os.getpid()}


def children() -> list[int]:
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def test_loader_processes_go_on_after_a_sigterm_however_early_it_comes():
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    dataset = grain.MapDataset.source(Slow()).to_iter_dataset(options)
    heard, before = [], set(children())
    handler = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    try:
        iterator = iter(in_processes(dataset, 2))
        with sigterm_held():
            elements = [next(iterator)]
            os.kill(os.getpid(), signal.SIGTERM)
        assert heard  # This process hears it, only later.
        for process in set(children()) - before:
            os.kill(process, signal.SIGTERM)
        elements += list(iterator)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert sorted(element["index"] for element in elements) == list(range(COUNT))
    assert len({element["process"] for element in elements}) == 2


def test_a_process_started_while_sigterm_is_held_never_dies_of_it():
    with sigterm_held():
        child = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "60")
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
