"""Rows of published tables as YAML files: what the paper reports, and the flags that train it again.

A table is a folder. ``_table.yaml`` holds what its rows share, every other file is one row, and ``_datasets.yaml``
beside the folder holds what belongs to the data. A row has a training for each column of the table that it reports::

    row: ResNet-32 x2, low-rank (SI and FD)
    settings: {model: resnet32x2, factor_init: spectral, decay: frobenius}
    paper: {cifar10_10: 94.34, tiny_imagenet_15: 62.24 ± 0.39, cifar10_2: null}

A method that the project does not have is a row with ``trained: false``: its published numbers stand in the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from benchmarks.experiments.metrics import METRICS
from hf_fnl.utils.suggest import did_you_mean

TABLE_FILE = "_table.yaml"
DATASETS_FILE = "_datasets.yaml"
SCALES = ("full", "small")

Settings = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images or text by the name that columns give them."""

    hub: Settings | None = None  # flags that load it from the Hub; none where it is not there
    place: Sequence[str] = ("dataset",)  # flags that take the file or folder where it lies
    settings: Settings = field(default_factory=dict)  # flags that hold wherever it lies


@dataclass(frozen=True, kw_only=True)
class Table:
    """What the rows of a table share."""

    name: str
    datasets: Mapping[str, Dataset]
    title: str
    columns: Mapping[str, Settings]  # flags of each column; ``data``, the name of its data set; and ``small``
    script: str = "train_vision.py"  # in run_scripts, what trains
    source: str | None = None  # of the paper's numbers
    metrics: Sequence[str] = ("accuracy",)
    settings: Settings = field(default_factory=dict)
    small: Settings = field(default_factory=dict)  # replaces settings on the scale "small"
    notes: Sequence[str] = ()  # shown below the table

    def __post_init__(self) -> None:
        if unknown := [metric for metric in self.metrics if metric not in METRICS]:
            raise ValueError(f"{self.name}: metrics must be any of {', '.join(METRICS)}, got {unknown[0]!r}")
        for column, settings in self.columns.items():
            if settings.get("data") not in self.datasets:
                raise ValueError(
                    f"{self.name}: data of column {column} must be one of {', '.join(self.datasets)}, "
                    f"got {settings.get('data')!r}"
                )


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table."""

    table: Table
    name: str
    row: str  # what the table calls it
    paper: Mapping[str, Any]  # what is published for each column: a value, none, or a value for each metric
    settings: Settings = field(default_factory=dict)
    small: Settings = field(default_factory=dict)
    source: str | None = None  # where it is not that of the table
    trained: bool = True  # whether the project can

    def __post_init__(self) -> None:
        if unknown := [column for column in self.paper if column not in self.table.columns]:
            raise ValueError(f"{self.path}: no column {unknown[0]!r}; the table has {', '.join(self.table.columns)}")

    @property
    def path(self) -> str:
        """How it is called: table and file."""
        return f"{self.table.name}/{self.name}"

    def data(self, column: str) -> str:
        """Name of the data set of a column."""
        return self.table.columns[column]["data"]

    def published(self, column: str) -> dict[str, Any]:
        """What the paper reports in a column, for each metric of the table; ``None`` where nothing was found."""
        value = self.paper[column]
        values = value if isinstance(value, dict) else {self.table.metrics[0]: value}
        return {metric: values.get(metric) for metric in self.table.metrics}

    def flags(self, column: str, scale: str) -> Settings:
        """Flags of the training of a column, without those that say where the data lies.

        Later ones win: data set, table, column, row; on the scale ``"small"`` then ``small`` of table, column and row.
        A flag whose value is ``None`` is left out.
        """
        table = self.table
        of_column = {flag: value for flag, value in table.columns[column].items() if flag not in ("data", "small")}
        flags = table.datasets[self.data(column)].settings | table.settings | of_column | self.settings
        if scale == "small":
            flags = flags | table.small | table.columns[column].get("small", {}) | self.small
        return {flag: value for flag, value in flags.items() if value is not None}


def read_rows(places: Iterable[Path]) -> list[Row]:
    """Rows of tables, all of a folder's or those of single files, each once.

    Raises:
        FileNotFoundError: If there is no such table or row.
        ValueError: If a file is no YAML mapping, has an unknown key, or lacks one.
    """
    rows: dict[Path, Row] = {}
    for place in places:
        folder = place if place.is_dir() else place.parent
        if not (folder / TABLE_FILE).is_file() or not place.exists():
            names = _alternatives(place)
            hint = did_you_mean(place.name, names)
            raise FileNotFoundError(f"no such table or row: {place}; there are {', '.join(names) or 'none'}{hint}")
        table = _read_table(folder)
        files = [place] if place.is_file() else sorted(set(folder.glob("*.yaml")) - {folder / TABLE_FILE})
        rows |= {path.resolve(): _read(Row, path, table=table, name=path.stem) for path in files}
    return list(rows.values())


def _alternatives(place: Path) -> list[str]:
    """Rows or tables that there are where one was looked for."""
    folder = place if place.is_dir() else place.parent
    if (folder / TABLE_FILE).is_file():
        return sorted(path.name for path in folder.glob("*.yaml") if path.name != TABLE_FILE)
    return sorted(path.parent.name for path in folder.glob(f"*/{TABLE_FILE}"))


def _read_table(folder: Path) -> Table:
    path = folder.parent / DATASETS_FILE
    datasets = {name: _build(Dataset, content, path) for name, content in _mapping(path).items()}
    return _read(Table, folder / TABLE_FILE, name=folder.resolve().name, datasets=datasets)


def _read(kind: type[T], path: Path, **known: Any) -> T:
    return _build(kind, _mapping(path), path, **known)


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(content).__name__}")
    return content


def _build(kind: type[T], content: dict[str, Any], path: Path, **known: Any) -> T:
    """A dataclass from what a file holds and what is ``known`` beside it."""
    fields = [option for option in dataclasses.fields(kind) if option.name not in known]  # type: ignore[arg-type]
    allowed = [option.name for option in fields]
    if unknown := [key for key in content if key not in allowed]:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; allowed are {', '.join(allowed)}")
    required = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing := [key for key in required if key not in content]:
        raise ValueError(f"{path}: {missing[0]} is missing")
    return kind(**known, **content)
