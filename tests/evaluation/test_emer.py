import pytest

from saber_jax.data import sed
from saber_jax.data.records import FIELDS
from saber_jax.endpoint import Endpoint
from saber_jax.evaluation import emer
from saber_jax.evaluation.judge import Judge
from tests.loopback import Answer, chat_server


def _row(clip_id, reason, openset, said):
    texts = dict.fromkeys(FIELDS, "x") | {"sentiment_analysis": said}
    clip = emer.EmerClip(clip_id=clip_id, language="en", reason=reason, openset=openset)
    return emer.row(clip, sed.target_text(texts))


ROWS = [
    _row("a", "She beams.", "[happy]", "He grins. So he is joyful."),
    _row("b", "He weeps.", "['sad', 'lonely']", "He weeps, alone. He is sad."),
    _row("c", "She shouts.", "[angry]", "Nothing can be said."),
]


def test_a_published_tree_is_read(tmp_path):
    (tmp_path / "gt-eng.csv").write_text('names,eng_reasons\nsample_1,"She beams, loudly."\ns2,x\n')
    (tmp_path / "check-openset.csv").write_text('name,openset\nsample_1,"[happy, relieved]"\n')
    first, second = emer.read(tmp_path)
    assert (first.clip_id, first.language, first.reason) == ("sample_1", "en", "She beams, loudly.")
    assert (first.openset, second.openset) == ("[happy, relieved]", None)


def test_the_chinese_table_is_read_as_chinese(tmp_path):
    (tmp_path / "gt.csv").write_text("names,chi_reasons\na,她笑了\n", encoding="utf-8-sig")
    (clip,) = emer.read(tmp_path)
    assert (clip.language, clip.reason) == ("zh", "她笑了")


