"""Votes of people: two models answer each prompt, nobody is told which is which, and what is preferred can be trained on.

A vote for one of two answers is a row of preferences (`prompt`, `chosen`, `rejected`) in the file of votes. What says nothing that
could be learned (a tie, both bad, no vote, answers that are alike or empty) lies in a file beside it, whose rows are none.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headstart.chat import Chat
from headstart.data.preferences import PROMPTS, as_turns
from headstart.data.read import Row, find_files, read
from headstart.data.records import Message
from headstart.display import Display
from headstart.errors import DataError, Problem, UsageError
from headstart.evaluate.wins import Wins
from headstart.files import Lines, sync_file, sync_folder
from headstart.report.words import wins_words

FIRST, SECOND, TIE, BAD, SKIP, END = "first", "second", "tie", "both_bad", "skip", "end"
WORDS = {
    **{"1": FIRST, "2": SECOND, "t": TIE, "tie": TIE, "b": BAD, "bad": BAD, "both bad": BAD, "both_bad": BAD},
    **{"s": SKIP, "skip": SKIP, "q": END, "end": END, "quit": END},
}
ASKED = "which is better? 1, 2, tie, bad (both are), skip, or end > "


@dataclass(frozen=True)
class Vote:
    """One vote: what was asked, both answers in the order in which they were shown, each with whose it is, and what was said."""

    prompt: Sequence[Message]
    shown: Sequence[tuple[str, str]]
    said: str

    @property
    def chosen(self) -> tuple[str, str] | None:
        """The model that was chosen and its answer; None where neither was."""
        return self.shown[(FIRST, SECOND).index(self.said)] if self.said in (FIRST, SECOND) else None

    @property
    def teaches(self) -> bool:
        """Tell whether it can be trained on: one of two answers is better, and they differ, and none is empty."""
        texts = [text.strip() for _, text in self.shown]
        return self.chosen is not None and all(texts) and texts[0] != texts[1]

    def to_json(self, voted_at: str) -> dict[str, Any]:
        """The vote as a row: of preferences where it teaches something."""
        turns = [{"role": message.role, "content": message.content} for message in self.prompt]
        models, texts = zip(*self.shown, strict=True)
        about = {"vote": self.said, "shown": list(models), "voted_at": voted_at}
        if not self.teaches:
            return {"asked": turns, "said": list(texts), **about}
        best = (FIRST, SECOND).index(self.said)
        sides = {
            name: [{"role": "assistant", "content": texts[n]}] for name, n in (("chosen", best), ("rejected", 1 - best))
        }
        return {"prompt": turns, **sides, "chosen_by": models[best], "rejected_by": models[1 - best], **about}


@dataclass
class Votes:
    """The files of votes, which grow vote by vote. Each is on the disk before the next is asked for."""

    path: Path
    tell: Callable[[str], None]
    undecided: Path = field(init=False)

    def __post_init__(self) -> None:
        if self.path.suffix != ".jsonl":
            what = f"{self.path} is no name for a file of votes"
            raise UsageError(Problem("usage.flag", what, "--out", "-o votes.jsonl"))
        self.undecided = self.path.with_suffix(".undecided.jsonl")
        self.rows()  # before anything is changed: the files may hold something else
        for path in (self.path, self.undecided):
            self._mend_end(path)

    def add(self, vote: Vote) -> None:
        """Keep a vote. Raises OSError where it can't be written; nothing of it is in the file then."""
        path = self.path if vote.teaches else self.undecided
        new = not path.exists()
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        path.parent.mkdir(parents=True, exist_ok=True)
        Lines(path).add(json.dumps(vote.to_json(now)))  # in ASCII: an answer may hold half a surrogate
        sync_file(path)
        if new:
            sync_folder(path.parent)

    def rows(self) -> list[dict[str, Any]]:
        """Return every vote of both files. Raises UsageError where one holds something else, which is left as it is."""
        found = []
        for path in (self.path, self.undecided):
            *lines, end = path.read_bytes().split(b"\n") if path.exists() else [b""]
            for number, line in enumerate([*lines, *([end] if end and not lines else [])], 1):
                row = _as_vote(line)
                if row is None:
                    what = "this line is no vote: votes are only put behind votes"
                    raise UsageError(Problem("usage.flag", what, f"{path}:{number}", "choose another file with -o"))
                found.append(row)
        return found

    def _mend_end(self, path: Path) -> None:
        """Cut off, and tell, a last line that a power cut left half written: that vote was never confirmed."""
        lines, _, end = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
        if not end:
            return
        with path.open("rb+") as file:
            if _as_vote(end):
                file.seek(0, 2)
                file.write(b"\n")
            else:
                file.truncate(len(lines) + 1)
                self.tell(f"{path}: its last line was half written, and is taken away")

    def wins(self, a: str, b: str) -> Wins:
        """Count how often `b` was preferred to `a`, over all votes on these two; ties and both bad are ties."""
        rows = [row for row in self.rows() if set(row["shown"]) == {a, b} and row["vote"] != SKIP]
        picked = [row["shown"][(FIRST, SECOND).index(row["vote"])] for row in rows if row["vote"] in (FIRST, SECOND)]
        return Wins("votes", picked.count(b), picked.count(a), len(rows) - len(picked))


