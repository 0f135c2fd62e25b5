"""The settings of the data pipeline, read from TOML; configs/data_prep.toml is an example."""

import dataclasses
import difflib
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

from data_prep.raw.annotate import AnnotateSettings
from data_prep.raw.captions import CaptionSettings
from data_prep.raw.consistency import ConsistencySettings
from data_prep.raw.filters import FilterSettings
from data_prep.raw.ingest import Source
from data_prep.raw.instructions import InstructionSettings
from data_prep.raw.measure import MeasureSettings
from data_prep.raw.segment import SegmentSettings
from data_prep.raw.split import SplitSettings
from data_prep.raw.transcripts import TranscriptSettings

STAGES = (
    "ingest",
    "segment",
    "measure",
    "filter",
    "annotate",
    "transcripts",
    "captions",
    "consistency",
    "split",
    "instructions",
    "export",
)
"""In order of execution. Each reads the rows that the one before it kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """`build` are additional options for data_prep.build, such as ["--fps", "2"]."""

    build: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings. `out` may be in a bucket, except for `export`. `skip` names stages to skip.

    The stages that decode run in `processes` local processes, or with `beam` options on a cluster.
    """

    out: str
    sources: tuple[Source, ...]
    shards: int = 16
    processes: int = 2
    beam: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    segment: SegmentSettings = dataclasses.field(default_factory=SegmentSettings)
    measure: MeasureSettings = dataclasses.field(default_factory=MeasureSettings)
    filter: FilterSettings = dataclasses.field(default_factory=FilterSettings)
    annotate: AnnotateSettings = dataclasses.field(default_factory=AnnotateSettings)
    transcripts: TranscriptSettings = dataclasses.field(default_factory=TranscriptSettings)
    captions: CaptionSettings = dataclasses.field(default_factory=CaptionSettings)
    consistency: ConsistencySettings = dataclasses.field(default_factory=ConsistencySettings)
    split: SplitSettings = dataclasses.field(default_factory=SplitSettings)
    instructions: InstructionSettings = dataclasses.field(default_factory=InstructionSettings)
    export: ExportSettings = dataclasses.field(default_factory=ExportSettings)

    def __post_init__(self):
        if not self.out or not self.sources:
            raise ValueError("out and at least one [[sources]] with a folder are needed.")
        if self.shards < 1 or self.processes < 1:
            raise ValueError(
                f"shards and processes must be at least 1, got {self.shards} and {self.processes}."
            )
        optional = ("transcripts", "captions", "instructions")
        if wrong := [name for name in self.skip if name not in optional]:
            raise ValueError(f"skip may name {', '.join(optional)}; got {wrong[0]!r}.")

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(name for name in STAGES if name not in self.skip)


def load(path: Path) -> Settings:
    """Reads a TOML file. Raises ValueError naming the wrong key and the nearest right one."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}.") from error
    return _made(Settings, given, "")


def _made(kind: type, given: Any, where: str) -> Any:
    """A dataclass from a table, its own tables included."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be a table of settings, got {given!r}.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in given.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise ValueError(f"There is no setting {where}{key}; did you mean {where}{near}?")
        values[key] = _value(hints[key], value, f"{where}{key}")
    if missing := [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]:
        raise ValueError(f"The setting {where}{missing[0]} is needed.")
    return kind(**values)


def _value(hint: Any, value: Any, name: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _made(hint, value, f"{name}.")
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, got {value!r}.")
        item = inner[0]
        return tuple(_value(item, entry, f"{name}[{i}]") for i, entry in enumerate(value))
    if origin is dict:
        return {key: _value(inner[1], entry, f"{name}.{key}") for key, entry in value.items()}
    allowed = inner if origin in (types.UnionType, typing.Union) else (hint,)
    if origin is typing.Literal:
        return value  # The settings themselves say what is allowed.
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        kind = " or ".join(t.__name__ for t in allowed if t is not type(None))
        raise ValueError(f"{name} must be {kind}, got {value!r}.")
    return value
