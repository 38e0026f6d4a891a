"""Parquet, a few rows at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headstart.data.inflate import InflationError, Meter, open_plain
from headstart.data.rows import Item, Row, SourceFile, Where
from headstart.errors import Problem

ROWS_AT_ONCE = 256


def read(file: SourceFile, _: bytes) -> Iterator[Item]:
    """Yield the rows of a parquet file; where they stand is their number, from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    meter = Meter(file.path.stat().st_size)
    try:
        with open_plain(file.path) as stream:
            table = pq.ParquetFile(pa.BufferReader(stream.read()) if file.path.suffix == ".gz" else file.path)
        if problem := _parquet_fault(file, table.schema_arrow):
            yield problem
            return
        for group in range(table.num_row_groups):
            meter.add(table.metadata.row_group(group).total_byte_size)
        meter = Meter(file.path.stat().st_size)
        for batch in table.iter_batches(batch_size=ROWS_AT_ONCE):
            meter.add(batch.nbytes)
            for fields in _without_nanoseconds(batch).to_pylist():
                number += 1
                yield Row(Where(file.name, number), fields)
        if number != table.metadata.num_rows:
            raise ValueError(f"{number:,} rows where it says that it holds {table.metadata.num_rows:,}")
        _check_counts(table)
    except InflationError:
        raise
    except Exception as error:  # what the libraries below raise on a damaged file, nobody lists
        yield Problem("data.unreadable", f"damaged parquet: {error}", file.name, "fetch the file again")
        return
    if not number:
        yield Problem("data.empty", "the file holds no rows", file.name, "give a file with rows")


def _check_counts(table: Any) -> None:
    """Raise ValueError where a parquet file that was read has columns of more values than rows, which were left out then.

    Before it is read such numbers can't be asked for: pyarrow ends the whole process where they are damaged.
    """
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        for column in range(group.num_columns):
            flat = table.schema.column(column).max_repetition_level == 0
            if flat and group.column(column).num_values != group.num_rows:
                raise ValueError(f"a column of {group.column(column).num_values:,} values in {group.num_rows:,} rows")


def _parquet_fault(file: SourceFile, schema: Any) -> Problem | None:
    names = schema.names
    if twice := next((name for name in names if names.count(name) > 1), None):
        what = f"the column {twice!r} stands twice"
        return Problem("data.unreadable", what, file.name, "give each column its own name")
    for column in schema:
        if (column.metadata or {}).get(b"ARROW:extension:name") == b"arrow.py_extension_type":
            what = f"the column {column.name!r} holds Python pickles, which are never opened"
            return Problem("data.unreadable", what, file.name, "write it as text, numbers or lists")
    return None


def _without_nanoseconds(batch: Any) -> Any:
    """Return a batch whose nanosecond times are text: Python's own times hold microseconds only."""
    import pyarrow as pa

    for place, column in enumerate(batch.schema):
        if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
            batch = batch.set_column(place, column.name, batch.column(place).cast(pa.string()))
    return batch
