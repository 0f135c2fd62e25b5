"""Training as a whole: a killed run and its continuation equal an uninterrupted one."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from configs import cadpo, sft
from data_prep.records import dataset
from saber_jax import main, sharding
from saber_jax import reference as reference_command
from saber_jax.models import saber
from saber_jax.runs import lock
from saber_jax.runs.files import read_jsonl, write_jsonl
from saber_jax.train import checkpoint, loop
from saber_jax.train import stage as stages
from saber_jax.train.preference import Preference
from saber_jax.tree import flatten, merge
from tests import synthetic
from tests.finished_run import load
from tests.network import asked_hosts


def build_records(out, tokenizer, count):
    """Built records of `count` made-up clips, the same in both splits."""
    made = [synthetic.record(i, words=2) for i in range(count)]
    dataset.write(out, {"train": made, "preference": made}, lambda record: record)
    (out / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    return out


@pytest.fixture(scope="module")
def records(tmp_path_factory, tokenizer):
    return build_records(tmp_path_factory.mktemp("records"), tokenizer, 8)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Shares compiled programs, also with the other workers: every run compiles the same steps."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    jax.config.update("jax_compilation_cache_dir", str(shared / "compiled"))
    yield
    jax.config.update("jax_compilation_cache_dir", None)


def config_for(module, records, root, **changes):
    config = module.get_config("tiny")
    config.root = str(root)
    config.data.path = str(records)
    config.steps, config.checkpoint_every = 4, 2
    config.optimizer.peak_lr = 2e-3 if config.stage == "sft" else 3e-5
    config.data.batch_rows = 2
    config.data.length, config.data.patches, config.data.chunks = 256, 72, 1
    config.data.segments, config.data.targets, config.compute.head_chunk = 1, 128, 128
    for key, value in changes.items():
        config[key] = value
    return config


def metrics_of(root, stage):
    lines = (root / stage / "metrics.jsonl").read_text().splitlines()
    timing = ("seconds", "input_wait", "speed/")
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(timing)} for line in lines
    ]


def params_of(root, stage):
    return flatten(load(root / stage)[0])


def train_until_killed(config, monkeypatch):
    """Waits until the metrics of step 2 are written."""
    write = loop.MetricsWriter.write

    def dying(self, step, values):
        write(self, step, values)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricsWriter, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            main.train(config)


@pytest.fixture(scope="module")
def asked():
    with asked_hosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def whole(records, tmp_path_factory, asked):
    root = tmp_path_factory.mktemp("whole")
    main.train(config_for(sft, records, root))
    return root


def test_a_killed_run_goes_on_to_the_same_weights_and_metrics(
    records, whole, tmp_path, monkeypatch
):
    train_until_killed(config_for(sft, records, tmp_path), monkeypatch)
    assert not (tmp_path / "sft" / "summary.json").exists()

    main.train(config_for(sft, records, tmp_path))
    assert metrics_of(tmp_path, "sft") == metrics_of(whole, "sft")
    expected = params_of(whole, "sft")
    for name, leaf in params_of(tmp_path, "sft").items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


@pytest.mark.slow
def test_a_run_counted_in_epochs_and_examples_ends_with_its_epoch_also_after_a_kill(
    records, tmp_path, monkeypatch
):
    config = config_for(sft, records, tmp_path, steps=None, epochs=1)
    config.data.batch_examples = 1  # Of the two that its rows would hold.
    train_until_killed(config, monkeypatch)
    main.train(config)
    epochs = [line["epoch"] for line in metrics_of(tmp_path, "sft")]
    assert epochs == [n / 8 for n in range(1, 9)]
    assert json.loads((tmp_path / "sft/summary.json").read_text())["epochs_finished"] == 1


def test_the_loss_falls(whole):
    losses = [line["loss"] for line in metrics_of(whole, "sft")]
    assert losses[-1] < losses[0]


def test_a_run_asks_nobody_outside_this_machine(whole, asked):
    assert set(asked) <= {"127.0.0.1", "::1", "localhost"}


def test_a_work_directory_of_another_config_is_refused_by_name(records, whole):
    config = config_for(sft, records, whole)
    config.optimizer.peak_lr = 0.5
    with pytest.raises(ValueError, match=r"optimizer\.peak_lr: 0\.002 there, 0\.5 here"):
        main.train(config)


def refused(config):
    """The error of a run that cannot start."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        main.train(config)
    return str(error.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"validate.examples": 4, "validate.keep_best": "accuracy"},  # Of stage 2.
            "in the stage sft, or empty to keep none; got 'accuracy'",
        ),
        ({"on_nonfinite": "halt"}, "on_nonfinite must be stop, skip, rollback, got 'halt'"),
        ({"profile.steps": "5:1"}, "config.profile.steps must be first:last"),
        ({"steps": 0}, "config.steps must be at least 1, got 0"),
        ({"mesh.tensor": 3}, "config.mesh"),
        ({"data.path": "/nowhere"}, "/nowhere"),
        ({"init.checkpoint": "/nowhere"}, "/nowhere is not a checkpoint"),
        ({"compute.microbatches": 3}, "config.compute.microbatches=3"),
    ],
)
def test_a_failed_validation_leaves_nothing_behind(records, tmp_path, wrong, said):
    config = config_for(sft, records, tmp_path / "run")
    config.update_from_flattened_dict(wrong)
    assert said in refused(config)
    assert not list(tmp_path.rglob("*.json*")) and not (tmp_path / "run/sft").exists()


