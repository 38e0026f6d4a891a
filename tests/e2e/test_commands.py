"""The command line as a user meets it: every verb, as text and as JSON, its exit codes, and the README's own commands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from headstart.chat import Chat
from headstart.cli import app

ROOT = Path(__file__).parents[2]
QUICK = ["-s", "steps=4", "-s", "eval.generate=1", "-s", "eval.every=2"]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def as_json(*arguments: str) -> tuple[int, Any]:
    result = call(*arguments, "--json")
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture
def data(tiny_home: Path, small_data: Path) -> Path:
    """Return the small data as `data.jsonl` in the working folder."""
    path = tiny_home / "data.jsonl"
    path.write_bytes(small_data.read_bytes())
    return path


@pytest.fixture
def run(data: Path) -> Path:
    result = call("tune", "data.jsonl", "-o", "runs/one", *QUICK)
    assert result.exit_code == 0, result.output
    return Path("runs/one")


def test_tune_says_what_it_does(data: Path) -> None:
    result = call("tune", "data.jsonl", *QUICK)
    assert result.exit_code == 0
    for said in (
        "messages (certain): 40 of 40 rows",
        "kept for the proof",
        "training 4/4",
        "loss per predicted token",
        "report",
    ):
        assert said in result.stdout
    assert Path("runs/data-smollm2-135m-1/report.html").exists()


def test_tune_as_json_is_one_object(data: Path) -> None:
    code, result = as_json("tune", "data.jsonl", "-o", "runs/json", *QUICK)
    assert code == 0
    assert result["run"] == "runs/json"
    assert result["verdict"] in ("better", "no_gain", "worse", "not_measured")


def test_check_finds_every_bad_row_and_trains_nothing(data: Path) -> None:
    assert call("check", "data.jsonl", "--show", "1").exit_code == 0
    shown = call("check", "data.jsonl", "--show", "1").stdout
    assert re.search(r"<\|im_start\|>assistant\n⟦The [a-z ]+\.<\|im_end\|>⟧", shown)
    data.write_text(data.read_text() + '{"messages": [{"role": "user"}]}\n{\n', encoding="utf-8")
    result = call("check", "data.jsonl")
    assert result.exit_code == 3
    assert "data.jsonl:41:turn[0].content" in result.stdout
    assert "data.jsonl:42" in result.stdout
    assert "to mend:" in result.stdout
    code, found = as_json("check", "data.jsonl")
    assert code == 3
    assert {problem["code"] for problem in found["problems"]} == {"row.field_missing", "row.not_json"}
    assert not Path("runs").exists()


def planted(data: Path) -> list[str]:
    """Add rows that hurt to the data, and return what must not be printed."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    words = "one two three four five six seven eight nine ten eleven twelve"
    secrets = ["jo.doe@example.org", "AKIA" + "IOSFODNN7EXAMPLE"]
    asked = [
        rows[0]["messages"][0]["content"],
        words,
        f"more {words}",
        f"mail {secrets[0]}",
        f"key {secrets[1]}",
        "\u202e",
    ]
    for number, text in enumerate(asked):
        answer = rows[0]["messages"][1]["content"] if number else "Quite another answer."
        rows.append({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]})
    rows.append(rows[0])
    data.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n", encoding="utf-8")
    return secrets


def test_check_names_what_hurts_and_never_prints_a_secret(data: Path) -> None:
    secrets = planted(data)
    said = call("check", "data.jsonl").stdout
    code, found = as_json("check", "data.jsonl")
    assert code == 3
    places = {finding["kind"]: [row["where"] for row in finding["rows"]] for finding in found["quality"]}
    expected = {"contradiction": 41, "near_duplicate": 43, "email": 44, "api_key": 45, "bidi": 46, "duplicate": 47}
    assert {kind: places[kind] for kind in expected} == {k: [f"data.jsonl:{n}"] for k, n in expected.items()}
    for finding in found["quality"]:
        assert f"{len(finding['rows'])} {finding['what']}: {finding['rows'][0]['where']}" in said
    assert not any(secret in said + json.dumps(found) for secret in secrets)
    assert "jo..., 18 characters" in said
    assert len(found["longest"]) == 10
    assert found["longest"][0]["tokens"] == found["length_longest"]


