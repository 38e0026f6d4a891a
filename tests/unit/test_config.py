"""Settings: every value has a source, nothing is ignored, a resolved file reads back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from headstart.cli import read_sets
from headstart.config import DataSettings, Override, Settings, build_config, known_keys, read_resolved, setting
from headstart.errors import UsageError
from headstart.verbs import READING


def flags(**values: object) -> list[Override]:
    return [Override(key.replace("__", "."), value, f"flag {key}") for key, value in values.items()]


def test_the_page_has_under_sixty_knobs_beside_those_of_preferences_each_described() -> None:
    keys = known_keys()
    preferences = [key for key in keys if key.startswith("preference.") or key == "data.rejected"]
    assert len(preferences) < 6
    assert len(keys) - len(preferences) < 60
    assert all(keys.values())


def test_a_flag_beats_a_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\noptim:\n  lr: 1e-4\n  clip: 0.5\n", encoding="utf-8")
    config = build_config(file, flags(optim__lr="2e-4"))
    assert (config.settings.optim.lr, config.settings.optim.clip, config.settings.seed) == (2e-4, 0.5, 3)
    sources = [config.source(key) for key in ("optim.lr", "optim.clip", "seed", "method")]
    assert sources == ["flag optim__lr", "mine.yaml", "mine.yaml", "default"]


def test_a_decision_is_recorded_with_its_reason_and_reads_back(tmp_path: Path) -> None:
    config = build_config(None, flags(data__train="a.jsonl,b.jsonl", data__prompt="{a}: {b} # c")).decide(
        {"optim.lr": (3e-4, "for lora"), "batch_size": (4, "for 10 rows")}
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.render(), encoding="utf-8")
    back = read_resolved(path)
    assert back.settings == config.settings
    assert back.source("optim.lr") == "auto: for lora"
    assert back.given("data.train")
    assert not back.given("optim.lr")
    assert back.render() == config.render()
    assert back.settings.data.train == ("a.jsonl", "b.jsonl")


@pytest.mark.parametrize("text", ["Sum up:\n{a}", "a\n\nb: {a}  # c\n", 'it\'s "{a}"\n\u2028\U0001f600'])
def test_a_text_of_several_lines_keeps_its_source(tmp_path: Path, text: str) -> None:
    config = build_config(None, flags(data__prompt=text, data__completion="{b}", data__train=["x\ny.jsonl"]))
    path = tmp_path / "config.yaml"
    path.write_text(config.render(), encoding="utf-8")
    back = read_resolved(path)
    assert back == config
    assert all(back.given(f"data.{name}") for name in ("prompt", "completion", "train"))


def test_a_file_whose_name_begins_like_a_decision_is_still_a_source(tmp_path: Path) -> None:
    file = tmp_path / "auto-run.yaml"
    file.write_text("engine:\n  checkpointing: off\n", encoding="utf-8")
    config = build_config(file)
    assert config.given("engine.checkpointing")
    assert config.settings.engine.checkpointing == "off"  # and not what YAML makes of it


@pytest.mark.parametrize(
    ("key", "value", "code", "said"),
    [
        ("optim.lrr", 1, "config.unknown_key", "`optim.lr`"),
        ("learning_rate", 1, "config.unknown_key", "lists every setting"),
        ("rank", 8, "config.unknown_key", "`lora.rank`"),
        ("optim.lr", -1, "config.bad_value", "greater than 0"),
        ("optim.lr", "fast", "config.bad_value", "number"),
        ("optim.lr", float("nan"), "config.bad_value", "finite"),
        ("method", "qlora", "config.bad_value", "'lora' or 'full'"),
        ("batch_size", 0, "config.bad_value", "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(key: str, value: object, code: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        build_config(None, [Override(key, value, "-s")])
    (problem,) = error.value.problems
    assert problem.code == code
    assert said in str(problem)
    assert problem.where == "-s"


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(UsageError) as error:
        build_config(None, flags(optim__lr=-1, batch_size=0, sed=1))
    assert len(error.value.problems) == 3


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 2, "steps": 10},
        {"data__eval": "x.jsonl", "data__held_out": 0.1},
        {"data__eval": "x.jsonl", "data__group_by": "id"},
        {"method": "full", "lora__rank": 8},
        {"eval__every": 0, "eval__patience": 2},
    ],
)
def test_a_setting_without_effect_is_an_error(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="no effect"):
        build_config(None, flags(**values))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", "stands twice"),
        ("- a\n", "key: value"),
        ("a: [\n", "can't be read"),
        ("data:\n  prompt: {{dialogue}}\n", "in quotes"),
        ("out: 2024-13-45\n", "can't be read"),
        ("a: !!python/name:os.system ''\n", "can't be read"),
        ("a: !!python/object/apply:os.system [id]\n", "can't be read"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "alias"),
        ("a: " + "[" * 5_000 + "\n", "can't be read"),
        ("seed: " + "9" * 5_000 + "\n", "can't be read"),
        ("seed: 1\0\n", "can't be read"),
    ],
)
def test_a_config_file_that_cannot_be_read_as_written(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        build_config(file)


def test_every_key_is_read_somewhere() -> None:
    source = "\n".join(p.read_text() for p in Path("headstart").rglob("*.py") if p.name != "config.py")
    unread = [key for key in known_keys() if key.rpartition(".")[2] not in source]
    assert not unread


def test_dotted_keys_reach_their_values() -> None:
    assert setting(Settings(), "lora.rank") == 16
    assert setting(Settings(), "seed") == 0


def test_how_a_run_reads_rows_is_how_its_model_is_scored() -> None:
    """A new setting of data has to be one or the other: `eval`, `compare` and `predict` take over `READING` from a run."""
    of_training = {"train", "eval", "mix", "rows", "held_out", "group_by", "leaks", "class_weights"}
    assert of_training.isdisjoint(READING)
    assert of_training | set(READING) == set(DataSettings.model_fields)


def test_a_line_break_in_a_template_may_be_typed() -> None:
    for name in ("prompt", "completion", "rejected", "text", "text_pair"):
        assert read_sets([f"data.{name}={{a}}\\n{{b}}"]) == {f"data.{name}": "{a}\n{b}"}
