"""What lies in data that hurts: each kind of it with the rows where it is. Rows go by once and leave only numbers behind."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headstart.data.feed import digest_of
from headstart.data.languages import main_language
from headstart.data.near import Distinct, Shingler, find_alike, find_near_leaks
from headstart.data.private import KINDS as PRIVATE
from headstart.data.private import find_private, masked
from headstart.data.read import Where
from headstart.data.records import Conversation, Document, Preference, Record, Related, Tagged

ROWS_AT_ONCE = 2048
OUTLIER_ROWS = 20  # of fewer it can't be told what is usual
SPREADS, LEAST_SPREAD = 6.0, 0.25  # of the logarithm of a length: at the least 4.5 times the median, or a 4.5th of it
SCRIPT_FRAC, SCRIPT_LETTERS = (
    0.8,
    10,
)  # the part of the rows that makes a script the usual one; a row of fewer letters has none
LONG_WORD = 200
# Nobody sees these, and a model learns them. Beside letters that aren't Latin a joiner has a meaning.
INVISIBLE = re.compile(
    "[\u180e\u200b\u2060\ufeff\U000e0000-\U000e007f]|(?<=[!-~])[\u200c\u200d]|[\u200c\u200d](?=[!-~])"
)
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
# Up to Armenian: scripts that put spaces between words.
WORD = re.compile(f"(?<![!-\u058f])[!-\u058f]{{{LONG_WORD},}}")
BLOB = re.compile(f"[A-Za-z0-9+/_=-]{{{LONG_WORD},}}")
BLOB_SIGNS = (re.compile("[0-9]"), re.compile("[a-z]"), re.compile("[A-Z]"))
# Letters of other scripts that look like Latin ones (after Unicode's confusables.txt), and Latin ones that look like Cyrillic.
LIKE_LATIN = (
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03bd\u03bf\u03f2\u03f3"
)
LIKE_LATIN += "АВЕЅІЈКМНОРСТУХԌԚԜавеѕіјорсухһԁԛԝү"
LIKE_CYRILLIC = "ABEKMHOPCTYXaeopcyx"
# Where Latin stands beside Greek or Cyrillic in a word, and the word around it.
MIXED = re.compile("[A-Za-z][\u0370-\u052f]|[\u0370-\u052f][A-Za-z]")
MIXED_WORD = re.compile("[A-Za-z\u0370-\u052f]+")
# Letters that give Greek and Cyrillic away, and words without one.
OWN_LETTER = re.compile(f"[{''.join(sign for sign in map(chr, range(0x370, 0x530)) if sign not in LIKE_LATIN)}]")
LATIN_LETTER = re.compile("[A-Za-z]")
ALIKE_WORD = re.compile(rf"(?<!\w)[{LIKE_LATIN}]{{2,}}(?!\w)")
# Letters of mathematics, which write words for the eye alone.
FANCY = re.compile("[\U0001d400-\U0001d6a3]{3,}")
LATIN = re.compile(f"(?:[A-Za-z][^A-Za-z]*){{{SCRIPT_LETTERS}}}")
SCRIPTS = {"CJK": "Chinese or Japanese", "HIRAGANA": "Chinese or Japanese", "KATAKANA": "Chinese or Japanese"}

KINDS: Mapping[str, str] = {
    "duplicate": "rows stand in the data before, word for word",
    "near_duplicate": "rows say nearly what an earlier row says",
    "leak": "rows to train on are held-out rows too; they are not trained on",
    "near_leak": "rows to train on say nearly what a held-out row says",
    "contradiction": "rows answer otherwise than an earlier row that asks the same",
    "long": "rows have far more to learn than the rest",
    "short": "rows have far less to learn than the rest",
    "script": "rows are in another script than the rest",
    "language": "rows are in another language than the rest",
    **{name: f"rows hold {kind.what}" for name, kind in PRIVATE.items()},
    "invisible": "rows hold characters that nobody sees",
    "bidi": "rows hold characters that turn the direction of writing",
    "look_alike": "rows hold words with letters of another script that look alike",
    "not_nfc": "rows hold letters in pieces (not in Unicode's NFC)",
    "blob": "rows hold what looks like encoded bytes",
    "long_word": f"rows hold a word of {LONG_WORD} characters or more",
}


@dataclass(frozen=True, slots=True)
class Mention:
    """A row, and what there is to say of it; `like` is the row that it is held against."""

    where: str
    detail: str = ""
    like: str = ""

    def __str__(self) -> str:
        path, _, line = self.like.rpartition(":")
        like = f"line {line}" if self.where.startswith(f"{path}:") and line else self.like
        said = ", ".join(filter(None, (like, self.detail)))
        return f"{self.where} ({said})" if said else self.where


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of what hurts, and all rows that it is in."""

    kind: str
    what: str
    rows: tuple[Mention, ...]


