"""The chain runs what is missing, in order, and says how to go on."""

import dataclasses
import errno
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import cadpo
from data_prep.preferences import __main__ as mining
from data_prep.records import dataset
from launch import chain, hours
from saber_jax.runs.distributed import PREEMPTED
from tests import synthetic

ROOT = Path(__file__).parent.parent.parent


def step(name: str, code: str, after: tuple[str, ...] = ()) -> chain.Step:
    return chain.Step(
        name=name, says="a test", command=("python", "-c", code), leaves=str(ROOT), after=after
    )


def appending(log: Path, word: str) -> str:
    return f"open({str(log)!r}, 'a').write({word!r} + ' ')"


def test_steps_run_once_and_in_order(tmp_path, capfd):
    log = tmp_path / "log"
    links = [step("a", appending(log, "a")), step("b", appending(log, "b"), ("a",))]
    chain.run(links, tmp_path)
    chain.run(links, tmp_path)
    assert log.read_text().split() == ["a", "b"]
    assert "nothing left to do" in capfd.readouterr().out


def test_a_log_gets_few_states_of_a_progress_bar(tmp_path, capfd):
    bar = "import time, tqdm; [time.sleep(0.15) for _ in tqdm.tqdm(range(4))]"
    chain.run([step("a", bar)], tmp_path)
    assert capfd.readouterr().err.count("\r") == 2  # The first and the last.


def test_a_failing_step_ends_the_chain_with_its_status_and_is_run_again(tmp_path, capfd):
    log = tmp_path / "log"
    first = step("a", appending(log, "a"))
    with pytest.raises(SystemExit) as failure:
        chain.run([first, step("b", "raise SystemExit(7)", ("a",))], tmp_path)
    assert failure.value.code == 7
    assert "goes on from here" in capfd.readouterr().err
    chain.run([first, step("b", appending(log, "b"), ("a",))], tmp_path)
    assert log.read_text().split() == ["a", "b"]


def test_a_changed_step_is_run_again_with_everything_that_stands_on_it(tmp_path):
    log = tmp_path / "log"
    rest = [step("b", appending(log, "b"), ("a",)), step("c", appending(log, "c"))]
    chain.run([step("a", appending(log, "a")), *rest], tmp_path)
    chain.run([step("a", appending(log, "A")), *rest], tmp_path)
    assert log.read_text().split() == ["a", "b", "c", "A", "b"]


def training(config: ConfigDict, *settings: str) -> chain.Step:
    links = chain.steps(config, "configs/cadpo.py:tiny", settings)
    step = next(link for link in links if link.name == "cadpo")
    trains = ("python", "-c", "print('trained')")
    return dataclasses.replace(step, command=trains, after=(), leaves=str(ROOT))


def test_an_edited_config_is_another_run_and_a_chattier_one_is_not(tmp_path, capfd):
    chain.run([training(cadpo.get_config("tiny"))], tmp_path)
    chatty = cadpo.get_config("tiny")
    chatty.log_every = 1
    chain.run([training(chatty, "--config.log_every=1")], tmp_path)
    assert capfd.readouterr().out.count("trained\n") == 1
    edited = cadpo.get_config("tiny")
    edited.optimizer.peak_lr = 1e-3
    chain.run([training(edited)], tmp_path)
    assert "trained\n" in capfd.readouterr().out


def test_a_seed_is_the_whole_chain_s():
    config = cadpo.get_config("tiny")
    config.seed = 7
    links = {s.name: s for s in chain.steps(config, "configs/cadpo.py:tiny", ("--config.seed=7",))}
    assert links["corpus"].command[-2:] == ("--seed", "7")
    assert "--config.seed=7" in links["sft"].command and links["sft"].does["seed"] == 7


def test_the_tiny_chain_goes_from_clips_to_the_report():
    config = cadpo.get_config("tiny")
    names = [link.name for link in chain.steps(config, "configs/cadpo.py:tiny", ())]
    assert names == [
        *("corpus", "records", "sft", "pairs", "cadpo"),
        *("evaluate_sft", "evaluate_cadpo", "export", "report"),
    ]


def test_records_of_ones_own_replace_the_embedded_corpus():
    config = cadpo.get_config("tiny")
    config.data.path = "/data/mine"
    links = {s.name: s for s in chain.steps(config, "configs/cadpo.py:tiny", ())}
    assert "corpus" not in links and "records" not in links
    assert "--config.data.path=/data/mine" in links["sft"].command


def own_records(folder: Path, *splits: str):
    """A config for records with these splits, and its chain."""
    dataset.write(folder, {split: [0] for split in splits}, synthetic.record)
    config = cadpo.get_config("tiny")
    config.data.path = str(folder)
    return config, chain.steps(config, "configs/cadpo.py:tiny", ())