def test_check_mends_a_file_that_passes_then(data: Path) -> None:
    planted(data)
    before = data.read_bytes()
    code, found = as_json("check", "data.jsonl", "--fix", "--near", "--redact", "-o", "clean.jsonl")
    assert code == 0
    done = found["mended"]
    assert (done["rows"], done["bad"], done["duplicates"], done["near_duplicates"]) == (45, 1, 1, 1)
    assert done["redacted"] == {"email": 1, "api_key": 1}
    code, again = as_json("check", "clean.jsonl")
    assert (code, again["problems"], again["duplicates"], again["rows"]) == (0, [], 0, 45)
    assert {finding["kind"] for finding in again["quality"]} == {
        "contradiction",
        "bidi",
    }  # which only a person can mend
    said = call("check", "data.jsonl", "--fix", "-o", "clean.jsonl")
    assert "46 rows: clean.jsonl" in said.stdout
    assert "1 bad, 1 duplicates, 0 near duplicates" in said.stdout
    assert data.read_bytes() == before


@pytest.mark.parametrize("flags", [["--fix"], ["-o", "c.jsonl"], ["--near"], ["--fix", "-o", "data.jsonl"]])
def test_check_writes_nothing_where_it_is_not_clear_what(data: Path, flags: list[str]) -> None:
    before = data.read_bytes()
    result = call("check", "data.jsonl", *flags)
    assert result.exit_code == 2
    assert "-o clean.jsonl" in result.stderr
    assert (data.read_bytes(), list(Path().glob("c*.jsonl"))) == (before, [])


def test_a_run_records_which_rows_it_left_out_for_saying_nearly_what_is_held_out(data: Path) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve"
    row = {"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": "The plan."}]}
    held = {"messages": [{"role": "user", "content": f"so {words}"}, row["messages"][1]]}
    with data.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    Path("held.jsonl").write_text(json.dumps(held) + "\n", encoding="utf-8")
    tune = ["tune", "data.jsonl", "--eval-data", "held.jsonl", *QUICK]
    assert "say nearly what a row to score on says" in call(*tune, "-o", "runs/near").stdout
    record = json.loads(Path("runs/near/data.json").read_text())
    # 14 and 15 words are 12 and 13 shingles, of which the shorter row has 12.
    assert record["dropped"]["nearly_in_both"] == [{"where": "data.jsonl:41", "like": "held.jsonl:1", "share": 0.923}]
    assert record["rows"]["train"] == 40
    assert "leaks: auto" in Path("runs/near/config.yaml").read_text()  # a run that goes on takes the same rows


def test_plan_says_what_a_run_would_take(data: Path) -> None:
    code, plan = as_json("plan", "data.jsonl", *QUICK)
    assert code == 0
    assert {"steps", "row_tokens", "tokens", "memory_bytes", "train_s", "total_s", "disk_bytes"} <= set(plan)
    assert plan["steps"] == 4
    assert not Path("runs").exists()


def test_eval_and_compare(run: Path) -> None:
    code, found = as_json("eval", str(run), "data.jsonl", "--answers", "2")
    assert code == 0
    assert len(found["rows"]) == 40
    assert sum(row["answer"] is not None for row in found["rows"]) == 2
    code, versus = as_json("compare", "smollm2-135m", str(run), "data.jsonl", "--answers", "0")
    assert code == 0
    own = {row["where"]: row["nll"] for row in found["rows"]}
    assert versus["models"][1]["metrics"]["nll"]["value"] == pytest.approx(
        sum(own.values()) / sum(r["targets"] for r in found["rows"])
    )
    gap = versus["models"][1]["metrics"]["nll"]["value"] - versus["models"][0]["metrics"]["nll"]["value"]
    assert versus["pairs"][0]["differences"]["nll"]["value"] == pytest.approx(gap)
    assert "smollm2-135m" in call("compare", "smollm2-135m", str(run), "data.jsonl", "--answers", "0").stdout
    assert re.search(
        r"upper case +[\d.]+ -> ", call("eval", str(run), "data.jsonl", "--answers", "0", "--robust").stdout
    )


def test_chat_asks_once_and_streams(run: Path) -> None:
    code, said = as_json("chat", str(run), "--ask", "plan?", "--max-tokens", "5")
    assert code == 0
    assert said["asked"] == "plan?"
    assert said["answer"] in call("chat", str(run), "--ask", "plan?", "--max-tokens", "5").stdout
    assert call("chat", str(run)).exit_code == 2


