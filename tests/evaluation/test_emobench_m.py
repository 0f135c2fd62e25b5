import json
from pathlib import Path

import pytest

from saber_jax.data import sed
from saber_jax.data.records import FIELDS
from saber_jax.endpoint import Endpoint
from saber_jax.evaluation import emobench_m, emobench_m_scores
from saber_jax.evaluation.emobench_m import TASKS, answered
from saber_jax.evaluation.judge import Judge
from tests.loopback import Answer, chat_server

OFFICIAL = Path(__file__).parent / "official"
EXACT = {"abs": 1e-12, "rel": 0}


def _official(name, keys):
    stored = json.loads((OFFICIAL / name).read_text())
    rows = [dict(zip(keys, values, strict=True)) for *values, n in stored["rows"] for _ in range(n)]
    return rows, stored["golden"]


def test_classification_equals_the_official_numbers():
    rows, golden = _official("emobench_m_meld.json", ("expected_value", "predicted_value"))
    scores = emobench_m_scores.classification(rows)
    assert scores["accuracy"]["value"] == pytest.approx(golden["accuracy"], **EXACT)
    assert scores["precision"]["value"] == pytest.approx(golden["precision"], **EXACT)
    assert scores["recall"]["value"] == pytest.approx(golden["recall"], **EXACT)
    assert scores["f1"]["value"] == pytest.approx(golden["f1_score"], **EXACT)
    assert (scores["dropped"], scores["accuracy"]["n"], len(rows)) == (63, 2547, 2610)
    # What dropping hides: the same right answers over all items.
    assert scores["accuracy_of_all"]["value"] == pytest.approx(golden["accuracy"] * 2547 / 2610)


def test_joint_labels_equal_the_official_numbers():
    keys = ("expected_emotion", "expected_intent", "predicted_emotion", "predicted_intent")
    rows, golden = _official("emobench_m_mceiu.json", keys)
    scores = emobench_m_scores.classification(rows, joint=True)
    assert scores["accuracy"]["value"] == pytest.approx(golden["joint_accuracy"], **EXACT)
    assert scores["precision"]["value"] == pytest.approx(golden["joint_precision"], **EXACT)
    assert scores["recall"]["value"] == pytest.approx(golden["joint_recall"], **EXACT)
    assert scores["f1"]["value"] == pytest.approx(golden["joint_f1"], **EXACT)
    assert scores["accuracy"]["n"] == golden["total"] == len(rows) - scores["dropped"]


def test_generated_texts_have_the_scores_of_nltk_and_rouge_score():
    rows = [
        {
            "reference": "The audience laughed because Tom sold the broken radio as slightly used.",
            "prediction": "The audience laughed because Tom sold a broken radio as barely used.",
        },
        {"reference": "He slips on the stage", "prediction": "Nobody knows"},
        {"reference": "Left out", "prediction": "  "},
    ]
    scores = emobench_m_scores.generation(rows)
    # 1- to 4-grams of the first text that match, over all; the second text has none.
    bleu = (10 / 12 * 7 / 11 * 5 / 10 * 3 / 9) ** 0.25
    assert scores["bleu"]["value"] == pytest.approx(bleu / 2, abs=1e-12)
    assert scores["rouge_l"]["value"] == pytest.approx(10 / 12 / 2, abs=1e-12)
    assert (scores["bleu"]["n"], scores["dropped"]) == (2, 1)


@pytest.mark.parametrize(
    ("task", "response", "label"),
    [
        ("MELD", "{'emotion': 'joy'}", "joy"),
        ("MELD", 'Sure! {"Emotion": " Joy "} it is.', "Joy"),
        ("MELD", "{'emotion label': joy}", "joy"),
        # What is no label of the task stays as it was said, and will count as wrong.
        ("MELD", "{'emotion': 'bliss'}", "bliss"),
        ("MELD", "The answer is Joy.", "joy"),
        ("MELD", "Either joy or anger.", ""),
        ("MELD", "I cannot tell.", ""),
        ("MELD", "", ""),
        ("FGMSA", "weak negative", "weak negative"),
        ("MUSTARD", "{'sarcasm': 'true'}", "true"),
        ("MUSTARD", "False.", "false"),
    ],
)
def test_labels_are_read_from_answers(task, response, label):
    assert answered(task, response) == {"predicted_value": label}