def test_splits_that_later_steps_read_are_asked_for_before_stage_1(tmp_path):
    with pytest.raises(SystemExit) as refused:
        chain.refuse_missing_splits(*own_records(tmp_path, "train"))
    for said in ("'preference' for pairs, cadpo", "'test' for evaluate_sft", "splits train, but"):
        assert said in str(refused.value)
    config, steps = own_records(tmp_path / "whole", "train", "preference", "test")
    chain.refuse_missing_splits(config, steps)
    with pytest.raises(SystemExit, match="'preference' for pairs"):
        chain.refuse_missing_splits(*own_records(tmp_path / "tested", "train", "test"))
    # What is not reached needs nothing.
    config, steps = own_records(tmp_path / "first", "train")
    chain.refuse_missing_splits(config, chain.until(steps, "sft"))


def test_records_that_the_chain_makes_are_not_asked_for():
    config = cadpo.get_config("tiny")
    chain.refuse_missing_splits(config, chain.steps(config, "configs/cadpo.py:tiny", ()))


def test_a_start_and_pairs_of_ones_own_are_not_made(tmp_path):
    config = cadpo.get_config("tiny")
    config.init.checkpoint, config.data.pairs = "/elsewhere/sft", "/elsewhere/pairs.jsonl"
    links = {s.name: s for s in chain.steps(config, "configs/cadpo.py:tiny", ())}
    assert "sft" not in links and "pairs" not in links
    assert "/elsewhere/sft" in links["evaluate_sft"].command
    assert "--pairs" not in links["report"].command


def test_the_model_that_stage_1_began_with_is_evaluated_too():
    config = cadpo.get_config("7b")
    config.root = "/runs/7b"
    links = {s.name: s for s in chain.steps(config, "configs/cadpo.py:7b", ())}
    command = links["evaluate_base"].command
    assert command[command.index("--checkpoint") + 1] == "/runs/7b/init"
    assert "--spell_out" in command and "--spell_out" not in links["evaluate_sft"].command
    report = links["report"]
    assert report.command[report.command.index("--base_scores") + 1] == "/runs/7b/eval/base"
    assert "evaluate_base" in report.after


def mined(*settings: tuple[str, object], variant: str = "tiny") -> list[str]:
    """The command that mines pairs."""
    config = cadpo.get_config(variant)
    config.mining.update(dict(settings))
    links = chain.steps(config, f"configs/cadpo.py:{variant}", ())
    return list(next(link for link in links if link.name == "pairs").command)


def test_pairs_are_mined_by_the_method_of_the_config():
    assert mined()[mined().index("--method") + 1] == "withhold"
    assert mining._flags(mined()[3:]).batch_size == cadpo.get_config("tiny").generation.batch_size
    assert mining._flags(mined()[3:]).all_clips
    assert mining._flags(mined(("method", "sample"))[3:]).all_clips
    flags = mining._flags(mined(variant="7b")[3:])
    assert not flags.all_clips
    assert (flags.method, flags.samples, flags.temperature) == ("sample", 10, 0.8)
    judged = mined(
        ("method", "sample"), ("scorer", "judge"), ("judge", "URL"), ("judge_model", "J")
    )
    assert mining._flags(judged[3:]).judge_model == "J"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((("method", "samples"),), "config.mining.method is 'samples'"),
        ((("method", "sample"), ("scorer", "judge")), "needs config.mining.judge"),
    ],
)
def test_mining_that_could_not_work_is_refused_before_stage_1(settings, said):
    with pytest.raises(SystemExit, match=said):
        mined(*settings)


def test_a_chain_may_stop_after_a_step_and_go_on_elsewhere(tmp_path, capfd):
    log = tmp_path / "log"
    links = [step(name, appending(log, name)) for name in ("a", "b", "c")]
    chain.run(chain.until(links, "b"), tmp_path)
    assert log.read_text().split() == ["a", "b"]
    chain.run(chain.until(links, ""), tmp_path)
    assert log.read_text().split() == ["a", "b", "c"]
    with pytest.raises(SystemExit, match="--until=d is no step; there are a, b, c"):
        chain.until(links, "d")


