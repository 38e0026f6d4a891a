"""Label rows, words or images of a file with a tuned classifier, or score its answers, in a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from headstart import machine
from headstart.config import DataSettings
from headstart.data.columns import (
    WORD_COLUMNS,
    RowError,
    find_image,
    find_pair,
    find_text_column,
    take_picture,
    take_tagged,
    take_text,
)
from headstart.data.formats import format_rows, named_columns
from headstart.data.labels import Labels
from headstart.data.preferences import RESPONSES, SCORES
from headstart.data.prepare import Coding, segment
from headstart.data.private import redact
from headstart.data.read import Note, Row, find_files, read_parts
from headstart.data.records import Conversation, Labelled, Preference, Record
from headstart.data.segments import ROWS_AT_ONCE, Example
from headstart.dataset import build_renderer, row_length
from headstart.engine.forward import RewardReader, TokenReader
from headstart.errors import DataError, Problem
from headstart.evaluate.entities import entities, has_entities
from headstart.evaluate.measure import OnProgress, spread_tags
from headstart.evaluate.metrics import tell
from headstart.evaluate.score import output_rows, score_answers, tag_rows
from headstart.files import new_file
from headstart.job import build_reader
from headstart.models.load import load_tokenizer, need_labels
from headstart.models.source import find_model
from headstart.verbs import PACK_TOKENS, Names, load_here, reading_config

DIGITS = 6


def predict(
    model: str,
    data: Names,
    out: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> int:
    """Label every row of `data` and write it to `out` as a line of JSON with what the model tells; return the rows.

    Added are `prediction` and, of one class, `probability` and `probabilities`; of several `predictions` and
    `probabilities`; of numbers `prediction` (of several numbers an object); of words `tags` and, under BIO, `entities`; of
    a row's answer its `reward`, of several answers `rewards`, in their order.
    Rows go through in parts, so memory doesn't grow with the file. Which columns are read comes from the run that the
    model is the result of, where `settings` don't say otherwise; longer texts are cut to what the model can read, and
    such rows say `"cut": true`.

    Raises ModelError where the model is no classifier, and DataError with the rows that can't be read or have no text;
    then nothing is written.
    """
    config = reading_config(model, data, settings)
    source = find_model(model)
    labels = need_labels(source)
    task = labels.task
    tokenizer = None if task == "images" else load_tokenizer(source)
    renderer = build_renderer(source, tokenizer, task)
    length = config.settings.data.max_length or row_length(task, source, tokenizer)
    torch.set_num_threads(config.settings.engine.threads or machine.cpu_count())
    reader = build_reader(load_here(source, task, labels).model, task, renderer, bfloat16=False)
    if reader.device.type == "cpu":
        reader.speed_up()
    reading = config.settings.data.model_copy(update={"over_length": "cut"})
    problems: list[Problem] = []
    done = 0

    def put_aside(item: Problem | Note) -> None:
        if isinstance(item, Problem):
            problems.append(item)

    with new_file(Path(out)) as file:
        for rows in read_parts(
            find_files(config.settings.data.train, config.settings.data.encoding), ROWS_AT_ONCE, put_aside
        ):
            records, reading = _take(rows, task, reading, problems)
            if problems:
                continue
            segmented = segment(records, reading, renderer, length, Coding(task, labels), whole=True)
            problems += segmented.problems
            problems += [
                Problem("row.too_long", f"{tokens:,} tokens, and the model reads {length:,}", str(where), "shorten it")
                for where, tokens in segmented.dropped
            ]
            if problems:
                continue
            for row, found in zip(rows, _tell(reader, segmented.examples, records, labels), strict=True):
                line = json.dumps({**row.fields, **found}, ensure_ascii=False, default=str)
                # Half of a surrogate pair in a column that isn't read stays the escape that it was.
                file.write(line.encode(errors="backslashreplace") + b"\n")
            done += len(rows)
            if on_progress:
                on_progress("labelling", done, done)
        if problems:
            raise DataError(problems)
    return done


def _take(
    rows: Sequence[Row], task: str, reading: DataSettings, problems: list[Problem]
) -> tuple[list[Record], DataSettings]:
    """Return rows as records without labels, and which columns they were read from: the same for the whole file."""
    if task == "reward":
        return _take_answers(rows, reading, problems), reading
    fields = {name: None for row in rows for name in row.fields}
    text, pair = reading.text, reading.text_pair
    if task == "images":
        text = text or next((found[0] for row in rows if (found := find_image({"label": "", **row.fields}))), "image")
    elif task == "tagging":
        text = text or next((name for name in WORD_COLUMNS if name in fields), "tokens")
    elif text is None:
        known = None if pair else find_pair(fields)
        text, pair = known or (find_text_column(rows), pair)

    def take(row: Row) -> Record:
        row = row._replace(fields=redact(row.fields, {})) if reading.redact else row
        if task == "images":
            return take_picture(Row(row.where, {**row.fields, "": "?"}), text, "")
        if task == "tagging":
            words = row.fields.get(text)
            words = words.split() if isinstance(words, str) else words
            blank = ["O"] * len(words) if isinstance(words, list) else None
            return take_tagged(Row(row.where, {text: words, "": blank}), text, "")
        return Labelled(row.where, take_text(row, text), "", pair=take_text(row, pair) if pair else None)

    records: list[Record] = []
    for row in rows:
        try:
            records.append(take(row))
        except RowError as error:
            problems += error.problems
    return records, reading.model_copy(update={"text": text, "text_pair": pair})


def _take_answers(rows: Sequence[Row], reading: DataSettings, problems: list[Problem]) -> list[Record]:
    """Return rows as prompts with the answers in them, each to be scored; what is said of how good they are doesn't count."""
    several = next((name for name in RESPONSES if any(isinstance(row.fields.get(name), list) for row in rows)), None)
    if several:
        rows = [
            row._replace(fields={**row.fields, "ranks": [*range(len(row.fields.get(several) or ()))]}) for row in rows
        ]
        rows = [row._replace(fields={k: v for k, v in row.fields.items() if k not in SCORES}) for row in rows]
    how: dict[str, Any] = {name: getattr(reading, name) for name in ("format", "reasoning", "redact")}
    how |= {"merge": "merge_turns" in reading.fix, "fold": "fold_system" in reading.fix}
    found = format_rows(rows, named=named_columns(reading), judged=False, **how)
    problems += found.problems
    records: list[Record] = []
    for record in found.examples:
        if isinstance(record, Conversation):
            *asked, last = record.messages
            answers = (replace(last, trained=True),)
            records.append(Preference(record.where, tuple(asked), answers, (0.0,), record.tools))
        elif isinstance(record, Preference):
            records.append(record)
        else:
            what = f"the rows are {found.detection.format}, and hold no answer to score"
            raise DataError(Problem("format.kind", what, str(record.where), "give messages, or prompt + completion"))
    return records


