import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

from data_prep.corpus import text
from data_prep.corpus.plan import Sizes, plan
from data_prep.preferences import cues, offline
from data_prep.preferences.judge import JudgeScorer
from data_prep.preferences.score import EVIDENCE, Scores, well_formed
from saber_jax.data import sed
from saber_jax.data.records import FIELDS, Record
from saber_jax.endpoint import Endpoint, EndpointError
from tests.data_prep.preferences.clips import record
from tests.data_prep.preferences.ranked_answers import CLIPS, Clip
from tests.loopback import Answer, chat_server


def _record(clip: Clip) -> Record:
    return Record(
        clip_id="clip",
        language=clip.language,
        frames=np.zeros((4, 28, 28, 3), np.uint8),
        seconds_per_grid=0.5,
        audio=np.zeros(800, np.int16),
        annotation=clip.annotation,
        labels={},
        provenance={},
    )


def _totals(scorer, clip):
    return [scorer(_record(clip), sed.target_text(answer)).total for answer in clip.answers]


def _falling(numbers):
    return all(a > b for a, b in itertools.pairwise(numbers))


def test_there_are_twenty_answers_and_each_can_be_parsed():
    answers = [sed.target_text(answer) for clip in CLIPS for answer in clip.answers]
    assert len(answers) == len(set(answers)) == 20
    assert all(well_formed(answer) and sed.conclusion(answer) for answer in answers)


@pytest.mark.parametrize("clip", CLIPS)
def test_the_offline_scorer_ranks_as_a_person_does(clip):
    assert _falling(_totals(offline.score, clip))


@pytest.mark.parametrize("clip", CLIPS)
def test_the_target_itself_has_full_marks(clip):
    scores = offline.score(_record(clip), sed.target_text(clip.annotation))
    assert scores == Scores(consistency=1.0, alignment=1.0)


def test_both_scores_stay_between_0_and_1_for_every_answer_to_every_clip():
    for clip, other in itertools.product(CLIPS, CLIPS):
        for answer in other.answers:
            scores = offline.score(_record(clip), sed.target_text(answer))
            for score in (scores.consistency, scores.alignment):
                assert score is not None and 0 <= score <= 1


@pytest.mark.parametrize(
    ("text", "modality", "family"),
    [
        ("Broad smile, raised cheeks.", "face", "joy"),
        ("No smile.", "face", None),
        ("She does not smile but frowns.", "face", "hostility"),
        ("没有笑", "face", None),
        ("His voice trembles.", "voice", "fear"),
        ("Low pitch, slow.", "voice", "grief"),
        ("A smile, a frown.", "face", None),  # Neither leads.
    ],
)
def test_cues_are_counted_unless_they_are_denied(text, modality, family):
    assert cues.suggested(text, modality) == family


@pytest.mark.parametrize(
    ("reasoning", "claims"),
    [
        ("Face: happy; voice: angry; words: sad.", ["joy", "hostility", "grief"]),
        ("表情：开心，声音：愤怒，冲突。话语：悲伤", ["joy", "hostility", "grief"]),
        ("Face and voice agree: she is angry.", [None, None, None]),
    ],
)
def test_a_colon_after_the_name_of_a_modality_does_not_end_its_claim(reasoning, claims):
    assert [cues.claimed(reasoning, m) for m in ("face", "voice", "words")] == claims


def test_the_target_of_every_kind_of_clip_of_the_corpus_has_full_marks():
    kinds = {(c.language, c.face, c.voice, c.words): c for c in plan(Sizes(), seed=0)}
    assert len(kinds) == 80
    for clip in kinds.values():
        given = text.annotation(clip)
        annotation = {field: given.get(field) or given["audio_desc"][field] for field in FIELDS}
        described = dataclasses.replace(record(), language=clip.language, annotation=annotation)
        scores = offline.score(described, sed.target_text(annotation))
        assert (scores.consistency, scores.alignment) == (1.0, 1.0), annotation


def test_a_claim_is_read_from_the_clause_that_names_the_modality():
    reasoning = "Face happy, voice angry, words negative: conflict. Emotion: contempt"
    claims = [cues.claimed(reasoning, modality) for modality in ("face", "voice", "words")]
    assert claims == ["joy", "hostility", "grief"]
    assert cues.notes_conflict(reasoning) and not cues.notes_agreement(reasoning)
    assert cues.notes_agreement("表情和声音一致") and cues.notes_conflict("表情和声音不一致")