def test_a_disk_that_fails_for_a_while_does_not_cost_the_step(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(chain.turns, "RETRY_SECONDS", 0.01)
    failures, log = iter([True] * 3), tmp_path / "log"
    write, read = chain.write_json, Path.read_text

    def failing(path, value):
        if next(failures, False):
            raise OSError(errno.EIO, "Input/output error", str(path))
        write(path, value)

    monkeypatch.setattr(chain, "write_json", failing)
    chain.run([step("a", appending(log, "a"))], tmp_path)
    stale = iter([True] * 2)

    def stale_read(path, *args, **options):
        if path.name == "a.json" and next(stale, False):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", stale_read)
    chain.run([step("a", appending(log, "a"))], tmp_path)
    assert log.read_text().split() == ["a"] and next(stale, None) is None


def test_chip_hours_count_every_attempt_of_a_step(tmp_path, capfd, monkeypatch):
    chain.run([step("a", "pass")], tmp_path)
    assert "chip-hours" not in capfd.readouterr().out  # There are none here.
    monkeypatch.setattr(chain.hardware, "tpu_chips", lambda: 4)
    with pytest.raises(SystemExit):
        chain.run([step("b", "raise SystemExit(1)")], tmp_path)
    chain.run([step("b", "pass")], tmp_path)
    noted = [(e["step"], e["chips"], e["done"]) for e in hours.entries(tmp_path)]
    assert noted == [("a", 0, True), ("b", 4, False), ("b", 4, True)]
    assert "chip-hours: 0.0 (a 0.0, b 0.0)" in capfd.readouterr().out


def test_every_path_follows_the_root():
    config = cadpo.get_config("tiny")
    config.root = "/elsewhere"
    paths = json.dumps([s.command for s in chain.steps(config, "configs/cadpo.py:tiny", ())])
    assert "runs/tiny" not in paths and "/elsewhere/cadpo" in paths


def test_what_was_deleted_is_made_again(tmp_path):
    made = tmp_path / "made"
    link = chain.Step(
        name="a",
        says="a test",
        command=("python", "-c", f"import pathlib; pathlib.Path({str(made)!r}).mkdir()"),
        leaves=str(made),
    )
    chain.run([link], tmp_path)
    made.rmdir()
    chain.run([link], tmp_path)
    assert made.exists()


def stamps(config: ConfigDict, *settings: str) -> dict[str, tuple]:
    """The inputs (`does`) of each step of a chain, by name."""
    links = chain.steps(config, "configs/cadpo.py:tiny", settings)
    return {s.name: (s.command, s.does, s.after, s.leaves) for s in links}


@pytest.mark.parametrize("kind", ["adapters", "workdir"])
def test_another_stage_2_starts_from_the_same_stage_1_and_lies_beside_the_first(kind):
    first = stamps(cadpo.get_config("tiny"))
    config = cadpo.get_config("tiny")
    if kind == "adapters":
        config.lora.rank = 8
        typed, place = "--config.lora.rank=8", "runs/tiny/cadpo-lora8"
    else:
        config.workdir = place = "runs/tiny/other"
        typed = "--config.workdir=runs/tiny/other"
    second, name = stamps(config, typed), Path(place).name
    shared = ["corpus", "records", "sft", "pairs", "evaluate_sft"]
    assert {step: second[step] for step in shared} == {step: first[step] for step in shared}
    own = {step: leaves for step, (*_, leaves) in second.items() if step not in shared}
    assert own == {
        name: place,
        f"evaluate_{name}": f"{place}/eval/cadpo/scores.json",
        f"export_{name}": f"{place}/hf",
        f"report_{name}": f"{place}/report.html",
    }
    assert f"--config.workdir={place}" in second[name][0]


def test_two_work_directories_are_two_runs_though_their_settings_are_equal():
    config = cadpo.get_config("tiny")
    config.workdir = "/elsewhere/cadpo"
    does = next(does for name, (_, does, *_) in stamps(config).items() if "elsewhere" in name)
    assert does != stamps(cadpo.get_config("tiny"))["cadpo"][1]


HOST = """
import json, sys
from pathlib import Path
from launch import chain, hours
links, root, index = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
chain.run([chain.Step(**link) for link in links], root, (index, 2))
"""


def test_two_hosts_do_their_shares_which_the_first_one_joins(tmp_path):
    log = tmp_path / "log"
    share = f"import sys; open({str(log)!r}, 'a').write(sys.argv[-1] + ' ')"
    links = [
        dataclasses.asdict(step("a", appending(log, "a"))),
        dataclasses.asdict(step("b", appending(log, "joined")))
        | {"share": ("python", "-c", share)},
    ]
    for again in (False, True):
        hosts = [
            subprocess.Popen(
                [sys.executable, "-c", HOST, json.dumps(links), str(tmp_path), str(index)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]
        said = [host.communicate(timeout=120)[0] for host in hosts]
        assert [host.returncode for host in hosts] == [0, 0]
        first, *shares, last = log.read_text().split()
        assert (first, sorted(shares), last) == ("a", ["1/2", "2/2"], "joined")
        assert ["nothing left to do" in text for text in said] == [again, again]


def test_a_chain_that_is_told_to_stop_says_so_and_ends_as_a_preempted_run_does(tmp_path):
    going = tmp_path / "going"
    code = f"import pathlib, time; pathlib.Path({str(going)!r}).touch(); time.sleep(60)"
    program = textwrap.dedent(f"""
        from pathlib import Path
        from launch import chain, hours
        link = chain.Step(name="a", says="", command=("python", "-c", {code!r}), leaves="")
        chain.run([link], Path({str(tmp_path)!r}))
    """)
    running = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not going.exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    running.terminate()
    _, said = running.communicate(timeout=30)
    assert running.returncode == PREEMPTED and b"stopped as asked" in said
