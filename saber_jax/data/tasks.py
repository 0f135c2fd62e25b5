"""Tasks of stage 1: all six sections or some of them, and several wordings of each request.

A task is a set of FIELDS. Its target lists them in SED order, so that evidence always precedes the
reasoning. `sed` asks for all six sections, `visual` and `acoustic` for what is seen and what is
heard, and the name of a field asks for that field alone. Every task has several wordings in each
language. The first wording of `sed` is the prompt of `saber_jax.data.sed`.

Training draws a `Request` (task and wording) for every example of every epoch, see `Mixture`.
"""

import dataclasses
import difflib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from saber_jax.data import sed
from saber_jax.data.records import FIELDS, Record
from saber_jax.data.withhold import Modality

TASKS: dict[str, tuple[str, ...]] = {
    "sed": FIELDS,
    "visual": ("video_desc", "facial_exp_desc", "body_lang_desc"),
    "acoustic": ("acoustic_feat", "speech_content"),
    **{field: (field,) for field in FIELDS},
}
"""Task name -> the sections of its target, in SED order."""

SHOWN: dict[str, Modality] = {
    **dict.fromkeys(("visual", *TASKS["visual"]), "video"),
    **dict.fromkeys(("acoustic", *TASKS["acoustic"]), "audio"),
}
"""Task name -> the modality that holds its answer, for tasks that one modality answers."""

WORDINGS = 4
"""Number of wordings of every task in each language."""