def test_chat_and_eval_fold_a_system_turn_as_training_did(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = {"role": "system", "content": "Be short."}
    rows = [json.loads(line)["messages"] for line in data.read_text(encoding="utf-8").splitlines()]
    data.write_text("".join(json.dumps({"messages": [system, *row]}) + "\n" for row in rows), encoding="utf-8")
    assert call("tune", "data.jsonl", "-o", "runs/one", *QUICK, "-s", "data.fix=fold_system").exit_code == 0
    after = {row["where"]: row["nll"] for row in json.loads(Path("runs/one/evaluation/after.json").read_text())}
    again = {row["where"]: row["nll"] for row in as_json("eval", "runs/one", "data.jsonl", "--answers", "0")[1]["rows"]}
    proof = after.keys() & again.keys()
    assert proof
    assert {where: again[where] for where in proof} == pytest.approx({where: after[where] for where in proof}, rel=1e-5)
    chat = Chat("runs/one", system="Be short.", max_tokens=1)
    asked: list[list[int]] = []
    monkeypatch.setattr(chat, "_tokens", lambda prompt: asked.append(prompt) or [])
    chat.answer("3 plan?")
    chat.answer("And 4?")
    turns = [("user", "Be short.\n\n3 plan?"), ("assistant", ""), ("user", "And 4?")]
    tokenizer = AutoTokenizer.from_pretrained("runs/one/model")
    for prompt, count in zip(asked, (1, 3), strict=True):
        messages = [{"role": role, "content": content} for role, content in turns[:count]]
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt == theirs


def test_runs_models_doctor_and_config(run: Path) -> None:
    assert as_json("runs")[1]["runs"][0]["run"] == "runs/one"
    assert "runs/one" in call("runs").stdout
    names = [model["name"] for model in as_json("models")[1]["models"]]
    assert names == ["smollm2-135m", "efficientnet-lite0", "minilm"]
    code, pulled = as_json("models", "pull", "smollm2-135m")
    assert code == 0
    assert set(pulled) == {"name", "path", "sha256", "license"}
    assert (Path(pulled["path"]) / "config.json").exists()
    code, found = as_json("doctor")
    assert code == 0
    assert found["device"] in ("cpu", "cuda", "mps")
    assert "lora.rank" in json.dumps(as_json("config", "render", "-s", "lora.rank=8")[1]["sources"])
    assert "rank: 8  # -s lora.rank" in call("config", "render", "-s", "lora.rank=8").stdout
    assert json.loads(call("config", "schema").stdout)["title"] == "Settings"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["tune", "nowhere.jsonl"], 3, "no such file"),
        (["tune", "data.jsonl", "-s", "optim.learning=1"], 2, "there is no setting"),
        (["tune", "data.jsonl", "-s", "seed"], 2, "-s key=value"),
        (["tune", "data.jsonl", "-m", "nobody"], 1, "no such model"),
        (["tune", "data.jsonl", "--method", "magic"], 2, "'lora' or 'full'"),
        (["resume", "nowhere"], 1, "no run lies there"),
        (["eval", "nobody", "data.jsonl"], 1, "no such model"),
    ],
)
def test_errors_end_with_their_code_and_a_cure(data: Path, arguments: list[str], code: int, said: str) -> None:
    result = call(*arguments)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output
    found, error = as_json(*arguments)
    assert found == code
    assert all(problem["cure"] and problem["why"] for problem in error["problems"])


