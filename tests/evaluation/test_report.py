import html.parser
import json
import re

import pytest

from saber_jax.data import sed
from saber_jax.data.journal import write_json, write_jsonl
from saber_jax.data.records import FIELDS
from saber_jax.evaluation import charts, report, saber_test

CONFLICT = {"emotion": "contempt", "face": "happy", "voice": "angry", "conflict_type": "sarcasm"}
AGREEMENT = {"emotion": "sad", "face": "sad", "voice": "sad", "conflict_type": "none"}


def _prediction(clip_id, labels, said):
    texts = {field: f"{field} of {clip_id} <b>" for field in FIELDS}
    response = sed.target_text(texts | {"sentiment_analysis": f"So {said}."})
    return {
        "clip_id": clip_id,
        "language": "zh" if clip_id.endswith("1") else "en",
        "response": response,
        "conclusion": sed.conclusion(response),
        "labels": labels,
        "annotation": texts,
    }


def _predictions(*said):
    labels = [CONFLICT] * 5 + [AGREEMENT] * 3
    return [_prediction(f"clip{i}", labels[i], word) for i, word in enumerate(said)]


SED = _predictions("happy", "happy", "angry", "contempt", "contempt", "sad", "sad", "happy")
CADPO = _predictions("contempt", "contempt", "contempt", "contempt", "angry", "sad", "happy", "sad")


@pytest.fixture
def workdir(tmp_path):
    for stage, predictions in (("sft", SED), ("cadpo", CADPO)):
        scores = tmp_path / "eval" / stage
        scores.mkdir(parents=True)
        write_jsonl(scores / "predictions.jsonl", predictions)
        write_json(scores / "scores.json", saber_test.score(predictions))
        run = tmp_path / stage
        run.mkdir()
        loss = 4.25 if stage == "sft" else 0.6931
        rows = [
            {
                "step": step,
                "loss": loss / (step + 1),
                "rewards/margins": 0.125 * step,
                "rewards/accuracies": 0.5 + 0.05 * step,
            }
            for step in range(8)
        ]
        write_jsonl(run / "metrics.jsonl", rows)
        summary = {"stage": stage, "steps": 8, "wall_seconds": 83.4, "unigram_entropy": 4.7333}
        write_json(run / "summary.json", summary | {"parameters": 1508672, "examples": 77})
        write_json(run / "config.json", {"seed": 31337, "optimizer": {"peak_lr": 0.00213}})
    (tmp_path / "pairs").mkdir()
    mined = {"pairs": 417, "answers": 1913, "decisions": {"kept": 417, "unparsable": 1496}}
    mined |= {"pairs_by_withheld": {"audio": 205, "video": 212}}
    mined |= {"pairs_by_conflict_type": {"sarcasm": 417}, "pairs_by_language": {"en": 417}}
    write_json(tmp_path / "pairs" / "summary.json", mined)
    (tmp_path / "corpus" / "clips").mkdir(parents=True)
    for p in SED:
        (tmp_path / "corpus" / "clips" / f"{p['clip_id']}.mp4").write_bytes(b"film")
    return tmp_path


def _page(workdir, *more):
    out = workdir / "report.html"
    assert report.main(["--workdir", str(workdir), "--out", str(out), *more]) == 0
    return out.read_text(encoding="utf-8")


def test_the_page_holds_every_number_of_the_files(workdir):
    page = _page(workdir)
    # Accuracy on 5 conflicts 40 -> 80 %, on 3 agreements 66.7 -> 66.7 %, dominance 60 -> 20 %.
    for shown in ("40.0 → 80.0 %", "66.7 → 66.7 %", "26.7 → −13.3 %", "60.0 → 20.0 %"):
        assert shown in page
    for shown in (">+40.0", ">−40.0", "417 pairs from 1913", ">1496<", ">205<", ">212<"):
        assert shown in page
    for shown in ("1,508,672", "1 min 23 s", ">77<", "4.2500", "0.6931", "31337", "0.00213"):
        assert shown in page
    for shown in ("unigram entropy 4.733", "first 0.000, last 0.875", "first 0.500, last 0.850"):
        assert shown in page
    interval = saber_test.score(SED)["inconsistent"]["accuracy"]["interval"]
    assert f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" in page


