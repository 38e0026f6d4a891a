"""The columns of a row: templates over them, and the texts, labels, tags and pictures that they hold."""

from __future__ import annotations

import hashlib
import json
import math
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headstart.data.read import IMAGE_ENDINGS, Row
from headstart.data.records import Labelled, Picture, Related, Tagged
from headstart.errors import DataError, Problem

TEXT_COLUMNS = ("text", "sentence", "utterance", "content", "review", "query", "question", "input")
LABEL_COLUMNS = ("label", "labels", "intent", "category", "class")
SCORE_COLUMNS = ("score", "similarity", "similarity_score")
PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_A", "sentence_B"),
    ("text", "text_pair"),
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "response"),
)
RELATED_COLUMNS = (("anchor", "positive"), ("query", "positive"), ("query", "pos"), ("query", "document"))
NEGATIVE = "negative"
WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("tags", "ner_tags", "labels", "pos_tags", "chunk_tags", "ner", "bio")
IMAGE_COLUMNS = ("image", "image_path", "file_name", "path", "file")


class RowError(Exception):
    """A row that can't be used, with what is wrong in it."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = list(problems)


# --- templates ---


def as_template(text: str) -> str:
    """Return `text` as a template: a bare column name stands for its value."""
    return text if "{" in text else f"{{{text}}}"


def template_columns(template: str) -> list[str]:
    """Return the columns that a template names. Raises DataError where it can't be read."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(as_template(template)) if name is not None]
    except ValueError as error:
        cure = "write {column}; a brace that is text is doubled: {{ and }}"
        raise DataError(Problem("format.column", f"no template: {error}", template, cure)) from None


def need_columns(rows: Sequence[Row], names: Iterable[str], setting: str) -> None:
    """Raise DataError where no row has one of the columns."""
    known = {name: None for row in rows for name in row.fields}
    missing = [name for name in dict.fromkeys(names) if name not in known]
    if missing:
        what = f"no row has a column {', '.join(map(repr, missing))}"
        raise DataError(Problem("format.column", what, setting, f"the columns are {', '.join(known)}"))


def fill(template: str, row: Row) -> str:
    """Fill a template from a row. Raises RowError where a value is missing or no text."""
    parts = []
    for literal, name, _, _ in string.Formatter().parse(as_template(template)):
        parts.append(literal)
        if name is not None:
            value = row.fields.get(name)
            if value is None or isinstance(value, (list, dict)):
                code = "row.field_missing" if value is None else "row.field_type"
                what = "no value" if value is None else f"a {type(value).__name__} where text is expected"
                raise RowError(Problem(code, what, row.where.field(name), "fill it in, or delete the row"))
            parts.append(value if isinstance(value, str) else str(value))
    return "".join(parts)


def check_encodable(value: Any, place: str) -> None:
    """Raise RowError where a text holds half of a surrogate pair, which no encoding can write."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"half of a surrogate pair (\\u{ord(text[error.start]):04x}) at character {error.start + 1}"
        raise RowError(Problem("row.unencodable", what, place, "write the whole character, or delete it")) from None


# --- what columns hold ---


def take_text(row: Row, template: str) -> str:
    """Return a text that says something."""
    content = fill(template, row)
    check_encodable(content, str(row.where))
    if not content.strip():
        raise RowError(Problem("row.empty_text", "the text is empty", str(row.where), "fill it in, or delete the row"))
    return content


def take_group(row: Row, group_by: str | None) -> str | None:
    """Return what rows are kept together by."""
    if group_by is None:
        return None
    value = row.fields.get(group_by)
    if value is None:
        raise RowError(Problem("row.field_missing", "no value to group by", row.where.field(group_by), "fill it in"))
    return json.dumps(value, default=str)


def take_number(value: Any, place: str) -> float:
    """Return a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # of 400 digits, say
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise RowError(Problem("row.label", f"{value!r:.40} where a number is expected", place, "a finite number"))
    return number


