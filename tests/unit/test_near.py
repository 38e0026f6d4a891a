"""Near duplicates and near leaks: what is found is what comparing every pair on sets of words finds."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from headstart.data.near import (
    KEPT,
    THRESHOLD,
    Distinct,
    find_alike,
    find_leaks,
    find_near_leaks,
    jaccard,
    once_each,
    shingle,
)


def sets(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[n : n + 3]) for n in range(len(words) - 2)} or {tuple(words)}


def agree(first: str, second: str) -> float:
    return len(sets(first) & sets(second)) / len(sets(first) | sets(second))


def some_text(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(3000)}" for _ in range(count))


def changed(rng: random.Random, text: str, count: int) -> str:
    words = text.split()
    for place in rng.sample(range(len(words)), count):
        words[place] = f"w{rng.randrange(3000)}"
    return " ".join(words)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Return texts of 1 to 80 words, two thirds of them others with up to four words changed."""
    rng = random.Random(0)
    own = [some_text(rng, rng.randint(1, 80)) for _ in range(100)]
    return own + [changed(rng, text, min(len(text.split()), rng.randrange(5))) for text in own * 2]


def test_the_similarity_is_that_of_the_sets(texts: list[str]) -> None:
    pairs = np.array([(a, b) for a in range(0, 300, 7) for b in range(300)])
    found = jaccard(shingle(texts).finish(), pairs[:, 0], pairs[:, 1])
    assert found.tolist() == pytest.approx([agree(texts[a], texts[b]) for a, b in pairs.tolist()])


def test_near_duplicates_are_those_that_all_pairs_give(texts: list[str]) -> None:
    found = find_alike(shingle(texts).finish())
    for row, text in enumerate(texts):
        like = [other for other in range(row) if agree(texts[other], text) >= THRESHOLD]
        assert found.other[row] in (like or [-1])
        assert found.share[row] == pytest.approx(agree(texts[found.other[row]], text) if like else 0)
    assert 30 < (found.other >= 0).sum() < 170  # else the test tests nothing


def test_leaks_are_those_that_all_pairs_give_and_of_several_the_nearest(texts: list[str]) -> None:
    held = np.arange(len(texts)) % 7 < 3
    found = find_leaks(shingle(texts).finish(), held)
    for row, text in enumerate(texts):
        shares = {other: agree(texts[other], text) for other in np.flatnonzero(held).tolist()}
        best = max(shares, key=lambda other: (shares[other], -other))
        leaks = not held[row] and shares[best] >= THRESHOLD
        assert found.other[row] == (best if leaks else -1)
    assert (found.other >= 0).any()


def test_of_long_texts_the_similarity_is_near_the_true_one() -> None:
    rng = random.Random(1)
    text = some_text(rng, 8 * KEPT)
    other = changed(rng, text, 60)
    found = jaccard(shingle([text, other]).finish(), np.array([0]), np.array([1]))[0]
    true = agree(text, other)
    assert abs(found - true) < 4 * (true * (1 - true) / KEPT) ** 0.5  # four standard errors of a sample of KEPT


def test_what_a_prompt_always_says_makes_no_rows_alike() -> None:
    rng = random.Random(2)
    fixed = some_text(rng, 90)
    rows = [f"{fixed} {some_text(rng, 8)}" for _ in range(40)]
    assert agree(rows[0], rows[1]) > THRESHOLD
    assert (find_alike(shingle(rows).finish()).other == -1).all()
    copy = [*rows, changed(rng, rows[5], 0) + " end"]
    assert find_alike(shingle(copy).finish()).other[40] == 5
    assert (find_alike(shingle([fixed] * 40).finish()).other[1:] >= 0).all()  # rows that say nothing else


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        ("Is it so? Yes, it is!", "is it so yes it is", True),
        ("what is 3 + 4", "what is 3 - 4", False),
        ("???", "!!!", False),
        ("患者喉咙痛三天建议多喝水", "患者喉咙痛三天建议多喝水", True),
        ("患者喉咙痛三天建议多喝水注意休息", "患者喉咙痛三天建议多喝水注意休息。", True),
        ("患者喉咙痛三天建议多喝水", "医生写了一份很短的报告", False),
    ],
)
def test_case_and_commas_say_nothing_signs_do_and_no_spaces_are_needed(first: str, second: str, alike: bool) -> None:
    assert (find_alike(shingle([first, second]).finish()).other[1] == 0) == alike


def test_near_leaks_of_rows_that_stand_twice() -> None:
    rng = random.Random(3)
    text = some_text(rng, 40)
    near = re.sub(r"\S+$", "end", text)
    rows = [near, text, some_text(rng, 40), near, text]
    distinct = Distinct.of(np.array([7, 8, 9, 7, 8], np.uint64))
    assert distinct.rows.tolist() == [0, 1, 2]
    found = find_near_leaks(shingle(rows).finish(distinct.rows), distinct, np.array([False, False, False, False, True]))
    # Row 1 is the held-out row itself, which is another thing than a near one.
    assert found.other.tolist() == [4, -1, -1, 4, -1]


@pytest.mark.parametrize("values", [[], [7], [7, 7], [2**64 - 1, 0, 5, 5, 2**63, 0]])
def test_each_number_comes_once_ascending(values: list[int]) -> None:
    given = np.array(values, np.uint64)
    assert once_each(given).tolist() == sorted(set(values))
    assert given.tolist() == values