def test_an_answer_in_six_sections_is_read_by_its_reasoning():
    sections = dict.fromkeys(FIELDS, "anger all around") | {"sentiment_analysis": "So it is joy."}
    assert answered("MELD", sed.target_text(sections)) == {"predicted_value": "joy"}


def test_emotion_and_intent_are_read_apart():
    response = "{'emotion label': 'sad', 'intent label': 'consoling'}"
    assert answered("MC-EIU", response) == {
        "predicted_emotion": "sad",
        "predicted_intent": "consoling",
    }
    half = answered("MC-EIU", "sad, I would say")
    assert half == {"predicted_emotion": "sad", "predicted_intent": ""}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_a_question_that_lists_its_labels_and_says_how_to_answer(name):
    asked = emobench_m.question(name, "Oh, great.")
    assert '"Oh, great."' in asked
    for labels in TASKS[name].labels.values():
        assert ", ".join(labels) in asked
    # An answer in the form that is asked for is read back.
    if TASKS[name].kind == "classification":
        (labels,) = TASKS[name].labels.values()
        form = asked[asked.rindex("{") :].rstrip(".").replace("label", labels[0])
        assert answered(name, form) == {"predicted_value": labels[0]}


def test_there_are_thirteen_tasks_in_three_dimensions():
    counts = {d: sum(task.dimension == d for task in TASKS.values()) for d in emobench_m.DIMENSIONS}
    assert counts == {"FER": 5, "CEU": 5, "SCEA": 3}


def _tree(root):
    (root / "MELD").mkdir()
    (root / "videos").mkdir()
    for path in ("MELD/dia0_utt0.mp4", "videos/laugh.mp4"):
        (root / path).write_bytes(b"film")
    meld = [{"video": "dia0_utt0.mp4", "expected_value": "joy", "text": "Hi!"}]
    (root / "MELD.json").write_text(json.dumps(meld))
    smile = {
        "video": "/gone/laugh.mp4",
        "reference": "It fell.",
        "instruction": "Why?",
    }
    (root / "SMILE.jsonl").write_text(json.dumps(smile) + "\n")
    return root


def test_items_are_found_with_their_clips_and_questions(tmp_path):
    meld, smile = emobench_m.read(_tree(tmp_path))
    assert (meld["clip_id"], meld["expected_value"]) == ("MELD/dia0_utt0", "joy")
    assert meld["path"] == str(tmp_path / "MELD/dia0_utt0.mp4")
    assert '"Hi!"' in meld["question"]
    assert smile["path"] == str(tmp_path / "videos/laugh.mp4")
    assert smile["question"] == "Why?"


def test_an_item_without_a_truth_or_a_video_is_named(tmp_path):
    (tmp_path / "MELD.json").write_text('[{"video": "a.mp4", "expected_value": "joy"}, {}]')
    with pytest.raises(ValueError, match=r"MELD\.json, item 1: no expected_value, video"):
        emobench_m.read(tmp_path)


def test_a_folder_without_any_task_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MELD\.json"):
        emobench_m.read(tmp_path)


def test_official_result_files_are_read_by_their_names(tmp_path):
    example = {
        "task_name": "x",
        "examples": [{"expected_value": "true", "predicted_value": "false"}],
    }
    (tmp_path / "MUSTARD.json").write_text(json.dumps(example))
    (tmp_path / "notes.json").write_text("[]")
    (tmp_path / "MUSTARD.json~").write_text(json.dumps(example))
    ((place, row),) = emobench_m.results(tmp_path)
    assert place == f"{tmp_path / 'MUSTARD.json'}, entry 1"
    assert row == {"task": "MUSTARD", "expected_value": "true", "predicted_value": "false"}


SAME_NAMES = [
    {"video": f"videos/ch-simsv2s/{folder}/1.mp4", "expected_value": "neutral"} for folder in "ab"
]


def test_clips_of_one_file_name_have_ids_of_their_own(tmp_path):
    other = {"video": "videos/ch-simsv2s/a/2.mp4", "expected_value": "neutral"}
    (tmp_path / "SIMS.json").write_text(json.dumps([*SAME_NAMES, other]))
    ids = [item["clip_id"] for item in emobench_m.read(tmp_path)]
    assert ids == ["SIMS/videos/ch-simsv2s/a/1", "SIMS/videos/ch-simsv2s/b/1", "SIMS/2"]