def _as_vote(line: bytes) -> dict[str, Any] | None:
    """Return a line of a file of votes as its values; None for any other."""
    row = None
    with contextlib.suppress(ValueError):
        row = json.loads(line)
    known = (
        isinstance(row, dict)
        and isinstance(row.get("shown"), list)
        and len(row["shown"]) == 2
        and row.get("vote") in WORDS.values()
    )
    return row if known else None


# --- prompts ---


def read_prompts(file: str) -> list[list[Message]]:
    """Return the prompts of a file: of a .txt each line, of rows their `prompt` (or `messages`, `question`, ...) or `text`.

    Of turns those up to the user's last count. Raises DataError where a row has none.
    """
    if file.endswith(".txt"):
        return _read_lines(file)
    items = list(read(find_files([file])))
    problems = [item for item in items if isinstance(item, Problem)]
    found = []
    for row in (item for item in items if isinstance(item, Row)):
        turns = _turns(row)
        if turns:
            found.append(turns)
        else:
            cure = "give each row a `prompt`: a text, or turns with `role` and `content`"
            problems.append(Problem("format.column", "the row asks nothing", str(row.where), cure))
    if problems or not found:
        raise DataError(problems or Problem("data.empty", "no prompt is in it", file, "a prompt a line, in a .txt"))
    return found


def _read_lines(file: str) -> list[list[Message]]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            Problem("data.encoding", f"byte {error.start:,} is no UTF-8", file, "save it as UTF-8")
        ) from None
    found = [[Message("user", line)] for line in text.splitlines() if line.strip()]
    if not found:
        raise DataError(Problem("data.empty", "no prompt is in it", file, "a prompt a line"))
    return found


def _turns(row: Row) -> list[Message]:
    value = next((row.fields[name] for name in (*PROMPTS, "text") if row.fields.get(name)), None)
    turns = as_turns(value, "user") if value is not None else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return []
    messages = [
        Message(str(turn.get("role")), turn["content"]) for turn in turns if isinstance(turn.get("content"), str)
    ]
    last = max((n for n, message in enumerate(messages) if message.role == "user"), default=-1)
    return messages[: last + 1] if len(messages) == len(turns) else []


# --- the vote ---


@dataclass(frozen=True)
class Booth:
    """Two models, by the names that a user gave them, and how a person is shown and asked something.

    `ask` returns what was typed, None at its end; `toss` tells whether the second model's answer is shown first.
    """

    names: tuple[str, str]
    models: tuple[Chat, Chat]
    show: Callable[[str], None]
    ask: Callable[[str], str | None]
    patient: bool
    toss: Callable[[], bool] = lambda: random.SystemRandom().random() < 0.5

    def vote_on(self, prompt: Sequence[Message]) -> Vote | None:
        """Let both answer, and ask which is better; None where the person has had enough."""
        answers = [(name, model.reply(prompt).text) for name, model in zip(self.names, self.models, strict=True)]
        shown = answers[::-1] if self.toss() else answers
        for number, (_, text) in enumerate(shown, 1):
            self.show(f"\n[{number}]\n{text.strip() or '(it says nothing)'}")
        while (typed := self.ask(ASKED)) is not None:
            said = WORDS.get(" ".join(typed.lower().split()))
            if said:
                return None if said == END else Vote(prompt, shown, said)
            if not self.patient:
                cure = f"one of {', '.join(WORDS)}"
                raise UsageError(Problem("usage.flag", f"{typed.strip()!r:.40} is no vote", "standard input", cure))
        return None


