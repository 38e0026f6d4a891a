"""Several runs on one question: settings swept over, each trial as a run of its own, and what they come to together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import headstart
from headstart import job
from headstart.display import Display
from headstart.evaluate.robust import write_variants
from headstart.files import read_json
from headstart.run import RunFolder
from headstart.tune import tune
from headstart.verify import differences
from tests.conftest import killed_at
from tests.e2e.test_commands import as_json, call
from tests.e2e.test_labels import labels  # noqa: F401 (a fixture)
from tests.e2e.test_tiny_run import quiet  # noqa: F401 (a fixture)

SMALL = ["-m", "minilm", "-s", "batch_size=8", "-s", "data.held_out=20", "-s", "steps=12"]
SWEEP = ["sweep", "labels.csv", *SMALL, "--over", "optim.lr=1e-6,5e-3,1e-4"]


def test_a_sweep_that_is_killed_goes_on_and_proves_the_winner_alone(
    labels: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with killed_at(7):  # the third step of the second trial
        assert call(*SWEEP, "-o", "runs/sweep").exit_code == 130
    assert list(read_json(Path("runs/sweep/study.json"))["outcomes"]) == ["rung-1/01"]
    begun = Path("runs/sweep/rung-1/01/metrics.jsonl").stat().st_mtime_ns
    written: list[Any] = []
    monkeypatch.setattr(job, "write_variants", lambda *a, **k: written.append(a) or write_variants(*a, **k))
    code, found = as_json(*SWEEP, "-o", "runs/sweep")
    assert code == 0
    assert (
        len(written) == 2
    )  # for the plan of a full run, and where the winner is proven: no trial writes rows otherwise
    assert Path("runs/sweep/rung-1/01/metrics.jsonl").stat().st_mtime_ns == begun  # what ended isn't run again
    first, last = (rung["trials"] for rung in found["rungs"])
    assert [trial["settings"]["optim.lr"] for trial in first] == ["1e-6", "5e-3", "1e-4"]
    assert [trial["settings"]["steps"] for trial in first] == [4, 4, 4]
    number, best = min(enumerate(first, 1), key=lambda item: item[1]["loss"])
    rate = best["settings"]["optim.lr"]
    assert [trial["settings"] for trial in last] == [{"optim.lr": rate, "steps": 12}]
    # No other trial scored a row of the proof.
    scored = [path.parts[-4:-2] for path in Path("runs/sweep").rglob("evaluation/*.json")]
    assert scored == [("rung-2", f"{number:02d}")] * 2
    # The winner is the run that it would have been alone.
    assert call("tune", "labels.csv", *SMALL, "-s", f"optim.lr={rate}", "-o", "runs/alone").exit_code == 0
    assert differences(Path("runs/alone"), Path(found["winner"]["run"])) == []
    assert found["winner"]["result"]["verdict"] == headstart.Run(Path("runs/alone")).result["verdict"]
    page = Path(found["page"]).read_text(encoding="utf-8")
    assert f'href="rung-2/{number:02d}/report.html"' in page
    assert "http" not in page.replace("http://www.w3.org", "")
    # Another question has no place there.
    refused = call(*SWEEP, "--trials", "2", "-o", "runs/sweep")
    assert (refused.exit_code, "another `trials`" in refused.output) == (1, True)


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ("seed=0,1", "luck isn't chosen"),
        ("steps=4,8", "as many rows"),
        ("data.held_out=8,9", "other rows would be held out"),
        ("eval.every=1,2", "scored alike"),
        ("preference.beta=1,2", "another scale"),
        ("batch_size=4,8", "other amounts of training"),
        ("optim.lr=0.1,fast", "can't be 'fast'"),
        ("lora.rang=8", "did you mean `lora.rank`"),
    ],
)
def test_what_would_compare_nothing_is_refused_before_anything_runs(
    labels: Path,  # noqa: F811
    over: str,
    said: str,
) -> None:
    result = call("sweep", "labels.csv", *SMALL, "--over", over, "-o", "runs/no")
    assert result.exit_code == 2
    assert said in result.output
    assert not Path("runs/no").exists()


def test_a_run_beside_random_weights_says_what_the_head_start_saved(labels: Path) -> None:  # noqa: F811
    quick = [*SMALL, "-s", "optim.lr=5e-3", "-s", "eval.every=3"]
    assert call("tune", "labels.csv", *quick, "-s", "lora.rank=8", "--method", "lora", "-o", "runs/one").exit_code == 0
    before = read_json(Path("runs/one/result.json"))
    code, found = as_json("compare", "--from-scratch", "runs/one", "--price", "3600", "--reach", "-1")
    assert code == 0
    random = headstart.Run(Path(found["random"]["run"])).result
    assert (random["weights"], random["method"], random["guard"]) == ("random", "full", "not measured")
    # As much, on the same rows, in the same order.
    assert found["random"]["tokens"] == found["tuned"]["tokens"] == before["tokens"]["rows"]
    data = [read_json(path / "data.json") for path in (Path("runs/one"), Path(found["random"]["run"]))]
    assert data[0]["rows"] == data[1]["rows"]
    best, own, never = found["reached"]
    assert best["random"]["loss"] == best["loss"] == found["random"]["loss"]
    assert best["random"]["tokens"] == next(p for p in found["random"]["points"] if p["loss"] <= best["loss"])["tokens"]
    assert own["tuned"]["loss"] == found["tuned"]["loss"]
    assert (never["tuned"], never["random"]) == (None, None)
    # A price of 3,600 an hour is one a second.
    assert found["costs"]["random"]["cost"] == pytest.approx(found["costs"]["random"]["train_s"])
    # The run's own report tells it, and what was measured before stays.
    after = read_json(Path("runs/one/result.json"))
    assert {key: after[key] for key in before if key != "reasons"} == {
        k: v for k, v in before.items() if k != "reasons"
    }
    reason = after["reasons"]["time_and_money"]
    assert "from random weights the same network came to loss" in reason["says"]
    assert reason["says"] in Path("runs/one/report.html").read_text(encoding="utf-8").replace("&#x27;", "'")
    assert "not reached" in Path(found["page"]).read_text(encoding="utf-8")


def test_a_learning_curve_scores_few_rows_on_the_same_held_out_ones(labels: Path) -> None:  # noqa: F811
    quick = ["-m", "minilm", "-s", "batch_size=4", "-s", "data.held_out=20", "--epochs", "2", "-s", "optim.lr=5e-3"]
    code, found = as_json("curve", "labels.csv", *quick, "--rows", "8", "--from-scratch", "-o", "runs/curve")
    assert code == 0
    assert (found["rows"], found["metric"], found["lower_is_better"]) == ([8], "accuracy", False)
    runs = [Path(found[way][0]["run"]) for way in ("tuned", "random")]
    assert [read_json(run / "data.json")["rows"]["train"] for run in runs] == [8, 8]
    assert [RunFolder(run).read_config().settings.weights for run in runs] == ["pretrained", "random"]
    proofs = [[row["where"] for row in read_json(run / "evaluation" / "after.json")] for run in runs]
    assert proofs[0] == proofs[1]
    assert headstart.Run(runs[0]).result["reasons"]["shared_knowledge"]["measured"]
    assert Path(found["page"]).read_text(encoding="utf-8").count("<circle") == 2
    refused = call("curve", "labels.csv", *quick, "--rows", "8,999", "-o", "runs/no")
    assert (refused.exit_code, "there are 60 to train on" in refused.output) == (2, True)


def test_seeds_differ_in_luck_alone(labels: Path) -> None:  # noqa: F811
    code, found = as_json("tune", "labels.csv", *SMALL, "-s", "optim.lr=1e-3", "--seeds", "2", "-o", "runs/seeds")
    assert code == 0
    runs = [headstart.Run(Path(outcome["run"])) for outcome in found["seeds"]]
    configs = [RunFolder(run.path).read_config().settings.model_dump(exclude={"out"}) for run in runs]
    assert [config.pop("seed") for config in configs] == [0, 1]
    assert configs[0] == configs[1]
    values = [run.result["difference"]["value"] for run in runs]
    assert found["spread"]["mean"] == pytest.approx(sum(values) / 2)
    assert "seeds" in runs[0].result["reasons"]["custom_fit"]["says"]
    assert call("tune", "labels.csv", *SMALL, "--seeds", "1").exit_code == 2


def test_a_rate_that_was_chosen_gives_the_run_that_it_would_be_alone(
    small_data: Path,
    tiny_model: Path,
    tmp_path: Path,
    quiet: Display,  # noqa: F811
) -> None:
    """The probe leaves nothing behind: weights, moments, generators and the order of rows are as if it had never been."""
    settings = {"batch_size": 4, "steps": 130, "eval.generate": 0, "eval.every": 65, "data.held_out": 16}
    settings |= {"engine.threads": 1, "lora.dropout": 0.1, "eval.guard": "off"}
    tuned = {"model": str(tiny_model), "method": "lora", "display": quiet}
    chosen = tune(small_data, out=tmp_path / "auto", settings={**settings, "optim.lr": "auto"}, **tuned)
    config = RunFolder(chosen.path).read_config()
    assert "3 rates tried for 4 steps each" in config.source("optim.lr")
    given = tune(
        small_data, out=tmp_path / "given", settings={**settings, "optim.lr": config.settings.optim.lr}, **tuned
    )
    assert differences(chosen.path, given.path) == []