_REQUESTS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "sed": (
            sed.prompt("en")[1],
            "First report what the picture and the sound show, then conclude the emotion.",
            "Collect the visual evidence, then the acoustic evidence, and reason to an emotion.",
            "How does this person feel? Give the evidence from picture, voice and words first.",
        ),
        "visual": (
            "Describe only what can be seen: the scene, the face, the body.",
            "Ignore the sound. What do the setting, the expression and the posture show?",
            "Report the visual evidence: surroundings, facial expression, body language.",
            "Watch the clip and write down the scene, the face and the gestures.",
        ),
        "acoustic": (
            "Describe only what can be heard: how it is said, and what is said.",
            "Ignore the picture. How does the voice sound, and what are the words?",
            "Report the acoustic evidence: the manner of speaking, then a transcript.",
            "Listen to the clip and write down the voice and the words.",
        ),
        "video_desc": (
            "Describe the scene and who is in it.",
            "What does the picture show apart from face and gestures?",
            "Where is this, who is there, and what happens?",
            "Give an account of the setting and the people.",
        ),
        "facial_exp_desc": (
            "Describe only the facial expression.",
            "What do the brows, the eyes and the mouth do?",
            "How does the face move in this clip?",
            "Report the expression on the face without naming an emotion.",
        ),
        "body_lang_desc": (
            "Describe only the body language.",
            "What do the posture, the head and the hands do?",
            "Which gestures and movements can be seen?",
            "Report how the body is held and moved.",
        ),
        "acoustic_feat": (
            "Describe only the voice.",
            "How is it said: pitch, pace, loudness, tone?",
            "What does the manner of speaking sound like?",
            "Report the sound of the voice, not the words.",
        ),
        "speech_content": (
            "Write down what is said, word for word.",
            "Transcribe the speech.",
            "Which words are spoken?",
            "Give the exact words of the clip.",
        ),
        "sentiment_analysis": (
            "Weigh face, voice and words against each other and name the emotion.",
            "Which emotion do picture and sound add up to, and why?",
            "Do the cues agree? Conclude what the person feels.",
            "Explain what this person feels, taking every modality into account.",
        ),
    },
    "zh": {
        "sed": (
            sed.prompt("zh")[1],
            "先写出画面和声音中的依据，再得出情绪。",
            "依次列出视觉线索和听觉线索，然后推断情绪。",
            "这个人的感受如何？请先给出画面、声音和话语中的依据。",
        ),
        "visual": (
            "只描述能看到的：场景、表情和动作。",
            "不考虑声音，环境、表情和姿态说明了什么？",
            "写出视觉线索：周围环境、面部表情、肢体语言。",
            "请看视频，记录场景、面部和手势。",
        ),
        "acoustic": (
            "只描述能听到的：怎么说的，说了什么。",
            "不考虑画面，声音听起来怎样，说的是什么话？",
            "写出听觉线索：先写说话方式，再写原话。",
            "请听音频，记录嗓音和话语。",
        ),
        "video_desc": (
            "描述场景和其中的人物。",
            "除了表情和手势，画面里有什么？",
            "这是哪里，有谁，发生了什么？",
            "请说明环境和人物。",
        ),
        "facial_exp_desc": (
            "只描述面部表情。",
            "眉毛、眼睛和嘴巴有什么变化？",
            "视频中人物的面部怎样变化？",
            "写出脸上的表情，不要说出情绪名称。",
        ),
        "body_lang_desc": (
            "只描述肢体语言。",
            "姿势、头部和手有什么动作？",
            "能看到哪些手势和动作？",
            "写出身体的姿态和动作。",
        ),
        "acoustic_feat": (
            "只描述嗓音。",
            "是怎么说的：音调、语速、音量、语气？",
            "说话的方式听起来怎样？",
            "写出声音的特点，不写内容。",
        ),
        "speech_content": (
            "逐字写出说的话。",
            "请转写语音内容。",
            "说了哪些话？",
            "写出片段中的原话。",
        ),
        "sentiment_analysis": (
            "综合表情、声音和话语，判断情感。",
            "画面和声音合起来是什么情绪，为什么？",
            "各种线索一致吗？请推断这个人的感受。",
            "结合所有模态，解释这个人的感受。",
        ),
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A task and the wording of its instruction, from 0 to WORDINGS - 1.

    With `alone`, a task that one modality answers comes without the other one, which makes its
    example shorter and leaves the network nothing else to look at.
    """

    task: str = "sed"
    wording: int = 0
    alone: bool = False

    def __post_init__(self):
        if self.task not in TASKS:
            near = difflib.get_close_matches(self.task, TASKS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"There is no task {self.task!r}; did you mean {near!r}? Tasks: {', '.join(TASKS)}."
            )
        if not 0 <= self.wording < WORDINGS:
            raise ValueError(f"A task has wordings 0 to {WORDINGS - 1}, got {self.wording}.")

    @property
    def sections(self) -> tuple[str, ...]:
        """The FIELDS of the target, in SED order."""
        return TASKS[self.task]

    @property
    def only(self) -> Modality | None:
        """The one modality that is shown; None for both."""
        return SHOWN.get(self.task) if self.alone else None

    def shown(self, record: Record) -> Record:
        """The record, without the modality that this request does not show."""
        if self.only == "video":
            return dataclasses.replace(record, audio=record.audio[:0])
        if self.only == "audio":
            return dataclasses.replace(record, frames=record.frames[:0])
        return record

    def instruction(self, language: str) -> str:
        """The user's instruction in "en" or "zh"."""
        return _REQUESTS[language][self.task][self.wording]


def conversation(record: Record, task: str, wording: int = 0) -> tuple[str, str]:
    """(prompt in Qwen's chat template, target of the task's sections) of one record."""
    request = Request(task=task, wording=wording)
    instruction = request.instruction(record.language)
    prompt = sed.prompt_text(
        record.language, bool(len(record.frames)), bool(len(record.audio)), instruction
    )
    return prompt, sed.target_text(record.annotation, request.sections)


class Mixture:
    """Draws a request for every example of every epoch: a pure function of (seed, epoch, example).

    `weights` maps tasks to relative frequencies. In the first `first_epochs` epochs `first_weights`
    apply: a curriculum. The first `wordings` wordings of a task are drawn with equal probability;
    `alone` is `Request.alone` of all. Raises ValueError for unknown tasks and invalid weights.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        first_weights: Mapping[str, float] | None = None,
        first_epochs: int = 0,
        wordings: int = 1,
        alone: bool = False,
        seed: int = 0,
    ):
        if not 1 <= wordings <= WORDINGS:
            raise ValueError(f"wordings must be 1 to {WORDINGS}, got {wordings}.")
        first_weights = first_weights if first_epochs and first_weights else weights
        phases = (first_weights, weights)
        for phase in phases:
            if any(weight < 0 for weight in phase.values()) or not sum(phase.values()):
                raise ValueError(
                    f"Task weights must be positive numbers, got {dict(phase)}. Try {{'sed': 1.0}}."
                )
        drawn = {task for phase in phases for task, weight in phase.items() if weight}
        # Sorted, so that the order of tasks in a config does not matter.
        self.requests = tuple(
            Request(task=task, wording=wording, alone=alone)
            for task in sorted(drawn)
            for wording in range(wordings)
        )
        shares = np.array([[p.get(r.task, 0.0) for r in self.requests] for p in phases])
        self._bounds = np.cumsum(shares / shares.sum(1, keepdims=True), axis=1)
        self._first_epochs = first_epochs
        self._seed = seed

    def draw(self, epoch: int, examples: int) -> Int[np.ndarray, " N"]:
        """Index into `requests` for each of `examples` examples."""
        rng = np.random.default_rng([self._seed, epoch, _STREAM])
        bounds = self._bounds[int(epoch >= self._first_epochs)]
        drawn = np.searchsorted(bounds, rng.random(examples), side="right")
        # Rounding may leave the last bound below 1; tasks without weight are never drawn.
        return np.minimum(drawn, np.searchsorted(bounds, bounds[-1]))


# Makes the draws independent of the shuffle, which is also seeded with (seed, epoch).
_STREAM = 7919