def take_labelled(row: Row, text: str, pair: str | None, label: Sequence[str], task: str) -> Labelled:
    """Return a text, or a pair, with its label as `task` asks: a class, several, or numbers."""
    texts = take_text(row, text), take_text(row, pair) if pair else None
    found = [row.fields.get(name) for name in label]
    places = [row.where.field(name) for name in label]
    if task == "regression":
        values = found[0] if len(found) == 1 and isinstance(found[0], list) else found
        numbers = tuple(take_number(value, place) for value, place in zip(values, places * len(values), strict=False))
        return Labelled(row.where, texts[0], numbers, pair=texts[1])
    if task == "multilabel":
        return Labelled(row.where, texts[0], _several(found, label, places), pair=texts[1])
    return Labelled(row.where, texts[0], take_class(found[0], places[0]), pair=texts[1])


def take_class(value: Any, place: str) -> str:
    """Return the one class of a row."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowError(Problem("row.field_missing", "no label", place, "fill it in, or delete the row"))
    if isinstance(value, (float, list, dict)):
        what = f"the label is {value!r:.40}" if isinstance(value, float) else f"the label is a {type(value).__name__}"
        raise RowError(Problem("row.label", what, place, "one class a row, as text or a whole number"))
    check_encodable(str(value), place)
    return str(value)


def _several(found: Sequence[Any], names: Sequence[str], places: Sequence[str]) -> tuple[str, ...]:
    """Return the classes of a row: those of a list, or the columns that hold a 1."""
    if len(names) > 1:
        for value, place in zip(found, places, strict=True):
            if not is_flag(value):
                raise RowError(Problem("row.label", f"{value!r:.40} where 0 or 1 is expected", place, "0 or 1"))
        return tuple(name for name, value in zip(names, found, strict=True) if str(value).lower() in ("1", "true"))
    values = [] if found[0] == "" else found[0]
    if not isinstance(values, list):
        what = f"a {type(values).__name__} where a list of classes is expected"
        raise RowError(Problem("row.label", what, places[0], '["a", "b"], or [] for none'))
    return tuple(dict.fromkeys(take_class(value, f"{places[0]}[{n}]") for n, value in enumerate(values)))


def is_flag(value: Any) -> bool:
    """Tell whether a value says yes or no."""
    return str(value).lower() in ("0", "1", "true", "false")


def label_task(rows: Sequence[Row], label: Sequence[str]) -> str:
    """Return what kind of label rows have: lists and columns of 0 and 1 are several classes, fractions are numbers."""
    values = [row.fields.get(name) for row in rows for name in label]
    lists = [value for value in values if isinstance(value, list)]
    if lists and 2 * len(lists) > len(values):
        return "regression" if _has_fraction([v for value in lists for v in value]) else "multilabel"
    if len(label) > 1:
        return "multilabel" if all(map(is_flag, values)) else "regression"
    numbers = [value for value in values if _is_number(value)]
    return "regression" if 2 * len(numbers) > len(values) and _has_fraction(numbers) else "classification"


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _has_fraction(values: Sequence[Any]) -> bool:
    return all(map(_is_number, values)) and any(float(value) != int(float(value)) for value in values)


def take_tagged(row: Row, words: str, tags: str) -> Tagged:
    """Return words with as many tags, in BIO in which every entity begins with its B where tags are such."""
    found: list[tuple[str, ...]] = []
    for name in (words, tags):
        value = row.fields.get(name)
        place = row.where.field(name)
        if not isinstance(value, list) or not value:
            what = "no value" if value is None else "empty" if value == [] else f"a {type(value).__name__}"
            raise RowError(Problem("row.field_type", f"{what} where a list is expected", place, '["a", "b", ...]'))
        bad = next((n for n, item in enumerate(value) if item is None or isinstance(item, (list, dict, float))), None)
        if bad is not None:
            raise RowError(Problem("row.field_type", f"{value[bad]!r:.40} is no text", f"{place}[{bad}]", "give text"))
        check_encodable(value, place)
        found.append(tuple(map(str, value)))
    if len(found[0]) != len(found[1]):
        what = f"{len(found[0])} words and {len(found[1])} tags"
        raise RowError(Problem("row.tags", what, str(row.where), "one tag a word"))
    return Tagged(row.where, found[0], found[1])


def take_related(row: Row, columns: Sequence[str], score: str | None = None) -> Related:
    """Return texts that belong together, from columns in the order anchor, positive, negative."""
    texts = tuple(take_text(row, name) for name in columns)
    number = take_number(row.fields.get(score), row.where.field(score)) if score else None
    return Related(row.where, texts, number)


def take_picture(row: Row, image: str, label: str) -> Picture:
    """Return an image file, which is named from the data file's folder, with its class."""
    place = row.where.field(image)
    name = row.fields.get(image)
    if not isinstance(name, str) or not name:
        raise RowError(Problem("row.field_missing", "no path of an image", place, "the path of an image file"))
    path = Path(row.where.path).parent / name
    found = take_class(row.fields.get(label), row.where.field(label))
    try:
        if path.exists() and not path.is_file():  # a device, say, which has no end
            raise OSError("no regular file")
        digest = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    except (OSError, ValueError) as error:
        what = f"can't be read: {getattr(error, 'strerror', None) or error}"
        raise RowError(Problem("row.image", what, str(path), "mend the path; it starts at the data file")) from None
    return Picture(row.where, str(path), found, digest)