def hold_vote(
    names: Sequence[str],
    display: Display,
    out: Path,
    prompts: str | None = None,
    *,
    live: bool,
    **how: Any,
) -> dict[str, Any]:
    """Hold a vote between two models until prompts or people have had enough; return what was voted, and who won.

    Prompts come from a file, or are typed where there is a terminal (`live`); votes come from standard input, a line each. `how`
    goes to `Chat`. Raises UsageError where the two are one, or where there is nobody to ask.
    """
    if len(names) != 2 or names[0] == names[1]:
        cure = "headstart chat MODEL RUN --compare"
        raise UsageError(Problem("usage.flag", "two models are compared, of different names", " ".join(names), cure))
    if prompts is None and not live:
        cure = "--prompts FILE, and votes on standard input, a line each"
        raise UsageError(Problem("usage.flag", "without a terminal nobody can ask", "chat", cure))
    votes, given = Votes(out, display.warn), read_prompts(prompts) if prompts else None
    a, b = names[0], names[1]
    booth = Booth((a, b), (Chat(a, **how), Chat(b, **how)), display.line, _asker(display, live), live)
    system = [Message("system", how["system"])] if how.get("system") else []
    cast: list[Vote] = []
    for asked in given if given is not None else _typed(booth.ask):
        prompt = [*system, *asked] if asked[0].role != "system" else asked
        if given is not None:
            display.line(f"\n{len(cast) + 1}/{len(given)}  {prompt[-1].content}", "bold")
        vote = booth.vote_on(prompt)
        if vote is None:
            break
        votes.add(vote)
        cast.append(vote)
    told = not live or not cast or (booth.ask("tell which was which? y/n > ") or "y").strip().lower() not in ("n", "no")
    return _conclude(votes, (a, b), cast, display, told=told)


def _conclude(
    votes: Votes, names: tuple[str, str], cast: Sequence[Vote], display: Display, *, told: bool
) -> dict[str, Any]:
    """Say what became of the votes, and who won where that may be told."""
    wins = votes.wins(*names)
    display.title("votes")
    display.fact("cast", f"{len(cast):,} now, {wins.rows:,} on these two in all")
    if told:
        for number, vote in enumerate(cast, 1):
            display.line(
                f"  {number}: 1 was {vote.shown[0][0]}, 2 was {vote.shown[1][0]}; {vote.said.replace('_', ' ')}"
            )
        if wins.rows:
            display.line(f"  {wins_words(wins.to_json(), f'answers of {names[1]}', f'those of {names[0]}')}", "bold")
    for name, path in (("to train on", votes.path), ("undecided", votes.undecided)):
        if path.exists():
            display.fact(name, str(path))
    return {
        "a": names[0],
        "b": names[1],
        "cast": len(cast),
        "wins": wins.to_json() if wins.rows else None,
        "votes": str(votes.path),
        "undecided": str(votes.undecided),
    }


def _typed(ask: Callable[[str], str | None]) -> Iterator[list[Message]]:
    """Yield prompts as they are typed, until an empty line."""
    while text := (ask("\nprompt (an empty line ends) > ") or "").strip():
        yield [Message("user", text)]


def _asker(display: Display, live: bool) -> Callable[[str], str | None]:
    def ask(question: str) -> str | None:
        if live:
            with contextlib.suppress(EOFError):
                return input(question)
            return None
        display.stream(question)
        line = sys.stdin.readline()
        display.stream(line if line.endswith("\n") else f"{line}\n")
        return line or None

    return ask