class Said(NamedTuple):
    """A row taken apart: what is asked (None: nothing), what is told, and how many characters are to be learned."""

    asked: str | None
    told: str
    length: int


# What stays of a row: where it stands, whether it is held out, the hashes of what it says, of
# all of it, of what it asks and tells, its length, script and language.
ROW = np.dtype(
    [
        ("file", "<i4"),
        ("line", "<i8"),
        ("held", "?"),
        ("digest", "<u8"),
        ("whole", "<u8"),
        ("asked", "<u8"),
        ("told", "<u8"),
        ("length", "<i8"),
        ("script", "<i4"),
        ("language", "<i4"),
    ]
)
Rows = NDArray[Any]
Found = Iterator[
    tuple[str, int, int, str]
]  # a kind, a row, the row that it is held against (or -1), what there is to say


def look_through(records: Iterable[tuple[Record, bool]]) -> list[Finding]:
    """Find what hurts in rows, each with whether it is held out."""
    shingler, names, scripts, languages = Shingler(), dict[str, int](), {"": 0}, {"": 0}
    mentions: dict[str, list[Mention]] = {}
    shown, alike = 0, set[Mention]()
    parts, spoken = [np.zeros(0, ROW)], False
    rest = iter(records)
    while part := list(islice(rest, ROWS_AT_ONCE)):
        texts = ["\n".join(record.texts) for record, _ in part]
        shingler.add(texts)
        spoken = spoken or any(texts)
        numbers = []
        for (record, held), text in zip(part, texts, strict=True):
            said = take_apart(record)
            script = main_script(text)
            numbers.append(
                (
                    names.setdefault(record.where.path, len(names)),
                    record.where.line,
                    held,
                    digest_of(record.content),
                    whole_digest(record),
                    0 if said.asked is None else digest_of(said.asked),
                    digest_of(said.told),
                    said.length,
                    scripts.setdefault(script, len(scripts)),
                    languages.setdefault(main_language(text), len(languages)),
                )
            )
            marks = dict(find_marks(text))
            shown += bool(OWN_LETTER.search(text))
            if "look_alike" not in marks and (words := _alike_words(text)):
                marks["look_alike"] = _counted(words)
                alike.add(Mention(str(record.where), marks["look_alike"]))
            for kind, detail in marks.items():
                mentions.setdefault(kind, []).append(Mention(str(record.where), detail))
        parts.append(np.array(numbers, ROW))
    if shown >= len(alike) > 0:  # the script is at home in these rows, and so are its words
        mentions["look_alike"] = [row for row in mentions["look_alike"] if row not in alike]
    rows, files = np.concatenate(parts), list(names)

    def where(row: int) -> str:
        return str(Where(files[rows["file"][row]], int(rows["line"][row])))

    for kind, row, other, detail in _compare(rows, shingler if spoken else None, list(scripts), list(languages)):
        mentions.setdefault(kind, []).append(Mention(where(row), detail, where(other) if other >= 0 else ""))
    return [Finding(kind, what, tuple(mentions[kind])) for kind, what in KINDS.items() if mentions.get(kind)]


