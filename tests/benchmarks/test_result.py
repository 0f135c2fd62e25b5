"""What a benchmark's last line promises."""

import json

import pytest

from benchmarks import result


def finished(capsys, **how) -> tuple[dict, int]:
    with pytest.raises(SystemExit) as end:
        result.finish("speed", value=1.5, unit="x", goal=2.0, device="here", **how)
    return json.loads(capsys.readouterr().out), end.value.code


def test_a_full_run_is_held_against_its_goal(capsys):
    line, code = finished(capsys, reached=False)
    assert (line["goal"], line["ok"], code) == (2.0, False, 1)
    line, code = finished(capsys, reached=True)
    assert (line["ok"], code) == (True, 0)


def test_a_quick_run_prints_no_goal_and_fails_only_for_wrong_results(capsys):
    line, code = finished(capsys, reached=False, quick=True)
    assert "goal" not in line and (line["quick"], line["ok"], code) == (True, True, 0)
    line, code = finished(capsys, reached=True, quick=True, correct=False)
    assert (line["ok"], code) == (False, 1)


def test_a_fast_run_with_wrong_results_is_not_ok(capsys):
    line, code = finished(capsys, reached=True, correct=False)
    assert (line["ok"], code) == (False, 1)