def test_two_runs_never_share_a_work_directory(records, tmp_path):
    config = config_for(sft, records, tmp_path)
    with lock.held(config.workdir):
        assert "is in use by process" in refused(config)
    assert not (tmp_path / "sft").exists()


def test_the_learning_rate_of_an_unfinished_run_may_change_and_is_logged(
    records, tmp_path, monkeypatch, capsys
):
    config = config_for(sft, records, tmp_path)
    train_until_killed(config, monkeypatch)
    config.optimizer.peak_lr = 1e-3
    main.train(config)
    said = "optimizer.peak_lr: 0.002 there, 0.001 here"
    assert f"settings changed at step 2: {said}" in capsys.readouterr().out
    assert read_jsonl(tmp_path / "sft/changes.jsonl") == [{"step": 2, "changed": [said]}]


def test_a_run_of_an_earlier_version_goes_on_although_a_setting_is_new(records, tmp_path):
    config = config_for(sft, records, tmp_path)
    workdir = tmp_path / "sft"
    workdir.mkdir()
    main.claim(workdir, config)
    stored = json.loads((workdir / "config.json").read_text())
    del stored["optimizer"]["mu_dtype"]
    (workdir / "config.json").write_text(json.dumps(stored))
    assert main.check_claim(workdir, config) == []
    config.optimizer.mu_dtype = "bfloat16"
    with pytest.raises(ValueError, match="mu_dtype: float32 there, bfloat16 here"):
        main.check_claim(workdir, config)


def test_a_rollback_goes_on_from_the_checkpoint_without_the_records(
    records, tmp_path, monkeypatch, capsys
):
    config = config_for(sft, records, tmp_path, on_nonfinite="rollback")
    config.data.max_bad_fraction = 0.5
    report, left = loop.Observers.report, [3]

    def spoiled(self, step, metrics, *rest):
        if step in left:
            left.remove(step)
            metrics = metrics | {"loss": np.float32(np.nan)}
        report(self, step, metrics, *rest)

    monkeypatch.setattr(loop.Observers, "report", spoiled)
    main.train(config)
    assert "resuming sft at step 2" in capsys.readouterr().out
    [line] = read_jsonl(tmp_path / "sft/nonfinite.jsonl")
    assert line["step"] == 3 and len(line["records"]) == 2
    assert read_jsonl(tmp_path / "sft/quarantine.jsonl") == line["records"]
    *_, last = metrics_of(tmp_path, "sft")
    assert last["left_out"] == 2 and last["epoch"] == 1.0


def write_pairs(path):
    pair = {"chosen": "[video_desc] calm red room", "rejected": "[video_desc] quiet person"}
    write_jsonl(path, [{"clip_id": f"clip{i}", **pair} for i in range(8)])


def preferring(records, root):
    """Stage 2 in the paper's form, whose loss starts at log 2."""
    write_pairs(root / "pairs.jsonl")
    config = config_for(cadpo, records, root)
    config.data.pairs, config.data.response = str(root / "pairs.jsonl"), 64
    config.loss.sft = config.loss.anchor = 0.0
    return config


def test_cadpo_starts_at_zero_margin_from_cached_references(records, whole):
    main.train(preferring(records, whole))
    first, *_, last = metrics_of(whole, "cadpo")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert last["rewards/margins"] > 0
    assert first["sensitivity/audio"] and first["entropy"] > 0 and "entropy" not in last
    assert first["kl/chosen"] == pytest.approx(0.0, abs=1e-6) and "margins/none" not in first


def test_a_restart_of_stage_2_reads_no_weights_but_those_of_its_own_checkpoint(
    records, whole, monkeypatch
):
    config = preferring(records, whole)
    config.workdir = str(whole / "restarted")
    train_until_killed(config, monkeypatch)
    monkeypatch.setattr(checkpoint, "load_params", lambda *_: pytest.fail("read the start"))
    main.train(config)
    assert [line["step"] for line in metrics_of(whole, "restarted")] == [0, 1, 2, 3]


def test_the_reference_cache_is_used_again_and_refused_by_name_when_foreign(
    records, whole, monkeypatch
):
    config = config_for(cadpo, records, whole)
    config.data.pairs, config.data.response = str(whole / "pairs.jsonl"), 64
    computed = lambda *_: pytest.fail("computed again")  # noqa: E731
    monkeypatch.setattr(stages.CaDpo, "reference_step", lambda *_: computed)
    reference_command.run(config)
    config.init.checkpoint = str(whole / "cadpo")
    with pytest.raises(
        ValueError, match=r"reference/whole holds .* another run \(weights: \w+ there"
    ):
        reference_command.run(config)


