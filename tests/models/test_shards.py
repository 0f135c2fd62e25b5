"""Weights that are sharded over some FSDP axes; tests/train/test_step.py has those over all."""

import json

from tests.processes import running


def test_widths_that_the_devices_do_not_divide_are_shared_by_some_of_them(tmp_path):
    command = ["-m", "tests.models.six_devices"]
    with running(command, tmp_path, count=1, devices=6) as processes:
        assert processes.wait(300) == [0], processes.text()
        found = json.loads(processes.text().strip().splitlines()[-1])
    assert found["shares"] == {"text": [32, 64], "vision": [16, 32], "audio": [8, 48]}
    assert found["difference"] < 1e-5
