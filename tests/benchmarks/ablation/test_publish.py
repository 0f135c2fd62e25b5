"""What docs and reports show of an ablation is what was measured."""

import re
import sys
import xml.etree.ElementTree

import numpy as np
import pytest

from benchmarks.ablation import __main__ as ablation
from benchmarks.ablation import arms, compare, plot, publish
from benchmarks.ablation.arms import ARMS
from configs import cadpo, sft
from saber_jax.evaluation import published
from saber_jax.runs.files import read_json, write_json
from tests.benchmarks.ablation import answers

DOCS = publish.DOCS
RIGHT = {"sed": 20, "more_sft": 24, "more_sft_fast": 25, "withhold": 27, "anchored": 34}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    roots = [folder / f"seed_{seed}" for seed in (0, 1, 2)]
    for more, root in enumerate(roots):
        for name, right in RIGHT.items():
            answers.answered(arms.scores_of(root, name), right + 3 * more - 3)
        (root / "done").mkdir()
        write_json(root / "done/sft.json", {"seconds": 5400})
    return roots


@pytest.fixture(scope="module")
def results(roots):
    return publish.data({"seeds": [0, 1, 2], **compare.compared(roots, list(RIGHT))}, roots)


@pytest.fixture
def docs(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "FILE", tmp_path / "ablation.json")
    (tmp_path / "ablation.md").write_text(
        f"# Before\n{publish.BEGIN}\nstale\n{publish.END}\nafter\n"
    )
    return tmp_path


def test_published_data_says_what_it_was_measured_by(results):
    assert results["hours"] == 4.5
    names = " ".join(RIGHT)
    assert results["command"] == f"python -m benchmarks.ablation --seeds 3 --arms {names}"
    config = cadpo.get_config("tiny")
    assert results["settings"]["cadpo"] == published.recipe(config)
    config.seed, config.root = 5, "elsewhere"  # Of one run.
    assert results["settings"]["cadpo"] == published.recipe(config)
    config.loss.beta *= 2
    assert results["settings"]["cadpo"] != published.recipe(config)
    assert results["settings"]["sft"] == published.recipe(sft.get_config("tiny"))


def test_publishing_writes_data_picture_and_tables_and_keeps_the_rest(docs, results):
    publish.publish(results, docs)
    assert read_json(published.FILE) == results
    text = (docs / "ablation.md").read_text()
    assert text.startswith("# Before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert publish.section(results) in text and compare.table(results) in text
    before = text, (docs / "ablation.svg").read_bytes()
    publish.publish(read_json(published.FILE), docs)
    assert before == ((docs / "ablation.md").read_text(), (docs / "ablation.svg").read_bytes())


def test_docs_without_a_place_for_results_are_not_touched(docs, results):
    (docs / "ablation.md").write_text(f"{publish.END}\n{publish.BEGIN}\n")
    with pytest.raises(ValueError, match="once each, in this order"):
        publish.publish(results, docs)
    assert not published.FILE.exists()


@pytest.mark.skipif(not published.FILE.exists(), reason="no ablation is published")
def test_docs_show_the_data_that_is_carried():
    carried = read_json(published.FILE)
    shown = (DOCS / "ablation.md").read_text(encoding="utf-8")
    between = shown.split(publish.BEGIN)[1].split(publish.END)[0].strip()
    assert between == publish.section(carried).strip()
    assert (DOCS / "ablation.svg").read_text(encoding="utf-8") == plot.svg(carried)


def test_docs_name_the_arms_as_the_code_does():
    shown = (DOCS / "ablation.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in shown for name in ARMS)
    assert shown.count(publish.BEGIN) == shown.count(publish.END) == 1


@pytest.mark.parametrize("more", [["--seeds", "1"], ["--quick"]])
def test_one_seed_is_not_published(monkeypatch, capsys, more):
    monkeypatch.setattr(sys, "argv", ["ablation", "--publish", *more])
    with pytest.raises(SystemExit, match="2"):
        ablation.main()
    assert "--publish needs two seeds or more" in capsys.readouterr().err


def test_the_picture_has_a_row_for_every_arm_and_a_ring_for_every_seed(results):
    drawn = plot.svg(results)
    root = xml.etree.ElementTree.fromstring(drawn)
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text in ARMS] == list(RIGHT)
    assert f"{100 * results['arms']['anchored']['conflicting']['value']:.1f}" in texts
    rings, dots = drawn.count('<circle class="seed'), drawn.count("<circle")
    assert rings == 2 * 3 * len(RIGHT) + 1  # And those of the legend.
    assert dots - rings == 2 * len(RIGHT) + 2


def test_every_colour_of_the_picture_has_one_for_the_dark_and_text_stands_out():
    light, dark = plot.STYLE.split("@media (prefers-color-scheme: dark)")
    colours = [
        dict(re.findall(r"([.\w]+) {[^}]*(?:fill|stroke|--series): (#\w+)", part))
        for part in (light, dark)
    ]
    assert colours[0].keys() == colours[1].keys()
    for scheme in colours:
        paper = _luminance(scheme.pop(".page"))
        for kind in ("text", ".soft", ".s0", ".s1"):
            ink = _luminance(scheme[kind])
            assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 4.5  # WCAG AA.


def _luminance(colour: str) -> float:
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_a_measure_that_no_clip_has_is_left_out_of_the_picture(results):
    nothing = {"n": 0, "value": None, "interval": None}
    found = {
        "arms": {
            "sed": {"consistent": nothing, "conflicting": results["arms"]["sed"]["consistent"]}
        },
        "by_seed": {"sed": {"consistent": [None], "conflicting": [0.5]}},
    }
    assert plot.svg(found).count('class="s0"') == 1  # The legend.
