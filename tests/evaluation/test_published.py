"""A report shows the published ablation beside its own result, where there is one."""

import re

import pytest

from saber_jax.evaluation import published, report
from saber_jax.runs.files import read_json, write_json
from tests.evaluation.report_files import write_run


def _score(value, low, high):
    return {"n": 600, "value": value, "interval": [low, high]}


def _claim(measure, gain):
    return {"before": ["sed"], "after": "anchored", "measure": measure, "gain": gain}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    write_run(tmp_path)
    monkeypatch.setattr(published, "FILE", tmp_path / "ablation.json")
    settings = {
        s: published.recipe(read_json(tmp_path / s / "config.json")) for s in published.ARMS
    }
    found = {
        "date": "2031-05-06",
        "seeds": [1, 2, 3, 4, 5],
        "settings": settings,
        "arms": {
            "anchored": {
                "consistent": _score(0.981, 0.955, 1.0),
                "conflicting": _score(0.723, 0.664, 0.791),
            }
        },
        "claims": [
            _claim("conflicting", _score(0.112, 0.071, 0.153)),
            _claim("consistent", _score(-0.004, -0.012, 0.003)),
        ],
    }
    write_json(published.FILE, found)
    return tmp_path


def _beside(workdir, *more):
    out = workdir / "report.html"
    assert report.main(["--workdir", str(workdir), "--out", str(out), *more]) == 0
    page = out.read_text(encoding="utf-8")
    return page.split('id="beside">')[1].split("</section>")[0] if 'id="beside"' in page else None


def test_a_run_stands_beside_other_seeds_in_plain_words(workdir):
    shown = _beside(workdir)
    said = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", shown))
    assert "CA-DPO: this run beside five other seeds" in said
    assert (
        "Right where they conflict, this run: 80.0 %, +40.0 points over SED [−40.0, +100.0]. Five "
        "other seeds: 72.3 % (95 % interval 66.4 to 79.1), +11.2 points over SED (+7.1 to +15.3)."
    ) in said
    assert "Five other seeds: 98.1 % (95 % interval 95.5 to 100.0), −0.4 points" in said
    assert "measured on 2031-05-06" in said and "other settings" not in said
    assert shown.count('class="whisker"') == 4


def test_settings_that_differ_are_said(workdir):
    config = read_json(workdir / "cadpo/config.json")
    write_json(workdir / "cadpo/config.json", config | {"loss": {"beta": 0.5}})
    assert "trained with other settings than they were" in _beside(workdir)


def test_a_seed_of_the_ablation_is_no_other_seed(workdir):
    found = read_json(published.FILE)
    write_json(published.FILE, found | {"seeds": [31336, 31337]})
    assert "CA-DPO: this run beside two seeds, this one among them" in _beside(workdir)


def test_without_published_results_nothing_is_shown(workdir):
    published.FILE.unlink()
    assert _beside(workdir) is None


def test_a_run_on_another_corpus_or_of_one_stage_shows_nothing(workdir):
    (workdir / "corpus").rename(workdir / "elsewhere")
    assert _beside(workdir) is None
    (workdir / "elsewhere").rename(workdir / "corpus")
    (workdir / "eval/cadpo").rename(workdir / "eval/other")
    assert _beside(workdir) is None