def _tell(
    reader: Any, examples: Sequence[Example], records: Sequence[Record], labels: Labels
) -> Iterator[dict[str, Any]]:
    """Yield for each row what the model tells of it."""
    if isinstance(reader, TokenReader):
        for example, record, (numbers, _) in zip(
            examples, records, tag_rows(reader, examples, PACK_TOKENS), strict=True
        ):
            words = record.words  # type: ignore[union-attr]
            tags = spread_tags([labels.names[n] for n in numbers], len(words))
            found: dict[str, Any] = {"tags": tags, **({"cut": True} if example.cut else {})}
            if has_entities(labels.names):
                found["entities"] = [
                    {"type": e.type, "text": " ".join(words[e.begin : e.end]), "begin": e.begin, "end": e.end}
                    for e in entities(tags)
                ]
            yield found
        return
    if isinstance(reader, RewardReader):
        for rewards in score_answers(reader, examples, PACK_TOKENS):
            given = [round(float(reward), DIGITS) for reward in rewards]
            yield {"reward": given[0]} if len(given) == 1 else {"rewards": given}
        return
    outputs = output_rows(reader, examples, PACK_TOKENS)
    for example, told in zip(examples, tell(outputs, labels), strict=True):
        found = {}
        probabilities = {n: round(p, DIGITS) for n, p in zip(labels.names, told.probabilities, strict=False)}
        if labels.task == "regression":
            values = dict(zip(labels.names, told.found, strict=True))
            found["prediction"] = told.found[0] if len(told.found) == 1 else values
        elif labels.task == "multilabel":
            found |= {"predictions": told.found, "probabilities": probabilities}
        else:
            sure = round(told.probability or 0.0, DIGITS)
            found |= {"prediction": told.found[0], "probability": sure, "probabilities": probabilities}
        yield found | ({"cut": True} if example.cut else {})
