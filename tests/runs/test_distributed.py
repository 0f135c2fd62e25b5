"""Two processes: who holds which rows, who measures what, and how they end."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from saber_jax import sharding
from saber_jax.data import loader
from saber_jax.data.examples import Size
from saber_jax.runs import distributed
from tests.processes import running


def mesh_of(rows: list[list[list[int]]]) -> jax.sharding.Mesh:
    """Devices by (data, fsdp, tensor); `rows` holds their positions in jax.devices()."""
    devices = np.array(jax.devices())[np.array(rows)][:, None, None, :, None]
    auto = (jax.sharding.AxisType.Auto,) * devices.ndim
    return jax.sharding.Mesh(devices, sharding.MESH_AXES, axis_types=auto)


class Numbers:
    """Examples of `index + 1` tokens each, which a process counts as it reads them."""

    requests, fingerprint = (None,), "numbers"

    def __init__(self):
        self.read = []

    def __len__(self):
        return 7

    def measure(self, index):
        self.read.append(index)
        size = Size(**{field.name: index + 1 for field in dataclasses.fields(Size)})
        return [size], index, np.full(index + 1, index)


def global_rows(mesh: jax.sharding.Mesh) -> tuple[list[int], list[int]]:
    """The rows that this process makes of a batch 0..7, and the batch as all devices see it."""
    place = sharding.batch_sharding(mesh)
    local = loader.local_rows(8, place)
    batch = {"x": np.array(local, np.int32)[:, None]}
    whole = loader.to_global(batch, {"x": place}, 8, local)["x"]
    everywhere = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(whole)
    return local, np.asarray(everywhere)[:, 0].tolist()


def worker(folder: str) -> None:
    """What each process does; devices 0 and 1 are the first one's, 2 and 3 the second one's."""
    distributed.initialize(heartbeat_seconds=10)
    with distributed.failing_together():
        numbers = Numbers()
        measured = loader.measure(numbers, Path(folder) / "sizes.npz")
        result = {
            "interleaved": global_rows(mesh_of([[[0], [2]], [[1], [3]]])),
            "tensor across": global_rows(mesh_of([[[0, 2], [1, 3]]])),
            "read": numbers.read,
            "sizes": measured.sizes[0, :, 0].tolist(),
            "counts": measured.token_counts.tolist(),
        }
        path = Path(folder) / f"result{jax.process_index()}.json"
        path.write_text(json.dumps(result))
        distributed.barrier("written")
        if jax.process_index() == 1:
            raise RuntimeError("on purpose")
        distributed.barrier("never")


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    command = ["-m", "tests.runs.test_distributed", str(folder)]
    with running(command, folder, count=2, devices=4) as processes:
        statuses = processes.wait(120)
        results = [folder / f"result{i}.json" for i in range(2)]
        assert all(path.exists() for path in results), processes.text()
        return statuses, [json.loads(path.read_text()) for path in results], processes.text()


@pytest.mark.parametrize(
    ("mesh", "local"),
    [("interleaved", ([0, 1, 4, 5], [2, 3, 6, 7])), ("tensor across", (list(range(8)),) * 2)],
)
def test_rows_come_from_the_process_whose_devices_hold_them(together, mesh, local):
    _, results, _ = together
    for index in range(2):
        assert results[index][mesh] == [local[index], list(range(8))]


def test_measuring_is_shared_and_its_result_is_everybodys(together):
    _, (first, second), _ = together
    assert (first["read"], second["read"]) == ([0, 2, 4, 6], [1, 3, 5])
    for result in (first, second):
        assert result["sizes"] == result["counts"] == [1, 2, 3, 4, 5, 6, 7]


def test_an_exception_in_one_process_ends_both_with_a_failure(together):
    statuses, _, text = together
    assert statuses[1] == 1 and statuses[0] != 0
    assert "RuntimeError: on purpose" in text


def test_a_host_whose_save_failed_does_not_wait_for_the_others(monkeypatch):
    met = []
    monkeypatch.setattr(
        distributed.ocp.multihost, "get_barrier_sync_fn", lambda: lambda **about: met.append(about)
    )
    distributed.meet_to_save(key="written", timeout_ms=1)
    assert met == [{"key": "written", "timeout_ms": 1}]
    with pytest.raises(OSError, match="full"):
        try:
            raise OSError("full")
        finally:
            distributed.meet_to_save(key="finalized", timeout_ms=1)
    assert len(met) == 1


def test_half_a_description_of_the_others_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID set but not JAX_COORDINATOR_ADDRESS, JAX"):
        distributed.place()


def test_a_gke_pod_knows_its_place_among_the_hosts_of_all_slices(monkeypatch):
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    environ = {
        "TPU_WORKER_HOSTNAMES": "a,b,c,d",
        "TPU_WORKER_ID": "2",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert distributed.place() == (6, 8)


def test_sigterm_is_noticed_only_while_somebody_listens():
    before = signal.getsignal(signal.SIGTERM)
    with distributed.Preemption() as preemption:
        assert not preemption.reached()
        signal.raise_signal(signal.SIGTERM)
        assert preemption.reached()
    assert signal.getsignal(signal.SIGTERM) == before


TOGETHER = """
import pathlib, sys
from saber_jax.runs import distributed
distributed.initialize(heartbeat_seconds=10)
import jax
with distributed.failing_together():
    for batch in range(10**6):
        distributed.barrier(f"batch {batch}")
        if distributed.told_to_stop():
            print("stopped at", batch, flush=True)
            sys.exit(distributed.PREEMPTED)
        if batch == 3:
            pathlib.Path(sys.argv[1], f"ready{jax.process_index()}").touch()
"""


def test_sigterm_to_one_process_ends_all_after_the_same_batch(tmp_path):
    with running(["-c", TOGETHER, str(tmp_path)], tmp_path / "logs", count=2, devices=2) as both:
        both.wait_until(lambda: all((tmp_path / f"ready{i}").exists() for i in range(2)), 120)
        both.members[1].send_signal(signal.SIGTERM)
        assert both.wait(120) == 2 * [distributed.PREEMPTED], both.text()
        ends = [re.findall(r"stopped at \d+", log.read_text()) for log in both.logs]
    assert len(ends[0]) == 1 and ends[0] == ends[1]


if __name__ == "__main__":
    worker(sys.argv[1])


EARLY = """
import ctypes, sys
from saber_jax.runs import distributed
libc = ctypes.CDLL(None)
with distributed.ending_early():
    print("ready", flush=True)
    # As a compilation does: the interpreter cannot run a handler until it is over. Another sleep
    # follows, because a signal ends a sleep and does not end a compilation.
    while True:
        libc.sleep(60)
"""


def test_sigterm_while_the_step_compiles_ends_at_once_with_75():
    with subprocess.Popen(
        [sys.executable, "-c", EARLY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == distributed.PREEMPTED
    assert "stopped before the first step" in said


def test_inside_a_preemption_sigterm_only_asks():
    with distributed.ending_early(), distributed.Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached()
