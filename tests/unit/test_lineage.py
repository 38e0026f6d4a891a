"""What a run that goes on from another keeps: verdicts on old rows, classes of a head, texts that were learned, the tree of runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from headstart.config import DataSettings
from headstart.data.feed import Keys
from headstart.data.labels import Labels
from headstart.data.mixing import read_mix
from headstart.data.overlap import find_learned
from headstart.data.prepare import split
from headstart.data.replay import Known, Old
from headstart.errors import DataError, UsageError
from headstart.evaluate.measure import Measured, RowResult
from headstart.evaluate.old import compare_old, old_result
from headstart.files import sha256
from headstart.models.load import head_of, load_model
from headstart.models.source import find_model
from headstart.report.result import _decide
from headstart.show import grow_tree, list_runs
from tests.conftest import conversation


def old_rows(losses: list[float]) -> Measured:
    return Measured([RowResult(f"old:{n}", loss, 1.0, part="run") for n, loss in enumerate(losses)], "chat")


def verdict(fell: float, gained: float, rows: int = 40, spread: float = 0.001) -> str:
    """Return the verdict where the loss of each row rose by `fell`, and the run had lowered it by `gained`."""
    wobble = np.linspace(-spread, spread, rows)
    before, after = old_rows([0.5] * rows), old_rows((0.5 + fell + wobble).tolist())
    found = old_result(compare_old(before, after, {"run": {"nll": -gained}}))
    assert found["parts"]["run"]["bound"] == pytest.approx(0.05 * max(0.0, gained))
    return str(found["verdict"])


def test_old_rows_are_lost_where_more_than_a_twentieth_of_what_was_gained_surely_goes() -> None:
    assert verdict(0.06, 1.0) == "lost"  # the bound is 0.05
    assert verdict(0.04, 1.0) == "kept"
    assert verdict(0.05, 1.0, spread=0.1) == "unclear"
    assert verdict(0.04, 0.5) == "lost"
    assert verdict(-0.1, 0.0) == "kept"
    assert verdict(0.01, 0.0) == "lost"  # a run that gained nothing leaves nothing to be lost
    assert verdict(0.01, -1.0) == "lost"
    assert verdict(0.06, 1.0, rows=7) == "too few rows"


def test_better_needs_old_rows_that_were_measured_and_did_not_fall() -> None:
    def decide(decided: str, old: str | None) -> str:
        return _decide(decided, None, old if old in (None, "not measured") else {"verdict": old})  # type: ignore[arg-type]

    assert [decide("better", old) for old in (None, "kept", "unclear")] == ["better"] * 3
    assert [decide("better", old) for old in ("not measured", "too few rows")] == ["not_measured"] * 2
    assert [decide(new, "lost") for new in ("better", "no_gain", "worse")] == ["worse"] * 3
    assert decide("not_measured", "lost") == "not_measured"
    assert _decide("better", {"verdict": "lost"}, {"verdict": "kept"}) == "worse"


def test_what_was_held_out_or_learned_before_is_on_its_side_of_a_new_split() -> None:
    rows = [conversation(f"question {n}", f"answer {n}", line=n) for n in range(40)]
    known = Known([Old("run", train=rows[:10], watch=rows[10:12], proof=rows[12:16])], 0.5)
    found = split(Keys.of(rows), None, DataSettings(held_out=0.5), known, watch=False)
    held = {*found.watch.tolist(), *found.proof.tolist()}
    assert not held & set(range(16))
    assert not set(found.train.tolist()) & set(range(10, 16))
    assert set(range(10)) <= set(found.train.tolist())
    assert (found.held_before, found.trained_before) == (6, 10)
    named = split(Keys.of(rows[20:]), Keys.of(rows[:20]), DataSettings(), known, watch=False)
    assert {*named.watch.tolist(), *named.proof.tolist()} == set(range(16, 20))
    with pytest.raises(DataError, match="learned or held out before"):
        split(Keys.of(rows[:16]), None, DataSettings(), known, watch=False)
    # Replayed: half as many as there are new ones, none that is held out, of equal rows one, whichever run they are of.
    both = Known([Old("b", rows[:6], [], rows[20:24]), Old("a", rows[4:10], rows[9:10], [])], 0.5)
    again = both.replayed(8, (rows[:1], rows[1:2]), seed=3)
    lines = [row.where.line for part in again for row in part]
    assert len(lines) == len(set(lines)) == 4
    assert set(lines) <= set(range(2, 9))
    assert sum(map(len, both.replayed(100, [], seed=3))) == 9  # there are no more


def test_a_head_for_more_classes_keeps_what_it_knew(tiny_encoder: Path, tmp_path: Path) -> None:
    old = Labels("classification", ("cat", "dog"))
    first = load_model(find_model(str(tiny_encoder)), "cpu", task="classification", labels=old).model
    torch.nn.init.normal_(first.classifier.weight)
    torch.nn.init.normal_(first.classifier.bias)
    first.save_pretrained(tmp_path / "old")
    for names in (("ant", "cat", "dog"), ("dog", "owl"), ("cat", "dog")):
        new = load_model(
            find_model(str(tmp_path / "old")), "cpu", task="classification", labels=Labels("classification", names)
        ).model
        for number, name in enumerate(names):
            for part in ("weight", "bias") if name in old.names else ():
                own, was = getattr(new.classifier, part)[number], getattr(first.classifier, part)
                assert torch.equal(own, was[old.names.index(name)]), (names, name)


def test_a_head_of_numbers_gives_the_same_in_another_scale(tiny_encoder: Path, tmp_path: Path) -> None:
    was = Labels("regression", ("price",), mean=(3.0,), spread=(2.0,))
    now = Labels("regression", ("price",), mean=(10.0,), spread=(4.0,))
    first = load_model(find_model(str(tiny_encoder)), "cpu", task="regression", labels=was).model
    torch.nn.init.normal_(first.classifier.bias)
    first.save_pretrained(tmp_path / "old")
    second = load_model(find_model(str(tmp_path / "old")), "cpu", task="regression", labels=now).model
    assert head_of(second) is second.classifier
    ids = torch.tensor([[2, 7, 8, 3]])
    with torch.no_grad():
        one, two = first(ids).logits * 2.0 + 3.0, second(ids).logits * 4.0 + 10.0
    torch.testing.assert_close(one, two)


def test_texts_that_stand_in_what_is_learned_are_found() -> None:
    fox = "The quick brown fox jumps over the lazy dog near the old mill."
    texts = [fox, "A short one.", "Water boils at a hundred degrees Celsius by the sea, and sooner up a mountain."]
    assert find_learned(texts, ["He said: 'the quick brown fox jumps over the lazy dog, near the old mill!' Then"]) == {
        0
    }
    assert find_learned(texts, ["it was a SHORT one"]) == {1}
    # 7 of its 8 runs of eight words are there, then 4 of 8; seven tenths are needed.
    words = texts[2].split()
    assert find_learned(texts, [" ".join(words[:14])]) == {2}
    assert find_learned(texts, [" ".join(words[:11]), "short"]) == set()


def test_runs_stand_below_those_that_they_go_on_from(tmp_path: Path) -> None:
    for name, parent in (("a", None), ("b", "a"), ("c", "b"), ("d", "gone")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text("")
        lineage = parent and {"run": str(tmp_path / parent), "result_sha256": f"{parent}'s"}
        (folder / "data.json").write_text(json.dumps({"date": "2026-01-02", "lineage": lineage}))
    (tmp_path / "a").rename(tmp_path / "moved")
    result = {"verdict": "better", "difference": {"metric": "nll", "value": -1.0}}
    (tmp_path / "moved" / "result.json").write_text(json.dumps(result))
    known = {"run": str(tmp_path / "a"), "result_sha256": sha256(tmp_path / "moved" / "result.json")}
    (tmp_path / "b" / "data.json").write_text(json.dumps({"date": "2026-01-02", "lineage": known}))
    found = list_runs(tmp_path)
    tree = {Path(node["run"]).name: node for node in grow_tree(found)}
    assert set(tree) == {"moved", "d"}
    (b,) = tree["moved"]["children"]
    assert [Path(node["run"]).name for node in b["children"]] == ["c"]
    assert tree["moved"]["verdict"] == "better"
    assert b["date"] == "2026-01-02"
    assert tree["d"]["parent"] == str(tmp_path / "gone")


def test_a_run_can_be_mixed_in_without_a_weight_and_a_file_cannot(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    assert read_mix([f"{tmp_path}=0"])[0].weight == 0
    with pytest.raises(UsageError, match="no path with a weight"):
        read_mix(["rows.jsonl=0"])
