"""Votes: every one is kept, what was preferred can be trained on, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headstart.config import DataSettings
from headstart.data.prepare import form_rows
from headstart.data.records import Message, Preference
from headstart.errors import DataError, UsageError
from headstart.vote import BAD, FIRST, SECOND, SKIP, TIE, Booth, Vote, Votes, read_prompts

ASKED = (Message("system", "Be brief."), Message("user", "Human: who?"))


def vote(said: str, first: tuple[str, str] = ("a", "Human: me."), second: tuple[str, str] = ("b", "You.")) -> Vote:
    return Vote(ASKED, (first, second), said)


def test_what_is_preferred_is_read_as_a_pair_and_nothing_else_is_trained_on(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.jsonl", print)
    for cast in (
        vote(FIRST),
        vote(SECOND),
        vote(TIE),
        vote(BAD),
        vote(SKIP),
        vote(FIRST, second=("b", " ")),
        vote(SECOND, ("b", "Me."), ("a", "Me. ")),
    ):
        votes.add(cast)
    formed = form_rows([str(votes.path)], DataSettings())
    assert not formed.formatted.problems
    rows = [row for row in formed.records if isinstance(row, Preference)]
    assert [(m.role, m.content) for m in rows[0].prompt] == [(m.role, m.content) for m in ASKED]
    assert [[answer.content for answer in row.answers] for row in rows] == [
        ["Human: me.", "You."],
        ["You.", "Human: me."],
    ]
    kept = [json.loads(line) for line in votes.path.read_text().splitlines()]
    assert [(row["chosen_by"], row["rejected_by"], row["shown"]) for row in kept] == [
        ("a", "b", ["a", "b"]),
        ("b", "a", ["a", "b"]),
    ]
    assert len(votes.undecided.read_text().splitlines()) == 5
    with pytest.raises(DataError) as error:
        form_rows([str(votes.undecided)], DataSettings())
    assert error.value.problems[0].code == "format.unknown"
    wins = votes.wins("a", "b")
    assert (wins.wins, wins.losses, wins.ties) == (1, 3, 2)  # a skip is no vote
    assert votes.wins("a", "c").rows == 0


def test_votes_go_behind_votes_and_half_a_line_is_cut_off(tmp_path: Path) -> None:
    told: list[str] = []
    votes = Votes(tmp_path / "votes.jsonl", told.append)
    votes.add(vote(FIRST))
    whole = votes.path.read_bytes()
    votes.path.write_bytes(whole + whole[:40])
    again = Votes(votes.path, told.append)
    assert votes.path.read_bytes() == whole
    assert "half written" in told.pop()
    votes.path.write_bytes(whole[:-1])  # all of a vote but the end of its line
    again = Votes(votes.path, told.append)
    assert votes.path.read_bytes() == whole
    again.add(vote(SECOND))
    assert len(again.rows()) == 2
    assert told == []
    data = tmp_path / "data.jsonl"
    for content in ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"a', '{"shown": 1}', "notes"):
        data.write_text(content)
        with pytest.raises(UsageError, match="no vote"):
            Votes(data, told.append)
        assert data.read_text() == content
    with pytest.raises(UsageError, match="no name"):
        Votes(tmp_path / "votes.csv", told.append)


class _Model:
    def __init__(self, text: str) -> None:
        self.text = text

    def reply(self, messages: Any) -> Any:
        return self


def test_the_order_is_hidden_and_what_is_typed_is_about_what_was_shown() -> None:
    shown: list[str] = []
    typed = iter(["no idea", " 1 ", "BOTH  bad", "end"])
    turned = iter([True, False, False])

    def booth(*, patient: bool) -> Booth:
        models: Any = (_Model("of a"), _Model("of b"))
        return Booth(("a", "b"), models, shown.append, lambda _: next(typed, None), patient, lambda: next(turned))

    cast = booth(patient=True).vote_on(ASKED)
    assert cast is not None
    assert cast.chosen == ("b", "of b")
    assert "".join(shown).index("of b") < "".join(shown).index("of a")
    assert not any(name in line for line in shown for name in ("[a]", "[b]"))
    second = booth(patient=True).vote_on(ASKED)
    assert second is not None
    assert (second.said, second.chosen, second.shown[0][0]) == (BAD, None, "a")
    assert booth(patient=True).vote_on(ASKED) is None
    typed = iter(["maybe"])
    turned = iter([False])
    with pytest.raises(UsageError, match="'maybe' is no vote"):
        booth(patient=False).vote_on(ASKED)


def test_prompts_are_lines_or_what_rows_ask(tmp_path: Path) -> None:
    lines = tmp_path / "asked.txt"
    lines.write_text("Who?\n\nWhy?\n")
    assert [prompt[0].content for prompt in read_prompts(str(lines))] == ["Who?", "Why?"]
    rows = tmp_path / "asked.jsonl"
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "x"},
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in ({"prompt": "p", "chosen": "c"}, {"messages": turns})))
    assert [[m.content for m in prompt] for prompt in read_prompts(str(rows))] == [["p"], ["s", "u"]]
    rows.write_text('{"completion": "x"}\n')
    with pytest.raises(DataError, match="asks nothing"):
        read_prompts(str(rows))