@pytest.mark.parametrize(
    ("named", "clip"),
    [
        ({"video": "/elsewhere/b/1.mp4"}, "SIMS/videos/ch-simsv2s/b/1"),
        ({"modal_path": "videos/ch-simsv2s/a/1.mp4"}, "SIMS/videos/ch-simsv2s/a/1"),
        ({"clip_id": "SIMS/videos/ch-simsv2s/a/1"}, "SIMS/videos/ch-simsv2s/a/1"),
        ({"clip_id": "SIMS/1", "video": "b/1.mp4"}, "SIMS/videos/ch-simsv2s/b/1"),
        ({"video": "3.mp4"}, "SIMS 3.mp4"),
    ],
)
def test_results_are_matched_with_items_by_their_id_or_their_file(named, clip, tmp_path):
    (tmp_path / "SIMS.json").write_text(json.dumps(SAME_NAMES))
    items = emobench_m.read(tmp_path)
    assert emobench_m.matched([("f, entry 1", {"task": "SIMS"} | named)], items) == [clip]


@pytest.mark.parametrize(
    ("named", "message"),
    [({"video": "1.mp4"}, "entry 1, fits several clips"), ({}, "entry 1, names no clip")],
)
def test_results_that_fit_several_items_or_name_none_are_refused(named, message, tmp_path):
    (tmp_path / "SIMS.json").write_text(json.dumps(SAME_NAMES))
    with pytest.raises(ValueError, match=message):
        emobench_m.matched([("f, entry 1", {"task": "SIMS"} | named)], emobench_m.read(tmp_path))


def test_two_result_files_of_one_task_are_refused(tmp_path):
    for name in ("MELD.json", "MELD.jsonl", "SIMS.json"):
        (tmp_path / name).write_text('[{"expected_value": "joy", "predicted_value": "joy"}]')
    with pytest.raises(ValueError, match="of MELD, and each would count"):
        emobench_m.results(tmp_path)


def test_means_are_over_tasks_and_then_dimensions():
    def rows(task, right, wrong):
        hit = {"task": task, "expected_value": "true", "predicted_value": "true"}
        return [hit] * right + [hit | {"predicted_value": "false"}] * wrong

    scores = emobench_m_scores.score(
        [*rows("MELD", 1, 1), *rows("SIMS", 1, 0), *rows("MOSI", 1, 3), *rows("funny", 9, 1)], None
    )
    means = {name: d["value"] for name, d in scores["dimensions"].items()}
    assert means == {"FER": 0.25, "CEU": 0.75, "SCEA": 0.9}
    assert scores["average"]["value"] == pytest.approx((0.25 + 0.75 + 0.9) / 3)
    assert "SMILE: no predictions for it" in scores["missing"]


def test_an_average_without_a_dimension_is_none_and_unknown_tasks_are_refused():
    row = {"task": "MELD", "expected_value": "joy", "predicted_value": ""}
    scores = emobench_m_scores.score([row], None)
    assert scores["average"]["value"] is None
    assert scores["tasks"]["MELD"]["accuracy"]["value"] is None
    assert scores["tasks"]["MELD"]["accuracy_of_all"]["value"] == 0.0
    with pytest.raises(ValueError, match="no task"):
        emobench_m_scores.score([row | {"task": "MELT"}], None)


def test_a_reason_that_the_judge_failed_on_is_left_out_and_counted():
    rows = [{"task": "SMILE", "reference": "It fell.", "prediction": p} for p in ("a", "b", "c")]

    def script(request, number):
        prompt = request["messages"][0]["content"]
        if "Model's reason: b" in prompt and "logical: cause" in prompt:
            return Answer(status=429, body="{}")
        # The official rule: a reply without the score is 0.
        named = "Dimension: 4" if "Model's reason: c" not in prompt else "no idea"
        kind = (
            "Logical Judgment" if "logical: cause" in prompt else "Multimodal Content Association"
        )
        return Answer(text=f"{kind} {named}")

    with chat_server(script) as server:
        judge = Judge(Endpoint(url=server.url, model="judge", retries=0))
        scores = emobench_m_scores.score(rows, judge)
    smile = scores["tasks"]["SMILE"]
    assert (smile["judge_logic"]["value"], smile["judge_logic"]["unscored"]) == (2.0, 1)
    assert (smile["judge_association"]["n"], smile["judge_association"]["unscored"]) == (3, 0)
    assert (smile["judge_total"]["value"], smile["judge_total"]["unscored"]) == (4.0, 1)
    assert scores["judge"]["unscored"] == 1
