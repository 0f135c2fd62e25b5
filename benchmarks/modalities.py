"""How far one modality alone gets, so that a corpus cannot be solved by ignoring the others.

    python -m benchmarks.modalities --records runs/tiny/records [--quick]

For every split and for clips whose modalities agree and conflict, classifiers of scikit-learn on
simple features conclude the emotion from the picture, the sound or the words, from all of them
together, and from the labels of all three (`truth`, the ceiling). The best of three kinds is chosen
by cross-validation on the training clips of the same sort and then asked about the split once; the
training split itself is cross-validated. On conflicting clips every single modality has to be at
chance: its interval reaches down to the share of the most frequent emotion.

`picture`, `sound` and `words` are what was recorded. `face`, `voice` and `meaning` are the labels
behind them, known exactly: what a perfect reader of one modality could conclude.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC

from benchmarks import result
from saber_jax.data import media
from saber_jax.data.records import Record, RecordSource, splits_of
from saber_jax.evaluation import bootstrap, saber_test
from saber_jax.evaluation.bootstrap import Score
from saber_jax.flags import Parser

SINGLE = ("picture", "sound", "words", "face", "voice", "meaning")
TRUTH = ("face", "voice", "meaning")
LABEL = {"face": "face", "voice": "voice", "meaning": "words"}
SIDE = 28  # Pixels of the small picture that a classifier sees.
FOLDS = 4

Features = Mapping[str, Float[np.ndarray, "n D"]]
"""By modality, one row a clip."""


def picture(record: Record) -> Float[np.ndarray, "D"]:
    """The clip's mean grey picture at 28 x 28, and how much each place of it moves."""
    grey = record.frames.astype(np.float32).mean(axis=-1) / 255
    rows, columns = (size // SIDE for size in grey.shape[1:])
    small = grey[:, : SIDE * rows, : SIDE * columns]
    small = small.reshape(len(grey), SIDE, rows, SIDE, columns).mean(axis=(2, 4))
    return np.concatenate([small.mean(axis=0).ravel(), small.std(axis=0).ravel()])


def sound(record: Record) -> Float[np.ndarray, "D"]:
    """Mean, spread and extremes over time of the log-mel spectrum, and the clip's length."""
    mel = media.log_mel(record.audio)
    bands = mel.reshape(len(mel), -1, 4).mean(axis=2)
    parts = [bands.mean(axis=0), bands.std(axis=0), *np.quantile(bands, [0.1, 0.9], axis=0)]
    return np.concatenate([*parts, [len(mel) / 100]])


def features(records: Sequence[Record], train: Bool[np.ndarray, "n"]) -> Features:
    """Of all clips; what has to be learnt, the letters that occur, is learnt from `train`."""
    said = [record.annotation["speech_content"] for record in records]
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 3), min_df=2, max_features=2000)
    letters.fit([text for text, chosen in zip(said, train, strict=True) if chosen])
    found = {
        "picture": np.stack([picture(record) for record in records]),
        "sound": np.stack([sound(record) for record in records]),
        "words": letters.transform(said).toarray(),
    }
    return found | of_labels([record.labels for record in records])


def of_labels(labels: Sequence[Mapping[str, str]]) -> dict[str, Float[np.ndarray, "n D"]]:
    """The label of each modality, one column a value. Raises ValueError where one is missing."""
    for number, each in enumerate(labels):
        if missing := [key for key in ("emotion", *LABEL.values()) if key not in each]:
            raise ValueError(
                f"Clip {number} has no label {', '.join(missing)}, which says what one modality "
                "suggests. Add it to labels.jsonl and build the records again."
            )
    return {
        name: OneHotEncoder(sparse_output=False).fit_transform([[each[key]] for each in labels])
        for name, key in LABEL.items()
    }


def together(found: Features) -> dict[str, Float[np.ndarray, "n D"]]:
    """Every single modality, what was recorded of all three, and all three labels.

    Which values the labels take together, not each for itself, is what decides a conflict, so the
    labels come with their products.
    """
    recorded = np.concatenate([found[name] for name in ("picture", "sound", "words")], axis=1)
    truth = found["face"]
    for name in TRUTH[1:]:
        truth = np.einsum("na,nb->nab", truth, found[name]).reshape(len(truth), -1)
    return {name: found[name] for name in SINGLE} | {"all": recorded, "truth": truth}


