"""Order and split: exact batches, every row once an epoch, a cursor, a split that doesn't move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from headstart.config import DataSettings
from headstart.data.feed import Feed, choose_held_out, content_hash, split_rows, split_watch
from headstart.data.formats import Detection, Formatted
from headstart.data.prepare import Formed, first_rows, split_parts
from headstart.data.records import Conversation
from headstart.errors import DataError, UsageError
from tests.conftest import conversation


def drain(feed: Feed) -> list[list[int]]:
    steps = []
    while rows := feed.next_rows():
        steps.append(rows)
    return steps


@pytest.mark.parametrize(("rows", "batch", "total"), [(10, 3, 20), (10, 4, 25), (7, 7, 14), (5, 2, 3)])
def test_every_step_but_the_last_is_full_and_epochs_are_whole(rows: int, batch: int, total: int) -> None:
    feed = Feed(rows, batch, total, seed=1)
    steps = drain(feed)
    assert len(steps) == feed.steps
    assert all(len(step) == batch for step in steps[:-1])
    order = [row for step in steps for row in step]
    assert len(order) == total
    for start in range(0, total - rows + 1, rows):
        assert sorted(order[start : start + rows]) == list(range(rows))
    assert max(Counter(order).values()) - min(Counter(order).values()) <= 1


def test_the_order_is_that_of_the_seed_and_goes_on_from_the_cursor() -> None:
    whole = drain(Feed(10, 3, 30, seed=1))
    assert drain(Feed(10, 3, 30, seed=1)) == whole
    assert drain(Feed(10, 3, 30, seed=2)) != whole
    assert drain(Feed(10, 3, 30, seed=1, seen=12)) == whole[4:]


def test_a_row_keeps_its_side_when_rows_are_added() -> None:
    few = [conversation(f"q{n}", f"a{n}") for n in range(300)]
    many = few + [conversation(f"q{n}", f"a{n}") for n in range(300, 900)]
    held_few = {content_hash(c) for c in split_rows(few, 0.1)[1]}
    held_many = {content_hash(c) for c in split_rows(many, 0.1)[1]}
    assert held_few == held_many & {content_hash(c) for c in few}
    assert 60 < len(held_many) < 120


def test_equal_rows_and_groups_are_never_on_both_sides() -> None:
    rows = [conversation(f"q{n % 30}", "a", line=n) for n in range(90)]
    train, held = split_rows(rows, 0.3)
    assert not {content_hash(c) for c in train} & {content_hash(c) for c in held}
    grouped = [conversation(f"q{n}", "a", line=n, group=f"g{n % 12}") for n in range(90)]
    train, held = split_rows(grouped, 0.3)
    assert not {c.group for c in train} & {c.group for c in held}


def formed(rows: Sequence[Conversation]) -> Formed:
    detection = Detection("messages", len(rows), len(rows), "certain", "`messages`", "chat")
    return Formed([], len(rows), Formatted(detection, list(rows)))


def test_rows_of_a_group_stay_together_when_rows_are_added_and_equal_rows_of_two_groups_do_not_leak() -> None:
    few = [conversation(f"q{n % 70}", "a", line=n, group=f"g{n % 40}") for n in range(300)]
    many = few + [conversation(f"r{n % 70}", "a", line=n, group=f"g{n % 60}") for n in range(300, 900)]
    settings = DataSettings(held_out=0.2, group_by="group")
    small, large = (split_parts(formed(rows), None, settings, watch=False) for rows in (few, many))
    assert {c.group for c in small.proof} == {c.group for c in large.proof} & {c.group for c in few}
    for parts, rows in ((small, few), (large, many)):
        held = {content_hash(c) for c in parts.proof}
        assert not {c.group for c in parts.train} & {c.group for c in parts.proof}
        assert not {content_hash(c) for c in parts.train} & held
        assert parts.leaked == len(rows) - len(parts.train) - len(parts.proof) > 0


def test_rows_that_say_nearly_what_is_held_out_are_not_trained_on_where_that_is_asked() -> None:
    asked = "one two three four five six seven eight nine ten eleven twelve"
    rows = [conversation(f"{n} is no like {n * n} and {n + 7}", f"{n}", line=n) for n in range(60)]
    rows += [conversation(f"{n} {asked}", "a b c d e f g h", line=60 + n) for n in range(2)]
    held = [conversation(f"2 {asked}", "a b c d e f g h", line=1)]
    parts = split_parts(formed(rows), formed(held), DataSettings(leaks="near"), watch=False)
    assert [(leak.where.line, leak.like.line) for leak in parts.near] == [(60, 1), (61, 1)]
    assert parts.near[0].share == 0.9  # 21 words are 19 shingles; one of them differs: 18 of 20
    assert [c.where.line for c in parts.train] == list(range(60))
    plain = split_parts(formed(rows), formed(held), DataSettings(leaks="exact"), watch=False)
    few = split_parts(formed(rows), formed(held), DataSettings(leaks="auto"), watch=False)
    assert few == parts
    all_alike = split_parts(formed(rows[60:61] * 2), formed(held), DataSettings(leaks="auto"), watch=False)
    assert (len(all_alike.train), all_alike.near, all_alike.alike) == (2, (), 2)
    assert (len(plain.train), plain.near) == (62, ())
    with pytest.raises(DataError, match="all 1 rows to train on say nearly") as caught:
        split_parts(formed(rows[60:61]), formed(held), DataSettings(leaks="near"), watch=False)
    assert "data.leaks=exact" in caught.value.problems[0].cure


@pytest.mark.parametrize(("count", "held_out", "expected"), [(20, 0.01, 5), (20, 3, 3), (6, 0.1, 3)])
def test_small_data_still_has_rows_on_both_sides(count: int, held_out: float, expected: int) -> None:
    train, held = split_rows([conversation(f"q{n}", "a") for n in range(count)], held_out)
    assert len(held) == expected
    assert len(train) == count - expected


@pytest.mark.parametrize(("count", "held_out"), [(1, 0.2), (5, 5)])
def test_too_few_rows_are_refused(count: int, held_out: float) -> None:
    with pytest.raises(DataError, match="would be held out"):
        split_rows([conversation(f"q{n}", "a") for n in range(count)], held_out)


def test_rows_that_are_watched_leave_more_for_the_proof() -> None:
    assert [split_watch(n) for n in (5, 15, 16, 100, 10_000)] == [0, 0, 8, 25, 64]
    assert [choose_held_out(n) for n in (100, 1_000, 5_000, 50_000)] == [0.2, 0.1, 0.05, 0.02]


def test_fewer_rows_to_train_on_are_part_of_more_and_hold_out_the_same() -> None:
    digests = np.random.default_rng(0).integers(0, 2**63, 50).astype(np.uint64)
    train = np.arange(10, 50)
    some = [first_rows(train, digests, rows).tolist() for rows in (5, 12, 40)]
    assert [len(rows) for rows in some] == [5, 12, 40]
    assert set(some[0]) < set(some[1]) < set(some[2]) == set(train.tolist())
    assert max(digests[some[0]]) < min(digests[sorted(set(some[2]) - set(some[0]))])
    assert all(rows == sorted(rows) for rows in some)
    with pytest.raises(UsageError, match="there are 40 rows to train on"):
        first_rows(train, digests, 41)