@pytest.mark.parametrize(
    ("option", "key"), [("conflict_power", "kappa"), ("sensitivity", "withheld")]
)
def test_a_loss_option_that_the_pairs_cannot_serve_is_refused(records, whole, option, key):
    config = config_for(cadpo, records, whole)
    config.data.pairs, config.loss[option] = str(whole / "pairs.jsonl"), 0.5
    with pytest.raises(ValueError, match=rf"{option}.* needs '{key}' of every pair, but 8 of 8"):
        stages.checked_pairs(config, Preference(**config.loss))


@pytest.fixture(scope="module")
def adapted(records, tmp_path_factory):
    """The work directory of a LoRA run, and its last state."""
    root, states = tmp_path_factory.mktemp("adapted"), []
    run = loop.run

    def watched(*args, **kwargs):
        states.append(run(*args, **kwargs))
        return states[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run", watched)
        main.train(lora_config(sft, records, root))
    return root, states[0]


def lora_config(module, records, root, **changes):
    config = config_for(module, records, root, **changes)
    config.lora.rank = 4
    config.optimizer.peak_lr, config.optimizer.warmup_steps = 2e-3, 1
    config.optimizer.vocabulary_steps = 0  # Adapters are none of the vocabulary.
    return config


def test_adapters_that_would_rest_while_the_vocabulary_learns_are_refused(records, tmp_path):
    config = lora_config(sft, records, tmp_path)
    config.optimizer.vocabulary_steps = 50
    mesh = sharding.make_mesh(**config.mesh)
    with pytest.raises(ValueError, match="vocabulary_steps=50 would train nothing"):
        stages.build(config, mesh)
    config.lora.trainable = ("lora/*", "text/embed")
    assert "text/embed" in stages.build(config, mesh).state.trainable


def arrays(tree):
    return {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}


def assert_equal(got, want):
    for name, leaf in want.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)


def test_adapters_learn_while_the_base_stays_bit_identical_and_is_not_saved_again(adapted):
    root, state = adapted
    losses = [line["loss"] for line in metrics_of(root, "sft")]
    assert losses[-1] < losses[0]
    params, cfg = load(root / "sft")
    base = checkpoint.load_params(root / "sft/base", dataclasses.replace(cfg, lora=None))
    assert_equal(state.frozen, arrays(base))
    assert_equal(arrays(params), arrays(base) | arrays(merge(state.trainable)))
    assert all(leaf.any() for leaf in arrays(params["lora"]).values())
    saved = root / "sft/checkpoints/4"
    with ocp.StandardCheckpointer() as checkpointer:
        names = flatten(checkpointer.metadata(saved / "params").item_metadata.tree)
        moments = jax.tree.leaves(checkpointer.metadata(saved / "opt_state").item_metadata.tree)
    assert set(names) == set(flatten({"lora": params["lora"]}))
    shapes = sorted(leaf.shape for leaf in moments if leaf.shape)
    assert shapes == sorted([leaf.shape for leaf in names.values()] * 2)


def test_a_lora_run_resumes_to_the_same_adapters(records, adapted, tmp_path, monkeypatch):
    train_until_killed(lora_config(sft, records, tmp_path), monkeypatch)
    main.train(lora_config(sft, records, tmp_path))
    assert metrics_of(tmp_path, "sft") == metrics_of(adapted[0], "sft")
    assert_equal(params_of(tmp_path, "sft"), params_of(adapted[0], "sft"))


@pytest.fixture
def nothing_from_the_cache():
    """Compiles afresh. Of a program with several all-gathers that XLA's CPU compiler reads from the
    persistent cache, the devices' threads take one gather for another: an abort, or other numbers.
    """
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("nothing_from_the_cache")
def test_stage_2_adapts_what_stage_1_and_its_adapters_made_together(records, adapted):
    root, _ = adapted
    write_pairs(root / "pairs.jsonl")
    config = lora_config(cadpo, records, root)
    config.data.pairs, config.data.response = str(root / "pairs.jsonl"), 64
    main.train(config)
    first, *_, last = metrics_of(root, "cadpo")
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert last["rewards/margins"] > 0
    stage_1, cfg = load(root / "sft")
    stage_2, _ = load(root / "cadpo")
    together = arrays(saber.merge_lora(stage_1, cfg))
    for name, leaf in arrays(saber.without_lora(stage_2)).items():
        np.testing.assert_allclose(leaf, together[name], atol=1e-6, err_msg=name)


def test_adapters_are_refused_where_their_base_has_changed(records, adapted, tmp_path):
    root = shutil.copytree(adapted[0], tmp_path / "moved")
    load(root / "sft")
    cfg = load(root / "sft")[1]
    base = checkpoint.load_params(root / "sft/base", dataclasses.replace(cfg, lora=None))
    shutil.rmtree(root / "sft/base")
    checkpoint.save_params(root / "sft/base", base, dataclasses.replace(cfg, lora=None))
    with pytest.raises(ValueError, match=r"adapters for step 0 of .*base, which now holds other"):
        load(root / "sft")
