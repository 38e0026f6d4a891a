"""The folder of an evaluation: every prediction with its row, kept batch by batch, so that it goes on where it ended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headstart.errors import Problem, RunError
from headstart.evaluate.measure import RowResult
from headstart.files import new_file, read_json, remove_temporaries, write_json

AS_JSON = ("truth", "found", "grades", "ungraded")  # columns whose values are lists and objects
GRADE = "grade."  # before a grader's name: a column for each
TYPES = {
    "where": pa.string(),
    "nll": pa.float64(),
    "targets": pa.float64(),
    "asked": pa.string(),
    "reference": pa.string(),
    "answer": pa.string(),
    "stopped": pa.bool_(),
    "bytes": pa.int64(),
    "probability": pa.float64(),
    "truth": pa.string(),
    "found": pa.string(),
    "part": pa.string(),
    "guard": pa.bool_(),
    "group": pa.string(),
    "grades": pa.string(),
    "ungraded": pa.string(),
}


class Predictions:
    """`predictions.parquet` (a row a row, `item` its columns as JSON) and `result.json`; until then parts of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity_file = path / "evaluation.json"
        self.parts = path / "parts"
        self.predictions_file = path / "predictions.parquet"
        self.result_file = path / "result.json"

    @staticmethod
    def open(path: Path, identity: Mapping[str, Any]) -> Predictions:
        """Begin an evaluation, or go on with the same one.

        Raises RunError where something else lies there, with what differs where that is another evaluation.
        """
        found = Predictions(path)
        if found.identity_file.exists():
            known = read_json(found.identity_file)
            if other := sorted(key for key in {*known, *identity} if known.get(key) != identity.get(key)):
                what = f"another evaluation lies there, of other {', '.join(other)}"
                raise RunError(Problem("run.exists", what, str(path), "choose another folder with -o"))
            remove_temporaries(path)
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(Problem("run.exists", "the folder is not empty", str(path), "choose another with -o"))
        else:
            write_json(found.identity_file, dict(identity))
        return found

    @cached_property
    def _whole(self) -> list[dict[str, Any]] | None:
        """The rows of all batches, where the evaluation was finished when it was opened."""
        return pq.read_table(self.predictions_file).to_pylist() if self.predictions_file.exists() else None

    def read(self, number: int) -> list[RowResult] | None:
        """Return the rows of a batch, or None where it isn't done yet."""
        if self._whole is not None:
            return [_row(values) for values in self._whole if values["batch"] == number]
        file = self._part(number)
        return [_row(values) for values in pq.read_table(file).to_pylist()] if file.exists() else None

    def write(self, number: int, rows: Sequence[RowResult], items: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep the rows of a batch."""
        names = dict.fromkeys(name for row in rows for name in row.grades)
        columns: dict[str, pa.Array] = {name: pa.array(_column(name, rows), kind) for name, kind in TYPES.items()}
        columns |= {GRADE + n: pa.array([_number(row.grades.get(n)) for row in rows], pa.float64()) for n in names}
        # In ASCII: a row may hold half a surrogate, which is no UTF-8.
        as_json = [json.dumps(items.get(row.where, {}), default=str) for row in rows]
        columns["item"] = pa.array(as_json, pa.string())
        columns["batch"] = pa.array([number] * len(rows), pa.int64())
        _write(self._part(number), pa.table(columns))

    def finish(self, batches: int, result: Mapping[str, Any]) -> None:
        """Put the parts together, and write the result, last."""
        if not self.predictions_file.exists():
            tables = [pq.read_table(self._part(number)) for number in range(batches)]
            _write(self.predictions_file, pa.concat_tables(tables, promote_options="default"))
        shutil.rmtree(self.parts, ignore_errors=True)
        write_json(self.result_file, dict(result))

    def _part(self, number: int) -> Path:
        return self.parts / f"{number:05d}.parquet"


def _number(grade: float | None) -> float | None:
    return None if grade is None else float(grade)


def _column(name: str, rows: Sequence[RowResult]) -> list[Any]:
    values = [getattr(row, name) for row in rows]
    return [json.dumps(value, ensure_ascii=False) for value in values] if name in AS_JSON else values


def _row(values: Mapping[str, Any]) -> RowResult:
    """Return a row as it was before it was written."""
    known = {field.name: values[field.name] for field in fields(RowResult) if values.get(field.name) is not None}
    return RowResult(**{name: json.loads(value) if name in AS_JSON else value for name, value in known.items()})


def _write(path: Path, table: pa.Table) -> None:
    with new_file(path) as file:
        pq.write_table(table, file)
