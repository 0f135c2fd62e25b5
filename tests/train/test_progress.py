"""What a step's line says besides its loss."""

import numpy as np
import pytest

from saber_jax.train.progress import BUDGETS, Console, StepSchedule
from tests.train.test_optimizer import CONFIG


def schedule(passed: int = 0, adapters: bool = False) -> StepSchedule:
    return StepSchedule(CONFIG, 20, adapters=adapters, passed=passed, epochs=lambda n: n / 8)


def test_the_learning_rate_warms_up_and_decays():
    rates = [schedule().after(step, 4)["learning_rate"] for step in range(20)]
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(CONFIG.peak_lr, rel=1e-5)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    with_adapters = schedule(adapters=True).after(peak, 4)["learning_rate"]
    assert with_adapters == pytest.approx(CONFIG.adapter_factor * rates[peak])


def test_a_resumed_run_says_the_same_epochs():
    whole, resumed = schedule(), schedule(passed=3 * 4)
    epochs = [whole.after(step, 4)["epoch"] for step in range(6)]
    assert epochs == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert [resumed.after(step, 4)["epoch"] for step in range(3, 6)] == epochs[3:]


@pytest.mark.parametrize(
    ("seconds", "left"),
    [(9.9, "0:09"), (3725.0, "1:02:05"), (86400.0, "24:00:00"), (1e6, "277:46:40")],
)
def test_the_time_to_go_may_be_days(seconds, left, capsys):
    console = Console(stage="sft", items="clips", steps=3, every=1)
    values = {"seconds": seconds, "input_wait": 0.0, "loss": 1.0}
    values |= {f"padding/{name}": 0.0 for name in BUDGETS}
    values |= {f"speed/{name}_per_second": 1.0 for name in ("tokens", "examples")}
    for step in (0, 1):
        console.add(step, values)
    assert capsys.readouterr().out.endswith(f"  {left} to go\n")