def test_a_wrong_table_is_refused_by_its_columns(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gt-eng\.csv"):
        emer.read(tmp_path)
    (tmp_path / "gt-eng.csv").write_text("name,reason\na,b\n")
    with pytest.raises(ValueError, match="no column eng_reasons, names"):
        emer.read(tmp_path)


def test_without_a_judge_there_is_a_wheel_score_and_the_rest_is_named_as_missing():
    scores = emer.score(ROWS, None)
    # joyful is happy's group, sad is one of two, and nothing was said about the third.
    assert scores["wheel"]["level1"]["recall"] == pytest.approx(2 / 3)
    assert scores["words"] == "last sentence"
    assert scores["missing"] == ["clue_overlap, label_overlap, sets: need a judge (--judge)"]
    assert 0 < scores["wheel"]["floor"] < 0.5


def test_without_words_in_the_truth_the_wheel_is_missing_too():
    scores = emer.score([row | {"openset": None} for row in ROWS], None)
    assert "wheel" not in scores
    assert any("check-openset.csv" in line for line in scores["missing"])


def test_an_empty_answer_is_counted_and_scores_nothing():
    scores = emer.score([*ROWS, ROWS[0] | {"response": " "}], None)
    assert (scores["n"], scores["empty"]) == (4, 1)
    assert scores["wheel"]["level1"]["recall"] == pytest.approx(2 / 4)


def test_words_of_the_last_sentence_are_those_that_a_wheel_knows():
    assert emer.named_words("He is happy. Then he is sad and xyzzy!") == ["sad"]
    assert emer.named_words("他很悲伤。") == ["sad"]
    assert emer.named_words("") == []


def test_set_scores_follow_the_official_rules():
    truth = [["happy", "joyful"], ["sad"], ["angry"], [], ["calm"], ["calm"]]
    said = [["joyful", "glad", "bored"], [], ["furious"], ["sad"], ["calm"], []]
    groups = [
        [["happy", "joyful", "glad"], ["bored"]],
        [["sad"]],
        # The later group wins, so the two words end up apart.
        [["angry", "furious"], ["rage", "furious"]],
        [["sad"]],
        None,
        # Whatever the groups are, no word is none of them.
        None,
    ]
    scores = emer.set_scores(truth, said, groups)
    # (1/2 + 0 + 0 + 0) / 4 and (1 + 0 + 0 + 0) / 4; the fourth and fifth are dropped and counted.
    assert scores["accuracy"]["value"] == pytest.approx(1 / 8)
    assert scores["recall"]["value"] == pytest.approx(1 / 4)
    assert scores["mean"]["value"] == pytest.approx(3 / 16)
    assert scores["dropped"] == 2


def test_with_a_judge_all_three_metrics_are_there():
    def script(request, number):
        prompt = request["messages"][0]["content"]
        if prompt.startswith("Which emotions"):
            return Answer(text="[happy]" if "joyful" in prompt else "Answer: [sad]")
        if prompt.startswith("Put words"):
            return Answer(text='[["happy"], ["sad", "lonely"], ["angry"]]')
        return Answer(text="7, roughly the same" if "clues" in prompt else "unsure")

    with chat_server(script) as server:
        judge = Judge(Endpoint(url=server.url, model="judge"))
        scores = emer.score([*ROWS[:2], ROWS[2] | {"openset": None}], judge)
    assert scores["clue_overlap"]["value"] == 7.0
    assert (scores["label_overlap"]["n"], scores["label_overlap"]["unscored"]) == (0, 3)
    assert scores["words"] == "judge"
    # a: happy = happy. b: {sad} of {sad}, one group. c: the judge read sad in truth and answer.
    assert scores["sets"]["accuracy"]["value"] == 1.0
    assert scores["sets"]["recall"]["value"] == 1.0
    assert scores["wheel"]["level1"]["n"] == 3
    assert scores["judge"]["unscored"] == 3
    assert scores["missing"] == []


def _refusing(*, words):
    """A judge that gives `words` for every description but one with "joyful", and refuses that."""

    def script(request, number):
        prompt = request["messages"][0]["content"]
        if prompt.startswith("Which emotions"):
            return Answer(status=400, body="{}") if "joyful" in prompt else Answer(text=words)
        if prompt.startswith("Put words"):
            return Answer(text='[["happy"], ["sad", "lonely"], ["angry"]]')
        return Answer(text="7")

    return script


def test_a_clip_that_the_judge_failed_on_is_left_out_and_counted():
    with chat_server(_refusing(words="[sad]")) as server:
        scores = emer.score(ROWS[:2], Judge(Endpoint(url=server.url, model="judge")))
    assert (scores["label_overlap"]["n"], scores["label_overlap"]["unscored"]) == (1, 1)
    assert (scores["sets"]["recall"]["value"], scores["sets"]["dropped"]) == (1.0, 1)
    assert (scores["wheel"]["level1"]["n"], scores["wheel"]["dropped"]) == (1, 1)
    assert scores["wheel"]["level1"]["recall"] > 0
    assert scores["judge"]["unscored"] == 1
    assert not [r for r in server.requests if "\nnone\n" in r["messages"][0]["content"]]


def test_a_clip_in_which_the_judge_finds_no_emotion_scores_nothing():
    with chat_server(_refusing(words="[]")) as server:
        scores = emer.score(ROWS[1:], Judge(Endpoint(url=server.url, model="judge")))
    assert (scores["sets"]["recall"]["value"], scores["sets"]["dropped"]) == (0.0, 0)
    assert (scores["wheel"]["level1"]["value"], scores["wheel"]["dropped"]) == (0.0, 0)
    assert (scores["label_overlap"]["n"], scores["judge"]["unscored"]) == (2, 0)


def test_a_judge_that_fails_on_every_clip_leaves_all_scores_of_words_empty():
    with chat_server(_refusing(words="")) as server:
        scores = emer.score(ROWS[:1], Judge(Endpoint(url=server.url, model="judge")))
    assert (scores["label_overlap"]["n"], scores["label_overlap"]["unscored"]) == (0, 1)
    assert (scores["sets"]["mean"]["value"], scores["sets"]["dropped"]) == (None, 1)
    assert scores["missing"] == ["wheel: the judge gave no usable reply about the emotion words"]