def classifiers(*, quick: bool = False) -> list[Any]:
    """Three kinds; a single one in a quick run."""
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    if quick:
        return [linear]
    forest = RandomForestClassifier(200, random_state=0)
    return [linear, make_pipeline(StandardScaler(), SVC(C=3.0)), forest]


def measure(
    found: Features,
    labels: Sequence[Mapping[str, str]],
    splits: Sequence[str],
    *,
    quick: bool = False,
) -> dict[str, dict[str, dict[str, Any]]]:
    """{split: {"consistent" | "inconsistent": {"chance": share, modality: score}}}.

    Raises ValueError if the training split has too few clips of a sort to learn from.
    """
    emotions = np.array([each["emotion"] for each in labels])
    agree = np.array([saber_test.is_consistent(each) for each in labels])
    places = np.array(splits)
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for sort, wanted in saber_test.SPLITS.items():
        train = (places == "train") & (agree == wanted)
        _check(sort, emotions[train])
        asked = {
            split: which
            for split in sorted(set(splits))
            if (which := (places == split) & (agree == wanted)).any()
        }
        for split, which in asked.items():
            chance = float(np.unique(emotions[which], return_counts=True)[1].max() / which.sum())
            scores.setdefault(split, {})[sort] = {"chance": chance}
        for name, rows in together(found).items():
            best, folded = _best(rows[train], emotions[train], classifiers(quick=quick))
            for split, which in asked.items():
                said = folded if split == "train" else best.predict(rows[which])
                scores[split][sort][name] = bootstrap.mean(said == emotions[which])
    return scores


def _best(rows: np.ndarray, emotions: np.ndarray, kinds: Sequence[Any]) -> tuple[Any, np.ndarray]:
    """The kind that cross-validates best, fitted to all rows, and what it said of left-out ones."""
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    said = [np.asarray(cross_val_predict(kind, rows, emotions, cv=folds)) for kind in kinds]
    chosen = int(np.argmax([np.mean(each == emotions) for each in said]))
    return kinds[chosen].fit(rows, emotions), said[chosen]


def _check(sort: str, emotions: np.ndarray) -> None:
    fewest = np.unique(emotions, return_counts=True)[1].min(initial=len(emotions))
    if fewest < FOLDS:
        raise ValueError(
            f"The split train has {fewest} {sort} clips of its rarest emotion, and a classifier "
            f"needs at least {FOLDS} to be cross-validated. Build a larger corpus."
        )


def above_chance(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """The single modalities that say more than chance about conflicting clips of a split."""
    told = []
    for split, sorts in scores.items():
        conflicting = sorts.get("inconsistent", {})
        for name in SINGLE:
            score: Score | None = conflicting.get(name)
            if score and score["interval"][0] > conflicting["chance"]:
                told.append(f"{split}: {name}")
    return told


def table(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """In Markdown, percent."""
    names = (*SINGLE, "all", "truth")
    heads = ("split", "clips", "chance", *names)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for split, sorts in scores.items():
        for sort, row in sorts.items():
            cells = [f"{100 * row['chance']:.0f}"]
            for name in names:
                low, high = (100 * bound for bound in row[name]["interval"])
                cells.append(f"{100 * row[name]['value']:.0f} ({low:.0f} to {high:.0f})")
            clips = f"{row[names[0]]['n']} {sort}"
            lines.append(f"| {split} | {clips} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    flags = _flags()
    sources = [RecordSource(flags.records, split) for split in sorted(splits_of(flags.records))]
    records = [source[i] for source in sources for i in range(len(source))]
    splits = [source.split for source in sources for _ in range(len(source))]
    found = features(records, np.array(splits) == "train")
    scores = measure(found, [r.labels for r in records], splits, quick=flags.quick)
    print(table(scores), flush=True)
    told = above_chance(scores)
    test = scores["test"]["inconsistent"]
    singles = {name: test[name]["value"] for name in SINGLE}
    result.finish(
        "modalities",
        value=round(100 * max(singles.values()), 1),
        unit="% of conflicting test clips right from the best single modality",
        goal=round(100 * test["chance"], 1),
        reached=not told,
        device=result.device(),
        quick=flags.quick,
        above_chance=told,
        truth=round(100 * test["truth"]["value"], 1),
        scores=scores,
    )


def _flags() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--records", type=Path, default=Path("runs/tiny/records"))
    parser.add_argument("--quick", action="store_true", help="one kind of classifier")
    return parser.parse_args()


if __name__ == "__main__":
    main()
