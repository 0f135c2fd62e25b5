"""A training step on CPUs is shared by a process a core, which look like one command."""

import os
import signal
import sys
import textwrap
import threading
import time

import pytest

from configs import cadpo
from launch import chain, processes
from saber_jax.runs import platforms
from saber_jax.runs.distributed import PREEMPTED

CPU = {"JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    ("cores", "rows", "expected"), [(1, 12, 1), (2, 12, 2), (3, 12, 3), (8, 12, 4), (4, 9, 3)]
)
def test_there_are_as_many_as_there_are_cores_and_divide_the_rows(
    monkeypatch, cores, rows, expected
):
    monkeypatch.setattr(processes, "cores", lambda: cores)
    assert processes.count(["python"], rows, CPU) == expected


@pytest.mark.parametrize(
    ("command", "environ"),
    [
        ((), {"JAX_PLATFORMS": "tpu,cpu"}),
        ((), CPU | {"JAX_NUM_PROCESSES": "4"}),
        ((), CPU | {"JAX_NUM_CPU_DEVICES": "8"}),
        ((), CPU | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}),
        ((), CPU | {"PJRT_NPROC": "2"}),
        (("--config.mesh.fsdp=1",), CPU),
    ],
)
def test_a_run_that_is_distributed_otherwise_is_left_alone(monkeypatch, command, environ):
    monkeypatch.setattr(processes, "cores", lambda: 2)
    assert processes.count(command, 12, environ) == 1


def test_only_long_training_is_shared():
    config = cadpo.get_config("tiny")
    rows = {s.name: s.rows for s in chain.steps(config, "configs/cadpo.py:tiny", ())}
    assert rows.pop("sft") == 12  # cadpo takes fewer steps than compiling it twice is worth.
    assert not any(rows.values())


def test_what_is_shared_are_the_rows_of_a_microbatch():
    config = cadpo.get_config("tiny")
    config.steps, config.compute.microbatches = 1000, 4
    rows = {s.name: s.rows for s in chain.steps(config, "configs/cadpo.py:tiny", ())}
    assert rows["cadpo"] == 3


def joined(code: str) -> int:
    return processes.run(
        [sys.executable, "-c", textwrap.dedent(code)], processes.joined(os.environ | CPU, 2)
    )


def test_they_find_each_other_and_the_first_speaks_for_all(capfd):
    status = joined(
        """
        from saber_jax.runs import distributed
        distributed.initialize()
        import jax
        print("process", jax.process_index(), "of", jax.process_count())
        """
    )
    said = capfd.readouterr().out
    assert status == 0 and "process 0 of 2" in said and "process 1" not in said


def test_their_programs_are_not_read_from_the_compilation_cache():
    environs = processes.joined({platforms.CACHE: "/compiled", "A": "b"}, 2)
    assert all(platforms.CACHE not in environ and environ["A"] == "b" for environ in environs)


IN_THE_SECOND = "import os, sys, time\nsecond = os.environ['JAX_PROCESS_ID'] == '1'\n"


def test_the_first_to_fail_decides_and_is_quoted_and_the_others_do_not_stay(monkeypatch, capfd):
    monkeypatch.setattr(processes, "LEAVE_SECONDS", 0.0)
    code = "if second: print('reading'); sys.exit('the disk is full')\ntime.sleep(3600)"
    assert joined(IN_THE_SECOND + code) == 1
    said = capfd.readouterr()
    assert "Process 2 of 2 was the first to fail, with status 1" in said.err
    assert "reading" in said.err and "the disk is full" in said.err
    assert said.out == ""


def test_a_process_that_was_killed_fails_as_in_a_shell(capfd):
    assert joined(IN_THE_SECOND + "second and os.kill(os.getpid(), 9)") == 128 + signal.SIGKILL
    assert "status 137. Its last lines:\n(none)" in capfd.readouterr().err


def test_what_the_first_says_is_enough_where_it_failed_itself(capfd):
    assert joined(IN_THE_SECOND + "second or sys.exit('no such file')") == 1
    assert capfd.readouterr().err == "no such file\n"


def test_all_are_told_to_stop(tmp_path):
    code = f"""
    import os, signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit({PREEMPTED}))
    open({str(tmp_path)!r} + "/" + os.environ["JAX_PROCESS_ID"], "w").close()
    time.sleep(3600)
    """

    def stop_both():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_both, daemon=True).start()
    assert joined(code) == PREEMPTED
