"""Personal data and secrets: what has their shape and check digits is found, what only looks like it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headstart.config import DataSettings
from headstart.data.prepare import form_rows
from headstart.data.private import find_private, masked, redact
from headstart.data.read import Row, Where

# Put together here, so that no scanner takes this file for a leak. Card and IBAN are the examples of their standards.
KEYS = {
    "api_key": [
        "AKIA" + "IOSFODNN7EXAMPLE",
        "ghp_" + "a1" * 18,
        "github_pat_" + "a1" * 20,
        "xoxb-" + "1234567890-abc",
        "sk-" + "proj-a1b2c3d4e5f6g7h8i9",
        "AIza" + "a1b2C" * 7,
    ],
    "jwt": ["eyJ" + "hbGciOiJI.eyJ" + "zdWIiOiIx.c2ln"],
    "private_key": ["-----BEGIN RSA " + "PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----"],
    "email": ["jo.doe+x@mail.example.org"],
    "iban": ["GB82 WEST 1234 5698 7654 32", "DE89370400440532013000"],
    "card": ["4111 1111 1111 1111", "378282246310005"],
    "ip_address": ["203.0.113.77", "2001:db8::8a2e:370:7334"],
    "phone": ["+44 20 7946 0958", "(202) 555-0143", "202-555-0143", "+1 (202) 555-0143"],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in KEYS.items() for text in texts])
def test_each_kind_is_found_whole_between_words_and_replaced(kind: str, text: str) -> None:
    whole = f"It is {text}, he said."
    (found,) = find_private(whole)
    assert (found.kind, whole[found.begin : found.end]) == (kind, text)
    shown = masked(whole, found)
    assert shown == f"{text[:2]}..., {len(text)} characters"
    counts: dict[str, int] = {}
    row = {"a": [whole, {"b": text}], "n": 5}
    mark = f"[{kind.upper()}]"
    assert redact(row, counts) == {"a": [f"It is {mark}, he said.", {"b": mark}], "n": 5}
    assert counts == {kind: 2}


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # Luhn fails
        "0000 0000 0000 0000",
        "GB82 WEST 1234 5698 7654 33",  # modulo 97 fails
        "256.1.1.1",
        "127.0.0.1 and 0.0.0.0 and ::1",
        "version 1.2.3.4.5",
        "at 12:30:45 on 2024-05-17, 10:11:12:13",
        "the 120-300-4000 block",
        "std::vector<int>::iterator",
        "a@b, @name, user@localhost",
        "blood pressure 120/80, pulse 72, 36.5 degrees, 3,000,000 of 12 345 678",
        "sk-learn-based-estimators-are-common",
        "+1 to that; 00 is a number",
    ],
)
def test_what_only_looks_private_stays(text: str) -> None:
    assert not find_private(text)
    assert redact(text, {}) == text


def test_of_what_overlaps_one_kind_is_counted() -> None:
    assert [item.kind for item in find_private("mail 4111111111111111@example.org now")] == ["email"]
    both = find_private("a@example.org or b@example.org from 203.0.113.77")
    assert [item.kind for item in both] == ["email", "email", "ip_address"]


def test_rows_are_learned_without_what_is_private_and_grouped_as_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"ask {name}@example.org", "who": f"{name}@example.org"} for name in ("jo", "al")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    formed = form_rows([str(file)], DataSettings(fix=("redact",), group_by="who"))
    assert [record.content for record in formed.records] == ["ask [EMAIL]"] * 2
    assert [record.group for record in formed.records] == ['"jo@example.org"', '"al@example.org"']
    assert "private data replaced: 4 x [EMAIL]" in formed.notes


def test_rows_to_label_are_read_as_those_that_were_learned() -> None:
    from headstart.label import _take

    rows = [Row(Where("rows", 1), {"text": "ask jo@example.org"})]
    for fix, said in ((("redact",), "ask [EMAIL]"), ((), "ask jo@example.org")):
        (record,), _ = _take(rows, "classification", DataSettings(fix=fix), [])
        assert record.content == said