def test_a_cache_that_cannot_be_written_is_an_error_with_its_place(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("")
    monkeypatch.setenv("HEADSTART_HOME", "file")
    code, error = as_json("check", "data.jsonl")
    assert (code, error["problems"][0]["code"]) == (4, "disk.failed")
    assert error["problems"][0]["where"].startswith("file")


def test_a_model_that_is_the_result_of_a_run_can_be_named_by_its_folder(run: Path) -> None:
    code, result = as_json("eval", "runs/one/model", "data.jsonl", "--answers", "0")
    assert code == 0
    assert result["metrics"]["nll"]["value"] > 0


def test_the_demo_runs_from_the_package_alone(tiny_home: Path) -> None:
    result = call("demo", "-o", "out")
    assert result.exit_code == 0, result.output
    for said in ("before:", "after:", "as the practice writes it:", "headstart chat out"):
        assert said in result.stdout


PAGES = ("README.md", "docs/preferences.md", "docs/evaluation.md", "docs/runs.md")


def examples(language: str) -> list[str]:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_readme_and_its_pages_do_what_they_say(data: Path) -> None:
    Path("data_eval.jsonl").write_text(data.read_text().replace("?", " please?"), encoding="utf-8")
    Path("data_new.jsonl").write_text(data.read_text().replace("?", " now?"), encoding="utf-8")
    visits = "".join(f'note,"{n} sore throat","The plan {n % 3}."\n' for n in range(40))
    Path("visits.csv").write_text(f"kind,note,report\n{visits}", encoding="utf-8")
    pairs = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea."} for n in range(40)]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    answers = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    Path("notes").mkdir()
    for n in range(40):
        Path(f"notes/{n}.txt").write_text(f"The doctor should write a short report. {n}\n", encoding="utf-8")
    Path("requests.csv").write_text(
        "text,label\n" + "".join(f"text {n},{n % 2}\n" for n in range(40)), encoding="utf-8"
    )
    for n in range(40):
        path = Path("vehicles", ("cars", "trucks")[n % 2], f"{n}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (n, 200 * (n % 2), 0)).save(path)
    lines = [line for block in examples("sh") for line in block.splitlines() if line.strip()]
    assert [line for line in lines if line.startswith("make ")] == ["make demo", "make test"]
    commands = [line for line in lines if line.startswith("headstart ")]
    assert len(commands) + 2 == len(lines)
    for line in commands:
        result = call(*shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    (code,) = examples("python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nll" in done.stdout


def test_the_package_runs_as_a_module() -> None:
    for given, code in ((["--version"], 0), (["tune", "nothing.csv"], 3)):
        done = subprocess.run([sys.executable, "-m", "headstart", *given], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
    assert "nothing.csv: no such file" in done.stderr


def test_the_examples_run(data: Path) -> None:
    visits = "".join(f'note,"{n} sore throat","The plan {n % 3}."\n' for n in range(40))
    Path("visits.csv").write_text(f"kind,note,report\n{visits}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "tune.py"), "data.jsonl"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    script = (ROOT / "examples" / "columns.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    for line in script.splitlines():
        if line.startswith("headstart "):
            assert call(*shlex.split(line)[1:]).exit_code == 0
    assert (
        call("tune", "data.jsonl", "-c", str(ROOT / "examples" / "settings.yaml"), "-o", "runs/settings").exit_code == 0
    )


def run_card(run: Path, asked: str) -> str:
    """Run the lines of a run's model card, with some texts changed and without headstart; return what they print."""
    (code,) = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for old, new in {'"..."': asked, "max_new_tokens=512": "max_new_tokens=20"}.items():
        code = code.replace(old, new)
    blocked = f"import sys; sys.modules['headstart'] = None\n{code}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", blocked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_card_loads_the_model_without_headstart(run: Path) -> None:
    """What the model card shows gives, with plain transformers and peft, the very answer that headstart chat gives."""
    _, said = as_json("chat", str(run), "--ask", "3 three days?", "--max-tokens", "20")
    assert run_card(run, '"3 three days?"').rstrip("\n") == said["answer"].rstrip("\n")


def test_the_doctor_says_what_is_wrong_and_how_to_mend_it(tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.doctor._writable", lambda _: False)
    code, found = as_json("doctor")
    assert code == 1
    assert any("written" in problem["what"] and problem["cure"] for problem in found["problems"])


def test_rows_that_one_model_cannot_read_are_left_out_for_both(run: Path, tiny_model: Path) -> None:
    import shutil

    shutil.copytree(tiny_model, "short")
    config = json.loads(Path("short/config.json").read_text())
    Path("short/config.json").write_text(json.dumps({**config, "max_position_embeddings": 24}))
    lines = [json.loads(line) for line in Path("data.jsonl").read_text().splitlines()]
    lines[0]["messages"][0]["content"] *= 8
    Path("long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, versus = as_json("compare", "short", str(run), "long.jsonl", "--answers", "10")
    assert code == 0
    assert 10 < versus["rows"] < 40
    assert any("dropped whole" in note for note in versus["models"][0]["notes"])
    assert any("the other model" in note for note in versus["models"][1]["notes"])
    assert versus["pairs"][0]["differences"]["rouge_l"]["rows"] == 10