# --- which columns ---


def find_pair(fields: Iterable[str]) -> tuple[str, str] | None:
    """Return the columns of two texts that are labelled together."""
    known = set(fields)
    return next((pair for pair in PAIR_COLUMNS if known.issuperset(pair)), None)


def find_labelled(fields: Iterable[str]) -> tuple[str, str | None, str] | None:
    """Return the columns of a text, of its pair if there is one, and of the label."""
    known = set(fields)
    pair = find_pair(known)
    label = next((n for n in (*LABEL_COLUMNS, *(SCORE_COLUMNS if pair else ())) if n in known), None)
    if label is None:
        return None
    if pair:
        return (*pair, label)
    text = next((name for name in TEXT_COLUMNS if name in known), None)
    return (text, None, label) if text else None


def find_related(fields: Iterable[str]) -> tuple[str, ...] | None:
    """Return the columns of texts that belong together."""
    known = set(fields)
    pair = next((pair for pair in RELATED_COLUMNS if known.issuperset(pair)), None)
    return pair and (*pair, *((NEGATIVE,) if NEGATIVE in known else ()))


def find_tagged(fields: Iterable[str]) -> tuple[str, str] | None:
    """Return the columns of words and of tags."""
    known = set(fields)
    words = next((name for name in WORD_COLUMNS if name in known), None)
    tags = next((name for name in TAG_COLUMNS if name in known), None)
    return (words, tags) if words and tags else None


def find_image(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the columns of an image's path and of its label."""
    label = next((name for name in LABEL_COLUMNS if name in fields), None)
    image = next((n for n in IMAGE_COLUMNS if str(fields.get(n, "")).lower().endswith(IMAGE_ENDINGS)), None)
    return (image, label) if image and label else None


def find_text_column(rows: Sequence[Row], label: Sequence[str] = ()) -> str:
    """Return the one of TEXT_COLUMNS, but the label's, that rows have. Raises DataError where none or several could be it."""
    known = {name: None for row in rows for name in row.fields}
    found = [name for name in TEXT_COLUMNS if name in known and name not in label]
    if len(found) > 1:
        cure = " or ".join(f"-s data.text={name}" for name in found)
        both = " and ".join(map(repr, found))
        raise DataError(Problem("format.column", f"{both} could each be the text", "data.text", cure))
    if not found:
        cure = f'-s data.text="{{column}}"; the columns are {", ".join(known)}'
        raise DataError(Problem("format.column", "it isn't known which column is the text", "data.text", cure))
    return found[0]