def take_apart(record: Record) -> Said:
    """Tell what a row asks from what it tells."""
    if isinstance(record, Document):
        return Said(None, "", len(record.content))
    if isinstance(record, Conversation):
        asked, answer = record.messages[:-1], record.messages[-1]
        told = json.dumps([answer.content, list(answer.tool_calls)], default=str)
        length = sum(len(message.content) for message in record.messages if message.trained)
        return Said(replace(record, messages=asked).content if asked else None, told, length)
    if isinstance(record, Preference):
        ranked = sorted(zip([answer.content for answer in record.answers], record.scores, strict=True))
        return Said(record.content, json.dumps([score for _, score in ranked]), sum(len(text) for text, _ in ranked))
    length = sum(map(len, record.texts))
    if isinstance(record, Related):
        told = json.dumps([record.texts[1:], record.score])
        return Said(None if record.score is None else json.dumps(record.texts), told, length)
    return Said(record.content, json.dumps(record.tags if isinstance(record, Tagged) else record.label), length)


def whole_digest(record: Record) -> int:
    """Return a hash of all of a row: rows that differ in their label alone say the same, and are no duplicates."""
    return digest_of(f"{record.content}\0{take_apart(record).told}")


# --- in one row ---


def find_marks(text: str) -> Iterator[tuple[str, str]]:
    """Yield what hurts in a text by itself: its kind, and what there is to say of it."""
    private: dict[str, list[str]] = {}
    for item in find_private(text):
        private.setdefault(item.kind, []).append(masked(text, item))
    for kind, shown in private.items():
        yield kind, shown[0] + (f", and {len(shown) - 1} more" if len(shown) > 1 else "")
    if not text.isascii():
        for kind, pattern in (("invisible", INVISIBLE), ("bidi", BIDI)):
            if signs := Counter(pattern.findall(text)):
                yield kind, ", ".join(f"U+{ord(sign):04X} x {count}" for sign, count in signs.most_common(3))
        if words := _look_alikes(text):
            yield "look_alike", _counted(words)
        if not unicodedata.is_normalized("NFC", text):
            yield "not_nfc", ""
    if len(text) >= LONG_WORD and (word := WORD.search(text)):
        blob = next((m[0] for m in BLOB.finditer(text) if all(sign.search(m[0]) for sign in BLOB_SIGNS)), "")
        yield ("blob", f"{len(blob):,} characters") if blob else ("long_word", f"{len(word[0]):,} characters")


def _look_alikes(text: str) -> Counter[str]:
    """Return the words in which a letter passes for one of another script, each with how often it stands there.

    Words that mix scripts in the open, a name with an ending, say, hold letters that look like none of the other script.
    """
    found: Counter[str] = Counter(FANCY.findall(text))
    if MIXED.search(text):
        for word in MIXED_WORD.findall(text):
            latin = {sign for sign in word if sign.isascii()}
            others = set(word) - latin
            cyrillic = all(sign >= "\u0400" for sign in others)
            if latin and others and (others <= set(LIKE_LATIN) or (cyrillic and latin <= set(LIKE_CYRILLIC))):
                found[word] += 1
    return found


def _alike_words(text: str) -> Counter[str]:
    """Return the words beside Latin ones that hold nothing but letters which look Latin, and aren't.

    Unicode calls them whole-script confusables (Technical Standard 39, 4.2). Whether they pass for Latin words can only be
    told from other rows: in Russian ones they are words like others.
    """
    if text.isascii() or OWN_LETTER.search(text) or not LATIN_LETTER.search(text):
        return Counter()
    return Counter(ALIKE_WORD.findall(text))


def _counted(words: Counter[str]) -> str:
    return ", ".join(f"{word!a} x {count}" for word, count in words.most_common(3))


def main_script(text: str) -> str:
    """Return the script of most letters of a text; empty where it has few."""
    if text.isascii():
        return "Latin" if LATIN.search(text) else ""
    counts: Counter[str] = Counter()
    for sign, count in Counter(text).items():
        counts[_script_of(sign)] += count
    counts.pop("", None)
    (script, count) = max(counts.items(), key=lambda item: item[1], default=("", 0))
    return script if count >= SCRIPT_LETTERS else ""