def _grades(request):
    """The answer of a careful person in place of the endpoint, from ranked_answers.py."""
    prompt = request["messages"][0]["content"]
    if isinstance(prompt, list):
        prompt = prompt[-1]["text"]
    said = re.findall(r"<(?:A|B|answer)>\n(.*?)\n</", prompt, re.DOTALL)
    rank = min(
        place
        for clip in CLIPS
        for place, answer in enumerate(clip.answers)
        if sed.target_text(answer) in said
        or (
            "five whole numbers" in prompt
            and sed.target_text(answer, EVIDENCE) in said
            and (len(said) == 1 or sed.target_text(clip.annotation, EVIDENCE) in said)
        )
    )
    if "follows" in prompt:
        return {"follows": 5 - rank, "together": 5 - rank}
    return dict.fromkeys(EVIDENCE, 4)


def _judge(server, **settings):
    return JudgeScorer(Endpoint(url=server.url, model="judge", retries=0), **settings)


def test_a_judge_ranks_as_the_person_behind_it_does():
    with chat_server(lambda request, _: Answer(text=json.dumps(_grades(request)))) as server:
        judge = _judge(server)
        for clip in CLIPS:
            assert _falling(_totals(judge, clip))
    assert judge.failures == 0
    # Consistency once, alignment in both orders.
    assert len(server.requests) == 20 * 3


def test_alignment_is_asked_in_both_orders_and_consistency_without_the_annotation():
    clip = CLIPS[0]
    answer = sed.target_text(clip.answers[1])

    def script(request, number):
        prompt = request["messages"][0]["content"]
        value = 5 if "A is the reference" in prompt else 3
        names = ("follows", "together") if "follows" in prompt else EVIDENCE
        return Answer(text=f"```json\n{json.dumps(dict.fromkeys(names, value))}\n```")

    with chat_server(script) as server:
        scores = _judge(server)(_record(clip), answer)
    assert scores == Scores(consistency=0.5, alignment=0.75)
    prompts = [request["messages"][0]["content"] for request in server.requests]
    assert [p.count("reference.") for p in prompts] == [0, 1, 1]
    assert clip.annotation["video_desc"] not in prompts[0]
    assert clip.annotation["sentiment_analysis"] not in prompts[1]


def test_a_judge_with_media_sees_the_clip_and_not_the_annotation():
    clip = CLIPS[0]
    with chat_server(lambda request, _: Answer(text=json.dumps(_grades(request)))) as server:
        scores = _judge(server, media=True)(_record(clip), sed.target_text(clip.answers[1]))
    assert scores.alignment == 0.75
    text, shown = (request["messages"][0]["content"] for request in server.requests)
    assert isinstance(text, str)
    assert [part["type"] for part in shown] == ["image_url"] * 4 + ["input_audio", "text"]
    assert clip.annotation["video_desc"] not in shown[-1]["text"]


@pytest.mark.parametrize("said", ["no idea", '{"follows": 6, "together": 2}', '{"follows": true}'])
def test_an_unusable_judgement_is_none_and_counted(said):
    with chat_server(lambda *_: Answer(text=said)) as server:
        judge = _judge(server)
        scores = judge(_record(CLIPS[0]), sed.target_text(CLIPS[0].annotation))
    assert scores.total is None and judge.failures == 3


def test_a_judge_that_refuses_the_key_ends_the_run():
    with chat_server(lambda *_: Answer(status=401)) as server, pytest.raises(EndpointError):
        _judge(server)(_record(CLIPS[0]), sed.target_text(CLIPS[0].annotation))


def test_an_answer_about_evidence_that_the_clip_lacks_is_worth_less():
    clip = dataclasses.replace(CLIPS[1], annotation=CLIPS[1].annotation | {"body_lang_desc": ""})
    answer = dict(CLIPS[1].annotation)
    invented = offline.alignment(clip.annotation, answer)
    honest = offline.alignment(clip.annotation, answer | {"body_lang_desc": ""})
    assert (invented, honest) == (0.8, 1.0)
    assert offline.alignment(dict.fromkeys(FIELDS, ""), answer) is None
