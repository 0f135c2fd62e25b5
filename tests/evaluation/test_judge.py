import json
import re

import pytest

from saber_jax.data import sed
from saber_jax.data.records import FIELDS
from saber_jax.endpoint import Endpoint
from saber_jax.evaluation import judge as judging
from saber_jax.evaluation.judge import Judge
from tests.loopback import Answer, chat_server

ANNOTATION = {field: f"{field} is so" for field in FIELDS}


def _judge(server, **settings):
    return Judge(Endpoint(url=server.url, model="judge", **settings))


def _texts(request):
    prompt = request["messages"][0]["content"]
    return [re.search(rf"<{side}>\n(.*)\n</{side}>", prompt, re.DOTALL)[1] for side in "AB"]


def _scores(value):
    return json.dumps(dict.fromkeys(FIELDS, value))


def test_sections_are_judged_in_both_orders_and_averaged():
    truth, said = sed.target_text(ANNOTATION), "[video_desc] A dog."

    def script(request, number):
        # A judge that favours whatever comes first.
        return Answer(text=_scores(5 if _texts(request)[0] == said else 2))

    with chat_server(script) as server:
        (rated,) = _judge(server).rate_sections([(ANNOTATION, said)])
    assert rated == dict.fromkeys(FIELDS, 3.5)
    assert sorted(map(_texts, server.requests)) == sorted([[truth, said], [said, truth]])
    prompts = [request["messages"][0]["content"] for request in server.requests]
    assert sorted(p.count("A is the reference") for p in prompts) == [0, 1]
    assert all(request["temperature"] == 0 for request in server.requests)


def test_a_section_without_a_usable_score_in_one_order_is_none_and_counted():
    def script(request, number):
        values = dict.fromkeys(FIELDS, 4)
        if number % 2:
            values |= {"video_desc": 9, "body_lang_desc": "4"}
            del values["speech_content"]
        return Answer(text=f"Let me think {{1}}.\n```json\n{json.dumps(values)}\n```")

    with chat_server(script) as server:
        judge = _judge(server, concurrency=1)
        (rated,) = judge.rate_sections([(ANNOTATION, "x")])
    unrated = {field for field in FIELDS if rated[field] is None}
    assert unrated == {"video_desc", "body_lang_desc", "speech_content"}
    assert judge.about["unscored"] == 3
    assert judge.about["prompts"] == judging.VERSION


def test_a_request_that_the_endpoint_refuses_costs_one_clip_and_not_the_run():
    def script(request, number):
        if "poison" in request["messages"][0]["content"]:
            return Answer(status=400, body='{"error": {"message": "content policy"}}')
        return Answer(text=_scores(5))

    with chat_server(script) as server:
        rated = _judge(server).rate_sections([(ANNOTATION, "poison"), (ANNOTATION, "fine")])
    assert rated == [dict.fromkeys(FIELDS), dict.fromkeys(FIELDS, 5.0)]


def test_overlap_is_the_mean_of_both_orders():
    with chat_server(
        lambda r, _: Answer(text="Score: 8.5, close" if _texts(r) == ["t", "s"] else "7")
    ) as server:
        assert _judge(server).overlap("clues", [("t", "s")]) == [7.75]


@pytest.mark.parametrize(
    ("text", "number"),
    [("'score': 8.5; because 3", 8.5), ("10", 10.0), ("8.", 8.0), ("none", None), (None, None)],
)
def test_the_first_number_counts(text, number):
    assert judging.first_number(text) == number


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Logical Judgment Dimension: 4", 4),
        ("**logical judgment dimension:**  4", 0),
        ("logical judgment dimension:  3/5", 3),
        ("4", 0),
        (None, None),
    ],
)
def test_the_score_of_a_reason_stands_after_its_dimension_or_is_0_in_any_reply(text, score):
    assert judging.named_score(text, "Logical Judgment Dimension") == score


def test_reasons_of_laughter_are_judged_in_two_dimensions():
    def script(request, number):
        prompt = request["messages"][0]["content"]
        dimension = re.search(r"(\w[\w ]+Dimension): <score", prompt)[1]
        return Answer(text=f"{dimension}: {4 if 'Logical' in dimension else 2}")

    with chat_server(script) as server:
        scores = _judge(server).laughter([("because", "why"), ("so", "thus")])
    assert [list(score.values()) for score in scores] == [[4, 2], [4, 2]]


@pytest.mark.parametrize(
    "answer", [Answer(status=429, body="{}"), Answer(body="no JSON"), Answer(text=" \n")]
)
def test_a_request_without_a_reply_is_none_and_counted_whatever_is_asked(answer):
    with chat_server(lambda *_: answer) as server:
        judge = _judge(server, retries=0)
        assert judge.rate_sections([(ANNOTATION, "x")]) == [dict.fromkeys(FIELDS)]
        assert judge.overlap("clues", [("t", "s")]) == [None]
        assert judge.emotion_words(["x"]) == [None]
        assert judge.synonyms([["sad"]]) == [None]
        (laughter,) = judge.laughter([("because", "why")])
    assert list(laughter.values()) == [None, None]
    assert judge.failures == len(FIELDS) + 5


def test_groups_of_synonyms_are_lists_of_lists_or_nothing():
    assert judging.word_groups('So: [["Happy", "joyful"], ["sad"]].') == [
        ["happy", "joyful"],
        ["sad"],
    ]
    for text in ("[happy]", '["happy"]', "none", None, "[[1]]"):
        assert judging.word_groups(text) is None


def test_cached_judgements_are_not_asked_for_again(tmp_path):
    with chat_server(lambda *_: Answer(text=_scores(3))) as server:
        first = _judge(server, cache=tmp_path).rate_sections([(ANNOTATION, "said")])
        assert _judge(server, cache=tmp_path).rate_sections([(ANNOTATION, "said")]) == first
    assert len(server.requests) == 2