@lru_cache(maxsize=1 << 16)
def _script_of(sign: str) -> str:
    """Return the script of a letter, which is the first word of its name in Unicode; empty of another sign."""
    if not unicodedata.category(sign).startswith("L"):
        return ""
    name = unicodedata.name(sign, "").split(" ")[0]
    return SCRIPTS.get(name, name.capitalize())


# --- among rows ---


def _compare(rows: Rows, shingler: Shingler | None, scripts: Sequence[str], languages: Sequence[str]) -> Found:
    """Yield what is found by holding rows against each other, kind by kind, in the order of the rows."""
    yield from _find_equal(rows)
    if shingler:
        yield from _find_near(rows, shingler)
    yield from _find_contradictions(rows)
    yield from _find_lengths(rows["length"])
    yield from _find_unusual("script", rows["script"], scripts)
    yield from _find_unusual("language", rows["language"], languages)


def _find_equal(rows: Rows) -> Found:
    distinct = Distinct.of(rows["whole"])
    first = distinct.rows[distinct.places]
    for row in np.flatnonzero(first < np.arange(len(rows))).tolist():
        yield "duplicate", row, int(first[row]), ""
    held = np.flatnonzero(rows["held"])
    digests, owners = np.unique(rows["digest"][held], return_index=True)
    places = np.searchsorted(digests, rows["digest"])
    places[places == len(digests)] = 0
    leaks = ~rows["held"] & np.isin(rows["digest"], digests)
    for row in np.flatnonzero(leaks).tolist():
        yield "leak", row, int(held[owners[places[row]]]), ""


def _find_near(rows: Rows, shingler: Shingler) -> Found:
    distinct = Distinct.of(rows["digest"])
    shingles = shingler.finish(distinct.rows)
    like = find_alike(shingles)
    for place in np.flatnonzero(like.other >= 0).tolist():
        row, other = int(distinct.rows[place]), int(distinct.rows[like.other[place]])
        labelled = rows["asked"][row] == rows["digest"][row]  # what such a row says is what it asks
        differs = labelled and rows["told"][row] != rows["told"][other]
        yield "near_duplicate", row, other, f"{like.share[place]:.2f}" + ", with another label" * bool(differs)
    like = find_near_leaks(shingles, distinct, rows["held"])
    for row in np.flatnonzero(like.other >= 0).tolist():
        yield "near_leak", row, int(like.other[row]), f"{like.share[row]:.2f}"


def _find_contradictions(rows: Rows) -> Found:
    places = np.flatnonzero(rows["asked"])
    distinct = Distinct.of(rows["asked"][places])
    first = places[distinct.rows[distinct.places]]
    for row, before in zip(places.tolist(), first.tolist(), strict=True):
        if rows["told"][row] != rows["told"][before]:
            yield "contradiction", row, before, ""


def _find_lengths(lengths: NDArray[np.int64]) -> Found:
    """Yield rows whose length lies far from the median, in median absolute deviations of its logarithm."""
    places = np.flatnonzero(lengths)
    if len(places) < OUTLIER_ROWS:
        return
    logs = np.log(lengths[places])
    median = np.median(logs)
    spread = max(
        LEAST_SPREAD, 1.4826 * float(np.median(np.abs(logs - median)))
    )  # the factor makes it a standard deviation
    for row, away in zip(places.tolist(), ((logs - median) / spread).tolist(), strict=True):
        if abs(away) > SPREADS:
            detail = f"{lengths[row]:,} characters, the median is {math.exp(median):,.0f}"
            yield "long" if away > 0 else "short", row, -1, detail


def _find_unusual(kind: str, found: NDArray[np.int32], names: Sequence[str]) -> Found:
    """Yield rows whose script or language (0 of a row that shows none) is not that of nearly all."""
    counts = np.bincount(found, minlength=len(names))
    counts[0] = 0
    usual = int(counts.argmax())
    if counts[usual] < SCRIPT_FRAC * max(1, counts.sum()):
        return
    for row in np.flatnonzero((found > 0) & (found != usual)).tolist():
        yield kind, row, -1, f"{names[found[row]]}, the rest is {names[usual]}"
