import html.parser
import json
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from saber_jax.evaluation import charts, figure, report, report_examples, report_tables, saber_test
from saber_jax.runs.files import read_json, write_json, write_jsonl
from tests.evaluation.report_files import CADPO, SED, write_run


@pytest.fixture
def workdir(tmp_path):
    write_run(tmp_path)
    for row in SED:
        (tmp_path / "corpus" / "clips" / f"{row['clip_id']}.mp4").write_bytes(b"film")
    return tmp_path


def _page(workdir, *more):
    out = workdir / "report.html"
    assert report.main(["--workdir", str(workdir), "--out", str(out), *more]) == 0
    return out.read_text(encoding="utf-8")


def _examples(page):
    return json.loads(re.search(r'id="examples">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_every_number_of_the_files(workdir):
    page = _page(workdir)
    # Accuracy on 5 conflicts 40 -> 80 %, on 3 agreements 66.7 -> 66.7 %, dominance 60 -> 20 %.
    cards = page.split('class="grid hero"')[1].split("</section>")[0]
    bars = re.findall(r"<b>([\d.]+)</b>", cards)
    assert bars == ["66.7", "66.7", "40.0", "80.0", "60.0", "20.0"]
    for shown in ("0.0 points", "+40.0 points", "−40.0 points"):
        assert shown in cards
    for shown in (
        ">+40.0",
        ">−40.0",
        "26.7 <small>",
        "−13.3 <small>",
        "417 pairs from 1913",
        ">1496<",
        ">205<",
        ">212<",
    ):
        assert shown in page
    for shown in ("1,508,672", ">77<", "4.2500", "0.6931", "31337", "0.00213"):
        assert shown in page
    for shown in ("unigram entropy 4.733", "first 0.000, last 0.875", "first 0.500, last 0.850"):
        assert shown in page
    # Curves of some steps only, and those of evidence apart from those of conflicts.
    by = "CA-DPO: reward margin by"
    assert re.search(rf"{by} type of conflict</h3>.*?first 0.400, last 1.000", page)
    assert re.search(rf"{by} kind of evidence</h3>.*?first 0.000, last 0.700", page)
    interval = saber_test.score(SED)["inconsistent"]["accuracy"]["interval"]
    assert f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" in page
    # Clips right in both stages, won, lost and wrong in both, of conflicts and of agreements.
    for counts in ((1, 3, 1, 0), (1, 1, 1, 0)):
        cells = [rf"<td[^>]*>{count}</td>" for count in counts]
        assert re.search("".join(cells), page)


def test_a_change_has_a_colour_only_if_its_interval_leaves_out_zero(workdir):
    page = _page(workdir)
    # One clip of three won and one lost; of five conflicts two won and one lost.
    assert re.search(r'<td class="number">\+?0\.0 <small>\[−', page)
    wins = [row | {"response": CADPO[0]["response"], "conclusion": "contempt"} for row in SED[:5]]
    write_jsonl(workdir / "eval/sft/predictions.jsonl", _misled(SED))
    write_jsonl(workdir / "eval/cadpo/predictions.jsonl", wins + SED[5:])
    page = _page(workdir)
    assert re.search(r'<td class="number good">\+100\.0 <small>', page)


def _misled(rows):
    """All of the clips that conflict conclude what the face suggests."""
    return [row | {"conclusion": "happy"} for row in rows[:5]] + rows[5:]


def _with_base(workdir, rows):
    (workdir / "eval/base").mkdir()
    write_jsonl(workdir / "eval/base/predictions.jsonl", rows)
    write_json(workdir / "eval/base/scores.json", saber_test.score(rows) | {"missing": []})


def test_the_base_model_is_the_first_row_and_what_became_worse_is_said(workdir):
    assert "is worse than" not in _page(workdir)
    # All conflicts right before any training, of which the stages keep two and four of five.
    right = [row | {"conclusion": row["labels"]["emotion"]} for row in CADPO]
    _with_base(workdir, right)
    page = _page(workdir)
    assert re.search(
        r"Base</th><th[^>]*>SED</th><th[^>]*>CA-DPO</th><th[^>]*>change from Base", page
    )
    assert "spelled out" in page
    worse = re.findall(r"<b>(\S+) is worse than Base</b> on (\w+) clips: −([\d.]+)", page)
    assert ("SED", "inconsistent", "60.0") in worse
    assert all(split == "inconsistent" for _, split, _ in worse)


def test_validation_has_lines_of_its_own_and_curves(workdir):
    path = workdir / "cadpo/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    held_out = [
        {"step": step, "validate/accuracy": 0.5 + step / 16, "validate/longer_wins": 0.625}
        for step in (0, 8)
    ]
    write_jsonl(path, [held_out[0], *rows, held_out[1]])
    page = _page(workdir)
    assert "CA-DPO: share of held-out pairs preferred rightly" in page
    assert "longer wins: first 0.625, last 0.625" in page
    assert ">0.6931<" in page  # The first loss is that of the first step.


def test_a_breakdown_that_repeats_the_whole_is_left_out(workdir):
    path = workdir / "cadpo/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_split = "CA-DPO: share of pairs with a positive margin, by split"
    for share, shown in ((1.0, False), (0.5, True)):
        name = "accuracies/inconsistent"
        write_jsonl(path, [row | {name: share * row["rewards/accuracies"]} for row in rows])
        assert (by_split in _page(workdir)) == shown


def test_probes_and_judge_are_shown_where_they_were_asked_for(workdir):
    page = _page(workdir)
    assert "picture blanked" in page
    assert "another clip&#39;s voice" in page
    assert "judge-model" in page
    assert ">3.50" in page
    for stage in ("sft", "cadpo"):
        scores = saber_test.score(SED if stage == "sft" else CADPO)
        write_json(workdir / "eval" / stage / "scores.json", scores | {"missing": ["a judge"]})
    page = _page(workdir)
    assert "picture blanked" not in page
    assert "Missing for SED and CA-DPO: a judge." in page


def test_the_same_inputs_give_the_same_bytes(workdir):
    assert _page(workdir) == _page(workdir)


def test_of_a_run_of_hours_the_page_says_where_they_went(workdir):
    assert "Where the time went" not in _page(workdir)
    summary = read_json(workdir / "sft/summary.json")
    seconds = {"start": 360.0, "step": 6480.0, "between": 360.0}
    time = {"starts": 2, "wall_seconds": 7200.0, "chip_hours": 486.4, "seconds": seconds}
    write_json(workdir / "sft/summary.json", summary | {"time": time | {"goodput": 0.9}})
    page = _page(workdir)
    assert page.count("Where the time went") == 1
    for number in (">2<", ">2.00<", ">486.40<", ">5.0<", ">90.0<"):
        assert number in page
    _Checker().feed(page)


def test_when_and_where_a_run_was_made_does_not_show(workdir):
    before = _page(workdir)
    for stage in ("sft", "cadpo"):
        summary = read_json(workdir / stage / "summary.json")
        write_json(workdir / stage / "summary.json", summary | {"wall_seconds": 4711.1})
        config = read_json(workdir / stage / "config.json")
        moved = {"root": "/elsewhere", "workdir": "/elsewhere/sft", "mesh": {"data": 8}}
        write_json(workdir / stage / "config.json", config | moved)
        metrics = (workdir / stage / "metrics.jsonl").read_text()
        (workdir / stage / "metrics.jsonl").write_text(
            metrics.replace('"seconds": 0.25', '"seconds": 9')
        )
    assert _page(workdir) == before


class _Checker(html.parser.HTMLParser):
    """Collects addresses, and fails on elements that are not closed in order."""

    VOID = ("meta", "line", "polyline", "br", "link", "img", "input")

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
    own = ("#", "data:image/svg+xml;base64,")
    assert all(address.startswith(own) for address in checker.addresses)
    assert not re.search(r"https?://(?!www\.w3)|@import|url\(", page)
    videos = [clip["video"] for clip in _examples(page)["clips"]]
    assert videos == ["data:video/mp4;base64,ZmlsbQ=="] * len(SED)


def test_what_the_model_says_is_text_and_never_markup(workdir):
    page = _page(workdir)
    assert "</script><b>" not in page.replace("<script", "")
    clip = _examples(page)["clips"][0]
    assert clip["truth"][3] == "acoustic_feat of clip0 </script><b>"
    assert page.count("<script") == page.count("</script>") == 2


def test_examples_say_what_became_of_them(workdir):
    clips = _examples(_page(workdir))["clips"]
    assert [clip["tags"][0] for clip in clips] == [
        *("corrected", "corrected", "corrected", "right in all", "lost"),
        *("right in all", "lost", "corrected"),
    ]
    assert clips[0]["answers"][0]["follows"] == ["face"]
    assert clips[2]["answers"][0]["follows"] == ["voice"]
    assert "follows the voice" in clips[4]["tags"]
    assert "CA-DPO follows the voice" in clips[4]["tags"]
    assert "SED follows the voice" not in clips[4]["tags"]
    assert clips[0]["type"] == "sarcasm"
    assert clips[5]["type"] == "no conflict"


def test_answers_that_are_broken_can_be_found():
    broken = [SED[0] | {"response": "happy", "conclusion": None}]
    found = report_examples.tags(SED[0]["labels"], broken)
    assert found == ["wrong", "names no emotion", "lacks a section"]


def test_every_kind_of_example_is_among_the_first():
    items = ["a1", "a2", "a3", "b1", "c1", "c2"]
    turns = report_examples.in_turns(items, lambda item: item[0])
    assert turns == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_clips_are_embedded_while_there_is_room(workdir):
    page = _page(workdir, "--most_media_mb", "0")
    assert {clip["video"] for clip in _examples(page)["clips"]} == {None}
    (workdir / "corpus").rename(workdir / "elsewhere")
    assert "data:video" not in _page(workdir)
    assert "data:video" in _page(workdir, "--corpus", str(workdir / "elsewhere"))


def test_pairs_are_shown_side_by_side(workdir):
    pair = _examples(_page(workdir))["pairs"][0]
    assert pair["chosen"][5] == "So contempt."
    assert pair["rejected"][5] == "So happy."
    assert (pair["withheld"], pair["words"]) == ("audio", ["contempt", "happy"])


def test_one_stage_alone_has_a_page_too(workdir):
    for name in ("cadpo", "eval/cadpo", "pairs"):
        (workdir / name).rename(workdir / name.replace("/", "_").upper())
    page = _page(workdir)
    assert "CA-DPO" not in page.split("<nav")[1]
    clips = _examples(page)["clips"]
    assert {clip["tags"][0] for clip in clips} == {"right", "wrong"}


def test_scores_of_other_benchmarks_are_listed(workdir):
    scores = {"tasks": {"MELD": {"accuracy": {"n": 7, "value": 0.25, "interval": [0.1, 0.4]}}}}
    write_json(workdir / "scores.json", scores | {"missing": ["SMILE: no predictions"]})
    page = _page(workdir, "--scores", f"EmoBench-M={workdir}")
    assert "tasks, MELD, accuracy" in page
    assert "0.2500 <small>[0.1000, 0.4000]" in page
    assert "SMILE: no predictions" in page


def test_predictions_for_different_clips_are_refused(workdir, capsys):
    write_jsonl(workdir / "eval/cadpo/predictions.jsonl", CADPO[:-1])
    assert report.main(["--workdir", str(workdir), "--out", str(workdir / "r.html")]) == 1
    assert "different clips" in capsys.readouterr().err


def test_a_missing_file_is_named(workdir, capsys):
    (workdir / "cadpo/metrics.jsonl").unlink()
    assert report.main(["--workdir", str(workdir), "--out", str(workdir / "r.html")]) == 1
    assert "cadpo/metrics.jsonl" in capsys.readouterr().err


def test_numbers_that_do_not_exist_are_dashes():
    assert report_tables.percent(None) == report_tables.points(None) == "–"
    assert report_tables.points(-0.05) == "−5.0"
    assert report_tables.points(-0.0001) == "0.0"
    assert report_tables.plain(-0.0001, 3) == "0.000"


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
        svg = charts.line_chart({"loss": curve}, x_label="step", y_label="loss")
        assert "nan" not in svg
        assert svg.count("<polyline") == 1


def test_a_report_without_any_scores_is_refused(tmp_path, capsys):
    assert report.main(["--workdir", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 1
    assert "at least one stage" in capsys.readouterr().err


def test_a_loss_has_a_logarithmic_axis_with_round_numbers():
    assert charts.decades(0.05, 6.4) == [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    assert charts.decades(2.0, 2.0) == [2, 5]
    curve = [(float(i), 10.0 ** (-i / 10)) for i in range(21)]
    svg = charts.line_chart({"loss": curve}, x_label="step", y_label="loss", logarithmic=True)
    points = re.search(r'class="curve c0" points="([^"]*)"', svg)[1].split()
    heights = [float(point.split(",")[1]) for point in points]
    # What decays exponentially is a straight line.
    np.testing.assert_allclose(np.diff(heights), np.diff(heights)[0], atol=0.11)
    assert "<title>loss, step 20: 0.01</title>" in svg


def test_long_curves_are_smoothed_and_keep_their_ends_and_lines():
    line = [(float(i), 2.0 * i) for i in range(50)]
    assert charts.smoothed(line, 5) == line
    noisy = [(float(i), float(i % 2)) for i in range(100)]
    middle = [y for _, y in charts.smoothed(noisy, 5)][10:-10]
    assert max(middle) - min(middle) < 0.2
    svg = charts.line_chart({"a": noisy}, x_label="step", y_label="a")
    assert 'class="curve c0 raw"' in svg and 'class="curve c0"' in svg


def test_the_figure_stands_alone_and_shows_both_models_and_the_paired_change():
    score = {"value": 0.5, "interval": [0.4, 0.6]}
    better = {"value": 0.75, "interval": [0.7, 0.8]}
    gain = {"value": 0.25, "interval": [0.2, 0.3]}
    rows = [{"name": "Right <here>", "values": [score, better], "gain": gain, "better": 1}]
    drawn = figure.svg(rows, ["SED", "CA-DPO"])
    root = xml.etree.ElementTree.fromstring(drawn)
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"SED", "CA-DPO", "Right <here>", "change, points"} <= set(texts)
    assert drawn.count("<circle") == 2 + 3  # The legend; two scores and their change.
    assert "var(" not in drawn and figure.link(drawn).startswith("data:image/svg+xml;base64,")
