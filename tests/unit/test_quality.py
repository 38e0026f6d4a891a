"""What hurts: each kind is found in the rows that have it, and in no others."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from headstart.data.languages import main_language
from headstart.data.quality import KINDS, Finding, look_through
from headstart.data.read import Where
from headstart.data.records import Document, Labelled, Picture, Record, Related
from tests.conftest import conversation

BOM, RIGHT_TO_LEFT = "\ufeff", "\u202e"
FAMILY = "\U0001f469\u200d\U0001f467"  # a joiner that belongs where it is


def look(records: Sequence[Record], held: Sequence[int] = ()) -> dict[str, Finding]:
    return {found.kind: found for found in look_through((record, n in held) for n, record in enumerate(records))}


def lines(found: Finding) -> list[int]:
    return [int(mention.where.rpartition(":")[2]) for mention in found.rows]


def documents(*texts: str) -> list[Record]:
    return [Document(Where("rows", line), text) for line, text in enumerate(texts, 1)]


def test_clean_rows_give_nothing() -> None:
    texts = [f"The patient number {n} came in for the {n}th time, which {n + 5} others did too." for n in range(40)]
    assert look(documents(*texts, f"caf\u00e9 {FAMILY} \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645")) == {}


@pytest.mark.parametrize(
    ("kind", "text", "detail"),
    [
        ("email", "write to jo@example.org or al@example.org", "jo..., 14 characters, and 1 more"),
        ("invisible", f"a{BOM}b{BOM} \u200b", "U+FEFF x 2, U+200B x 1"),
        ("bidi", f"user{RIGHT_TO_LEFT}nimda", "U+202E x 1"),
        ("look_alike", "log in at p\u0430ypal, not paypal", "'p\\u0430ypal' x 1"),
        (
            "look_alike",
            "\u043f\u0440o\u0431\u043b\u0435\u043c\u0430",
            "'\\u043f\\u0440o\\u0431\\u043b\\u0435\\u043c\\u0430' x 1",
        ),
        ("look_alike", "\u039fK \u039fK", "'\\u039fK' x 2"),
        ("look_alike", "\U0001d427\U0001d428\U0001d42d a word", "'\\U0001d427\\U0001d428\\U0001d42d' x 1"),
        ("not_nfc", "cafe\u0301", ""),
        ("blob", "see " + "aB3/" * 60 + " there", "240 characters"),
        ("long_word", "a" * 201, "201 characters"),
    ],
)
def test_what_hurts_in_one_row(kind: str, text: str, detail: str) -> None:
    found = look(documents("all is well", text))
    assert list(found) == [kind]
    assert [(str(m.where), m.detail) for m in found[kind].rows] == [("rows:2", detail)]


def test_words_that_mix_scripts_in_the_open_are_left_alone() -> None:
    texts = [
        "5 \u03bcm and \u0394T, k\u03a9 or \u03bbx",
        "SMS\u043a\u0430 \u0438 IT-\u043e\u0442\u0434\u0435\u043b",
        "\U0001d465 + \U0001d466",
        "\u041c\u0438\u0440 and peace",
    ]
    assert look(documents(*texts)) == {}


def test_words_of_look_alikes_alone_are_found_where_their_script_is_not_at_home() -> None:
    """`cope` in Cyrillic letters; `secop`, Cyrillic too, in a row that is found anyway; in Russian rows `rose` is a word."""
    rows = [
        "log in at \u0441\u043e\u0440\u0435 now",
        "one line",
        "p\u0430ypal \u0455\u0435\u0441\u043e\u0440",
        "\u03a7 of 3 \u03bd",
    ]
    found = look(documents(*rows))
    assert {kind: lines(finding) for kind, finding in found.items()} == {"look_alike": [1, 3]}
    assert found["look_alike"].rows[0].detail == "'\\u0441\\u043e\\u0440\\u0435' x 1"
    russian = ["rosa is \u0440\u043e\u0441\u0430", "the rose \u0440\u043e\u0437\u0430"]
    assert look(documents(*russian)) == {}
    assert lines(look(documents(*rows, *russian))["look_alike"]) == [
        1,
        3,
        5,
    ]  # two rows pass for Latin, one shows its own
    assert lines(look(documents(*rows[2:], *russian))["look_alike"]) == [1]


def test_rows_that_stand_twice_and_rows_that_leak() -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    rows = documents("a", words, "a", f"{words} more", "b", "b")
    found = look(rows, held=[1, 4])
    assert lines(found["duplicate"]) == [3, 6]
    assert [m.like for m in found["duplicate"].rows] == ["rows:1", "rows:5"]
    assert [(m.where, m.like) for m in found["leak"].rows] == [("rows:6", "rows:5")]
    near = [(m.where, m.like, m.detail) for m in found["near_leak"].rows]
    assert near == [("rows:4", "rows:2", "0.92")]  # 11 shingles of 12
    assert near == [(m.where, m.like, m.detail) for m in found["near_duplicate"].rows]


def test_other_answers_to_the_same_question() -> None:
    chats = [conversation("q", "a", line=1), conversation("q", "b", line=2), conversation("r", "b", line=3)]
    chats += [conversation("q", "a", line=4), conversation("q", "a", line=5, system="be brief")]
    found = look(chats)
    assert [(m.where, m.like) for m in found["contradiction"].rows] == [("rows:2", "rows:1")]
    assert lines(found["duplicate"]) == [4]
    labelled = [Labelled(Where("rows", n), text, label) for n, (text, label) in enumerate(["xa", "xb", "ya", "xa"], 1)]
    found = look(labelled)
    assert (lines(found["contradiction"]), lines(found["duplicate"])) == ([2], [4])
    pictures = [Picture(Where("rows", n), "p", label, "same bytes") for n, label in enumerate("ab", 1)]
    assert lines(look(pictures)["contradiction"]) == [2]
    scored = [Related(Where("rows", n), ("x", "y"), score) for n, score in enumerate((0.1, 0.9), 1)]
    assert lines(look(scored)["contradiction"]) == [2]
    pairs = [Related(Where("rows", n), ("x", other)) for n, other in enumerate("yz", 1)]
    assert "contradiction" not in look(pairs)  # one text may have several that belong to it


def test_a_near_duplicate_with_another_label_is_said_to_be_one() -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    rows = [
        Labelled(Where("rows", n), text, label) for n, (text, label) in enumerate([(words, "a"), (f"{words} x", "b")])
    ]
    assert look(rows)["near_duplicate"].rows[0].detail == "0.92, with another label"


def test_answers_that_are_far_longer_or_shorter_than_the_rest() -> None:
    usual = [conversation(f"question {n}", f"{n} " + "word " * (15 + n % 11), line=n + 1) for n in range(40)]
    odd = [conversation("why", "word " * 2000, line=41), conversation("how", "ok", line=42)]
    found = look([*usual, *odd])
    assert (lines(found["long"]), lines(found["short"])) == ([41], [42])
    assert "10,000 characters, the median is" in found["long"].rows[0].detail
    wide = [conversation(f"question {n}", f"{n} " + "word " * 2 ** (n % 11), line=n + 1) for n in range(40)]
    assert "long" not in look(wide)  # where lengths differ widely, none is odd
    assert "long" not in look([*usual[:18], odd[0]])  # of few rows it can't be told


def test_rows_in_another_script() -> None:
    latin = [f"The patient number {n} is well" for n in range(9)]
    found = look(documents(*latin, "Пациент чувствует себя хорошо", "12 + 34", "Fièvre passée, très bien"))
    assert [(m.where, m.detail) for m in found["script"].rows] == [("rows:10", "Cyrillic, the rest is Latin")]
    japanese = [f"患者{n}はよくなりましたので帰りました" for n in range(3)] + [
        f"患者{n}检查结果一切正常可以回家" for n in range(3)
    ]
    assert "script" not in look(documents(*japanese))
    assert "script" not in look(documents(*latin[:3], *japanese[:3]))  # no script is the usual one


SAID = {
    "German": "Der Patient klagt seit drei Tagen über Halsschmerzen und kann nicht gut schlucken, sagt die Ärztin.",
    "French": "Le patient se plaint de maux de gorge depuis trois jours et il ne peut pas avaler avec aisance.",
    "Spanish": "El paciente se queja de dolor de garganta desde hace tres días y no puede tragar con facilidad.",
    "Polish": "Pacjent skarży się od trzech dni na ból gardła i nie może dobrze przełykać, to jest jak co roku.",
    "Russian": "Пациент жалуется на боль в горле, и он не может хорошо глотать, но это как и в прошлом году.",
}


def test_rows_in_another_language() -> None:
    english = [
        f"The patient number {n} has a sore throat, and it is not the first time that he was in." for n in range(9)
    ]
    for name, text in SAID.items():
        found = look(documents(*english, text, "aspirin 500, bed rest, tea"))
        told = found["script" if name == "Russian" else "language"].rows
        assert [m.where for m in told] == ["rows:10"]
        assert main_language(text) == name
    assert [m.detail for m in look(documents(*english, SAID["German"]))["language"].rows] == [
        "German, the rest is English"
    ]
    assert "language" not in look(documents(*english[:3], *list(SAID.values())[:4]))  # no language is the usual one
    assert main_language("le la les" + " x" * 100) == main_language("the of 1 2 3") == ""


def test_every_kind_is_told_in_the_words_of_rows() -> None:
    assert all(what.startswith("rows ") for what in KINDS.values())