def test_the_same_inputs_give_the_same_bytes(workdir):
    assert _page(workdir) == _page(workdir)


class _Checker(html.parser.HTMLParser):
    """Collects addresses, and fails on elements that are not closed in order."""

    VOID = ("meta", "line", "polyline", "br", "link", "img")

    def __init__(self):
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere(workdir):
    page, checker = _page(workdir), _Checker()
    checker.feed(page)
    assert not checker.open
    assert len(checker.addresses) == 7
    assert set(checker.addresses) == {"data:video/mp4;base64,ZmlsbQ=="}
    assert not re.search(r"https?://|@import|url\(|<script", page)


def test_what_the_model_says_is_text_and_never_markup(workdir):
    page = _page(workdir)
    assert "acoustic_feat of clip0 &lt;b&gt;" in page
    assert "<b>" not in page


def test_examples_are_successes_and_failures_and_say_which(workdir):
    kinds = [(kind, old["clip_id"]) for kind, old, _ in report.choose(SED, CADPO)]
    assert kinds == [
        ("Conflict, corrected by CA-DPO", "clip0"),
        ("Conflict, corrected by CA-DPO", "clip1"),
        ("Conflict, corrected by CA-DPO", "clip2"),
        ("Conflict, right in both stages", "clip3"),
        ("Conflict, lost by CA-DPO", "clip4"),
        ("No conflict, right in both stages", "clip5"),
        ("No conflict, lost by CA-DPO", "clip6"),
    ]
    page = _page(workdir)
    assert "✗ incorrect, follows the face" in page
    assert "✗ incorrect, follows the voice" in page
    assert "✓ correct" in page


def test_six_examples_are_found_even_if_all_clips_behave_alike():
    alike = [_prediction(f"clip{i:02d}", CONFLICT, "contempt") for i in range(20)]
    assert len(report.choose(alike, alike)) == 6


def test_without_a_corpus_the_examples_have_no_video(workdir):
    (workdir / "corpus").rename(workdir / "elsewhere")
    assert "<video" not in _page(workdir)
    assert "<video" in _page(workdir, "--corpus", str(workdir / "elsewhere"))


def test_predictions_for_different_clips_are_refused(workdir, capsys):
    write_jsonl(workdir / "eval/cadpo/predictions.jsonl", CADPO[:-1])
    assert report.main(["--workdir", str(workdir), "--out", str(workdir / "r.html")]) == 1
    assert "different clips" in capsys.readouterr().err


def test_a_missing_file_is_named(workdir, capsys):
    (workdir / "cadpo/metrics.jsonl").unlink()
    assert report.main(["--workdir", str(workdir), "--out", str(workdir / "r.html")]) == 1
    assert "cadpo/metrics.jsonl" in capsys.readouterr().err


def test_numbers_that_do_not_exist_are_dashes():
    assert report.percent(None) == report.points(None) == "–"
    assert report.points(-0.05) == "−5.0"
    assert [report.duration(x) for x in (9.4, 61, 7325)] == ["9 s", "1 min 1 s", "2 h 2 min 5 s"]


def test_ticks_are_round_and_enclose_the_data():
    assert charts.ticks(0.3, 4.1, 5) == [0, 1, 2, 3, 4, 5]
    assert charts.ticks(0, 499, 5) == [0, 200, 400, 600]
    assert charts.ticks(0.5, 0.5, 5)[0] <= 0.5 <= charts.ticks(0.5, 0.5, 5)[-1]


def test_long_curves_are_drawn_as_means_of_neighbours():
    curve = [(float(i), float(i % 2)) for i in range(1000)]
    thin = charts.thinned(curve, 100)
    assert len(thin) == 100
    assert thin[0] == (4.5, 0.5)


def test_a_constant_curve_and_a_single_point_can_be_drawn():
    for curve in ([(0, 1.0), (1, 1.0)], [(3, 2.5)]):
        svg = charts.line_chart(curve, x_label="step", y_label="loss")
        assert "nan" not in svg
        assert svg.count("<polyline") == 1


def test_scores_are_json(workdir):
    scores = json.loads((workdir / "eval/sft/scores.json").read_text())
    assert scores == saber_test.score(SED)
