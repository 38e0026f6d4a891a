"""Graders: each form against a reference or a derivation, what is refused, and what a sandboxed grader can't do."""

from __future__ import annotations

import http.client
import json
import math
import platform
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from headstart.errors import DataError, HeadstartError, ModelError, UsageError
from headstart.evaluate.compare import interval
from headstart.evaluate.graders import ask as asking
from headstart.evaluate.graders.ask import cosines
from headstart.evaluate.graders.fill import Case, fill
from headstart.evaluate.graders.forms import build_grader, read_graders
from headstart.evaluate.graders.formula import Formula
from headstart.evaluate.graders.grade import Grade, check_graders, grade
from headstart.evaluate.graders.jail import REFUSED
from headstart.evaluate.graders.rows import Grading, pair_grades, ungraded
from headstart.evaluate.graders.texts import SIMILARITIES, last_number, words
from headstart.evaluate.measure import Measured, RowResult
from headstart.evaluate.metrics import common_subsequence
from headstart.evaluate.predictions import Predictions

TEXT, REFERENCE = "A cat sat on the mat.", "A cat sat on one mat."
PAIR = {"input": "{{sample.output_text}}", "reference": "{{item.answer}}"}


def score(form: dict[str, Any], text: str, /, **item: Any) -> float | None:
    return grades(form, text, **item)[0].score


def grades(form: dict[str, Any], /, *answers: str, **item: Any) -> list[Grade]:
    return grade(build_grader({"name": "g", **form}), [Case("a:1", item, answer=answer) for answer in answers])


# --- texts ---


@pytest.mark.parametrize(
    ("operation", "answer", "expected"),
    [
        ("eq", "Yes", 1), ("eq", "yes", 0), ("ne", "yes", 1), ("like", "Oh Yes!", 1), ("like", "oh yes", 0),
        ("ilike", "oh yes", 1), ("ilike", "no", 0),
    ],
)  # fmt: skip
def test_string_check(operation: str, answer: str, expected: float) -> None:
    assert score({"type": "string_check", "operation": operation, **PAIR}, answer, answer="Yes") == expected


def test_rouge_is_that_of_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    names = [f"rouge{n}" for n in (*range(1, 6), "L")]
    expected = RougeScorer(names).score(REFERENCE, TEXT)
    for name in names:
        ours = SIMILARITIES[name.lower().replace("rouge", "rouge_")](TEXT, REFERENCE)
        assert ours == pytest.approx(expected[name].fmeasure), name


def test_gleu_is_that_of_nltk() -> None:
    from nltk.translate.gleu_score import sentence_gleu

    for text, reference in ((TEXT, REFERENCE), (REFERENCE, "a mat"), ("a a a", "a"), ("none", REFERENCE)):
        expected = sentence_gleu([words(reference)], words(text))
        assert SIMILARITIES["gleu"](text, reference) == pytest.approx(expected)


def test_bleu_meteor_and_fuzzy_match_are_what_their_formulas_say() -> None:
    # 6 of 7 tokens, 4 of 6 pairs, 2 of 5 triples and 1 of 4 quadruples stand in the reference, which is as long.
    bleu = (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert SIMILARITIES["bleu"](TEXT, REFERENCE) == pytest.approx(bleu)
    # Five of six words match on both sides, in two chunks: F = 5/6, penalty 0.5 (2/5)^3. "cats" and "cat" by their stem.
    assert SIMILARITIES["meteor"](TEXT, REFERENCE) == pytest.approx(5 / 6 * (1 - 0.5 * (2 / 5) ** 3))
    assert SIMILARITIES["meteor"]("two cats", "two cat") == pytest.approx(1 - 0.5 * (1 / 2) ** 3)
    # rapidfuzz's own example: ratio("this is a test", "this is a test!") is 96.55.
    assert SIMILARITIES["fuzzy_match"]("this is a test", "this is a test!") == pytest.approx(0.9655, abs=1e-4)


@given(st.text("abc", max_size=70), st.text("abc", max_size=70))
@settings(max_examples=60, deadline=None)
def test_the_longest_common_subsequence_is_that_of_the_table(a: str, b: str) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert common_subsequence(a, b) == table[-1][-1]


def test_cosine_is_that_of_the_embeddings(tiny_encoder: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    pairs = [("text 1 2", "text 3"), ("text 4", "text 4"), ("", "text")]
    found = cosines(str(tiny_encoder), pairs)
    model, tokenizer = AutoModel.from_pretrained(tiny_encoder), AutoTokenizer.from_pretrained(tiny_encoder)
    with torch.no_grad():
        a, b = (model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)[0] for text in pairs[0])
    assert found[0] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-5)
    assert found[1:] == pytest.approx([1, 0])
    asking._embedding_model.cache_clear()


@pytest.mark.parametrize(
    ("form", "answer", "expected"),
    [
        ({"type": "exact_match"}, "the  Answer!", 1),
        ({"type": "exact_match", "ignore": ["case"]}, "the  Answer!", 0),
        ({"type": "exact_match", "ignore": ["case", "space", "punctuation", "articles"]}, "An answer.", 1),
        ({"type": "exact_match"}, "answers", 0),
    ],
)
def test_exact_match_after_normalising(form: dict[str, Any], answer: str, expected: float) -> None:
    reference = "answer" if "articles" in form.get("ignore", ()) else "The answer"
    assert score({**form, **PAIR}, answer, answer=reference) == expected


def test_numbers_are_compared_within_their_tolerance() -> None:
    said = {
        "of 3 pills, 1,234.5 mg.": 1234.5,
        "10-5": 5,
        "it is -4": -4,
        "2.5e-3": 0.0025,
        "v1.2.3b": None,
        "none": None,
        "5kg": 5,
        "at 7pm": 7,
        "-1.5e2V": -150,
        "1,2,3": 3,
        "12,5": 5,
        "1,234,567": 1234567,
        "1,2345": 2345,
        "1234,567": 567,
        ".5": 0.5,
        "it is -.5.": -0.5,
        "1.2.3": None,
        "1.234.567": None,
        "B12": None,
        "5, or 6.": 6,
    }
    assert {text: last_number(text) for text in said} == said
    form = {"type": "numeric", "tolerance": 0.5, **PAIR}
    assert [g.score for g in grades(form, "12.5", "12.51", "none", answer="12")] == [1, 0, 0]
    assert [g.score for g in grades({**form, "tolerance": 0, "relative_tolerance": 0.1}, "110", "111", answer="100")] == [1, 0]  # fmt: skip
    assert grades(form, "1", answer="unknown")[0] == Grade(None, "the reference has no number")


def test_json_is_valid_where_it_fits_the_schema() -> None:
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["dose"], "properties": {"dose": {"type": "integer", "minimum": 1}}}
    form = {"type": "json_schema", "input": "{{sample.output_text}}", "schema": schema}
    answers = ['{"dose": 2}', '{"dose": 0}', '{"dose": "2"}', "{}", "no", '{"dose": 1, "dose": 2}']
    assert [g.score for g in grades(form, *answers)] == [1, 0, 0, 0, 0, 0]
    with pytest.raises(UsageError, match="the schema is none"):
        grades({**form, "schema": {"type": "objekt"}}, "{}")


@pytest.mark.parametrize("ref", ["http://127.0.0.1:9/schema", "other.json", "#/$defs/missing", "#/listed"])
@pytest.mark.parametrize("place", ["items", "properties", "$defs"])
def test_a_schema_that_refers_elsewhere_is_an_error_and_nothing_is_fetched(ref: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    pytest.importorskip("jsonschema")
    asked: list[Any] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *given, **_: asked.append(given))
    inner = {"$ref": ref} if place == "items" else {"$ref": {"$ref": ref}}  # a property of that name too
    form = {"type": "json_schema", "input": "x", "schema": {"listed": [], place: inner}}
    with pytest.raises(UsageError, match=r"refers to what|is none") as caught:
        check_graders([build_grader({"name": "g", **form})], [])
    assert (caught.value.problems[0].code, asked) == ("grader.form", [])


def test_a_schema_may_refer_to_itself_and_to_its_draft() -> None:
    pytest.importorskip("jsonschema")
    form = {"type": "json_schema", "input": "{{sample.output_text}}"}
    tree = {"type": "object", "additionalProperties": {"$ref": "#"}, "properties": {"$ref": {"type": "object"}}}
    assert [g.score for g in grades({**form, "schema": tree}, '{"a": {"b": {}}}', '{"a": {"b": 1}}')] == [1, 0]
    draft = {"$ref": "https://json-schema.org/draft/2020-12/schema"}
    assert [g.score for g in grades({**form, "schema": draft}, '{"type": "object"}', '{"type": "objekt"}')] == [1, 0]
    assert "without end" in grades({**form, "schema": {"$ref": "#"}}, "1")[0].why


# --- templates and forms ---


def test_places_are_filled_once_and_what_is_filled_in_is_text() -> None:
    case = Case("a:1", {"a": {"b": [1, "x"]}, "c d": "{{item.a}}"}, "asked", "right", '{"n": {"m": 2}}')
    template = '{{item.a.b[1]}} {{ item["c d"] }} {{item.a}} {{row.asked}} {{row.reference}} {{sample.output_json.n.m}}'
    assert fill(template, case) == 'x {{item.a}} {"b": [1, "x"]} asked right 2'
    assert fill("[{{sample.output_json.n.none}}]", case) == "[]"
    with pytest.raises(KeyError, match=r"item.a.z"):
        fill("{{item.a.z}}", case)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"type": "string_chek"}, "did you mean 'string_check'"),
        ({"type": None}, "there are string_check"),
        ({"type": "string_check", "operation": "equals", **PAIR}, "'eq', 'ne', 'like' or 'ilike'"),
        ({"type": "string_check", "operation": "eq", **PAIR, "inputs": "x"}, "did you mean `input`?"),
        ({"type": "string_check", "operation": "eq", "input": "x"}, "`reference` is missing"),
        ({"type": "exact_match", "input": "{{sample.output}}", "reference": "x"}, "did you mean 'output_text'"),
        ({"type": "exact_match", "input": "{{items.x}}", "reference": "x"}, "did you mean 'item'"),
        ({"type": "exact_match", "input": "{{}}", "reference": "x"}, "is empty"),
        ({"type": "python", "source": "def grade(:"}, "it isn't Python"),
        ({"type": "python", "source": "def rate(sample, item): return 1"}, "no function grade"),
        ({"type": "multi", "graders": {"a": {"type": "exact_match", **PAIR}}, "calculate_output": "a + b"}, "names ['b']"),
        ({"type": "multi", "graders": {"a": {"type": "exact_match"}}, "calculate_output": "a"}, "a:input"),
        ({"type": "reward_model", "model": "m", "input": [{"role": "user", "content": "q"}] * 2}, "ends with the answer"),
        ({"type": "label_model", "model": "m", "input": [{"role": "user", "content": "x"}], "labels": ["a", "b"], "passing_labels": ["c"]}, "['c']"),
        ({"type": "score_model", "model": "m", "input": [{"role": "user", "content": "x"}], "api_key_env": "KEY"}, "no effect"),
        ({"type": "score_model", "model": "m", "input": [{"role": "user", "content": "x"}], "endpoint": "https://k@h/v1"}, "an address"),
    ],
)  # fmt: skip
def test_a_bad_form_is_an_error_with_its_place_and_a_cure(tmp_path: Path, form: dict[str, Any], said: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({"name": "g", **form}))
    with pytest.raises(UsageError) as caught:
        read_graders([file])
    assert said in str(caught.value)
    assert all(p.where.startswith(str(file)) and p.cure and p.code == "grader.form" for p in caught.value.problems)


def test_the_examples_are_graders() -> None:
    root = Path(__file__).parents[2]
    shown = re.findall(r"```json\n(.*?)```", (root / "docs" / "graders.md").read_text(encoding="utf-8"), re.DOTALL)
    least = [build_grader(json.loads(form)).least for form in shown]
    assert least == [0.5, 3, 0.5]  # of a model's score the middle of its range
    case = Case("a:1", {}, "q", "one two three", "one two four")
    found = [grade(grader, [case])[0].score for grader in read_graders([root / "examples" / "graders.json"])]
    # Of 12 and 13 characters 9 are common in order, "one two " and "r"; two words of three, one pair of two.
    assert found == pytest.approx([2 * 9 / 25, 1, 0.5 * 2 / 3 + 0.5 / 2])


def test_all_problems_of_all_files_come_at_once(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    good = {"type": "exact_match", "name": "same", **PAIR}
    first.write_text(json.dumps([good, {"type": "x"}, good]))
    second.write_text("{")
    with pytest.raises(UsageError) as caught:
        read_graders([first, second])
    assert [p.code for p in caught.value.problems] == ["grader.form", "grader.unreadable", "grader.form"]
    assert caught.value.problems[0].where == f"{first}:[1]"


def test_a_row_without_what_a_grader_names_is_an_error_before_anything_is_answered() -> None:
    part = {"type": "exact_match", **PAIR}
    grader = build_grader({"type": "multi", "name": "m", "graders": {"a": part}, "calculate_output": "a"})
    with pytest.raises(DataError) as caught:
        check_graders([grader], [Case("a:1", {"answer": 1}), Case("a:2", {"answers": 1})])
    assert [(p.where, "item.answer" in p.what) for p in caught.value.problems] == [("a:2", True)]


# --- formulas ---


def test_a_formula_computes_and_is_nothing_else() -> None:
    formula = Formula("0.5*a + min(1, b, 2)^2 - -abs(-a)/exp(0) + floor(1.5) + log(1) + sqrt(4)")
    formula.check({"a", "b"})
    assert formula.value({"a": 2.0, "b": 3.0}) == 1 + 1 + 2 + 1 + 0 + 2
    for text in ("__import__('os')", "a.b", "a if 1 else 2", "[a]", "f'{a}'", "(lambda: a)()", "a < 1", "True", "min(a)", "exp(a, a)", "a;a", "'x'", "a and a", "(" * 500):  # fmt: skip
        with pytest.raises(ValueError):
            Formula(text).check({"a"})


def test_multi_combines_and_a_part_without_a_score_leaves_none() -> None:
    parts = {"hit": {"type": "string_check", "operation": "eq", **PAIR}, "near": {"type": "text_similarity", "evaluation_metric": "fuzzy_match", **PAIR}}  # fmt: skip
    form = {"type": "multi", "graders": parts, "calculate_output": "0.25 * hit + 0.75 * near"}
    assert [g.score for g in grades(form, "ab", "ac", answer="ab")] == [1, 0.375]
    assert grades({**form, "calculate_output": "hit / (hit - near)"}, "ab", answer="ab")[0].score is None
    number = {"n": {"type": "numeric", **PAIR}}
    assert grades({"type": "multi", "graders": number, "calculate_output": "n"}, "1", answer="x")[0].why.startswith(
        "n: "
    )


# --- python ---


def python(source: str, **limits: Any) -> dict[str, Any]:
    return {"type": "python", "source": f"def grade(sample, item):\n    {source}", **limits}


def test_a_python_grader_sees_sample_and_item() -> None:
    form = python("print('x'); return len(sample['output_text']) / item['most'] + sample['output_json'][0]")
    assert score(form, "[3]", most=4) == 3.75


def test_a_python_grader_that_fails_is_not_graded_and_the_next_row_is() -> None:
    source = """import os
    a = sample["output_text"]
    if a == "raise": raise ValueError("no")
    if a == "slow":
        while True: pass
    if a == "big": bytearray(1 << 31)
    if a == "end": os._exit(1)
    if a == "loud":
        for handle in range(3, 9):
            try: os.write(handle, b"{}\\n" * 40000)
            except OSError: pass
    if a == "nan": return float("nan")
    return 1"""
    found = grades(python(source, time_limit_s=2), "raise", "slow", "big", "end", "loud", "nan", "ok")
    assert [g.score for g in found] == [None] * 6 + [1]
    assert [g.why.split(":")[0] for g in found[:4]] == ["ValueError", "it took more than 2 s", "it needs more memory than it may have", "its process ended by itself, most likely for want of memory"]  # fmt: skip


@pytest.mark.parametrize("written", ["5", '"x"', "[]", "{}", '{"score": "x"}', '{"score": NaN}', '{"score": 1%s}' % ("0" * 400), "[" * 9000])  # fmt: skip
def test_what_a_python_grader_writes_in_place_of_its_answer_is_no_grade(written: str) -> None:
    source = """import os
    for handle in range(3, 9):
        try: os.write(handle, item["written"].encode() + b"\\n")
        except OSError: pass
    while True: pass"""
    assert grades(python(source), "a", written=written) == [Grade(None, "its process wrote what is no answer")]


def test_half_a_surrogate_is_kept_spelled(tmp_path: Path) -> None:
    graded = grades(python("raise ValueError(sample['output_text'])"), "\ud800")
    assert graded == [Grade(None, "ValueError: \\ud800")]
    kept = Predictions.open(tmp_path / "kept", {})
    kept.write(0, [row(1, "x", g=1.0)], {"a:1": {"unused": "\ud800é"}})
    kept.finish(1, {})
    # What is read again is what was written.
    assert Predictions.open(tmp_path / "kept", {}).read(0) == [replace(row(1, "x", g=1.0), truth=[], found=[])]
    assert json.loads(pq.read_table(kept.predictions_file)["item"][0].as_py()) == {"unused": "\ud800é"}


def test_a_source_that_cannot_be_run_is_an_error() -> None:
    with pytest.raises(UsageError, match="No module named 'nothere'"):
        grades({"type": "python", "source": "import nothere\ndef grade(sample, item): return 1"}, "x")


filtered = pytest.mark.skipif(
    platform.machine() not in REFUSED or sys.platform != "linux", reason="no filter of system calls here"
)


@filtered
def test_a_python_grader_reaches_no_network_no_process_and_changes_no_file(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    tries = {
        "network": "import socket; socket.socket()",
        "pair": "import socket; socket.socketpair()",
        "process": "import os; os.fork()",
        "program": "import os; os.execv('/bin/true', ['true'])",
        "kill": "import os; os.kill(os.getppid(), 0)",
        "write": f"open({str(tmp_path / 'new')!r}, 'w')",
        "append": f"open({str(kept)!r}, 'a')",
        "delete": f"import os; os.unlink({str(kept)!r})",
        "rename": f"import os; os.rename({str(kept)!r}, {str(tmp_path / 'other')!r})",
        "mode": f"import os; os.chmod({str(kept)!r}, 0)",
        "time": f"import os; os.utime({str(kept)!r})",
        "folder": f"import os; os.mkdir({str(tmp_path / 'folder')!r})",
        "direct": f"import ctypes; e = ctypes.CDLL(None, use_errno=True).unlink({str(kept)!r}.encode()); import os; e and os.kill(os.getppid(), 0)",
        "environment": "import os; assert 'HOME' not in os.environ and 'PATH' not in os.environ; raise PermissionError",
    }  # fmt: skip
    source = "exec(item[sample['output_text']]); return 1"
    found = dict(zip(tries, grades(python(source), *tries, **tries), strict=True))
    assert {name: (g.score, g.why.split(":")[0]) for name, g in found.items()} == dict.fromkeys(tries, (None, "PermissionError"))  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "as it was"
    assert all(len(numbers) == len(set(numbers)) for numbers in REFUSED.values())


@filtered
def test_a_python_grader_changes_nothing_of_another_process() -> None:
    calls = {
        "shm": (29, 194), "sem": (64, 190), "msg": (68, 186), "message": (240, 180), "key": (248, 217),
        "keyctl": (250, 219), "io": (251, 30), "group": (109, 154), "scheduler": (144, 119), "pages": (279, 239),
        "pidfd": (434, 434), "memory": (310, 270), "ptrace": (101, 117),
    }  # fmt: skip
    call = "import ctypes, os; e = ctypes.CDLL(None, use_errno=True); r = e.syscall({}, 0, 0, 0, 0, 0); n = ctypes.get_errno(); assert r == -1; raise OSError(n, '')"
    tries = {name: call.format(numbers[platform.machine() == "aarch64"]) for name, numbers in calls.items()} | {
        "limit": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)",
        "priority": "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 5)",
        "cores": "import os; os.sched_setaffinity(os.getppid(), {0})",
        "owner": "import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
        "owner of another kind": "import fcntl, os; fcntl.fcntl(0, 15, bytes(8))",
        "typing": "import fcntl; fcntl.ioctl(0, 0x5412, b'x')",
    }
    source = "exec(item[sample['output_text']]); return 1"
    found = dict(zip(tries, grades(python(source), *tries, **tries), strict=True))
    assert {name: (g.score, g.why.split(":")[0]) for name, g in found.items()} == dict.fromkeys(tries, (None, "PermissionError"))  # fmt: skip
    own = "import fcntl, resource; fcntl.fcntl(0, fcntl.F_GETFD); resource.prlimit(0, resource.RLIMIT_NOFILE)"
    assert score(python(f"{own}; return 1"), "x") == 1


@filtered
@pytest.mark.skipif("__import__('ctypes').CDLL(None).syscall(444, None, 0, 1) < 1", reason="no Landlock here")
def test_a_python_grader_reads_no_environment_of_another_process() -> None:
    source = "import os; return len(open(f'/proc/{os.%s()}/environ', 'rb').read()) > 0"
    assert score(python(source % "getpid"), "x") == 1
    assert grades(python(source % "getppid"), "x")[0].why.startswith("PermissionError")


# --- models ---


class Judge(BaseHTTPRequestHandler):
    """A stand-in for an endpoint: pops what it is to say, and keeps what it was asked."""

    replies: ClassVar[list[Any]] = []
    asked: ClassVar[list[Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers.get("Authorization"), body))
        reply = self.replies.pop(0)
        status, content = reply if isinstance(reply, tuple) else (200, {"choices": [{"message": {"content": reply}}]})
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/stolen")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(asking, "AT_ONCE", 1)
    monkeypatch.setattr(asking, "WAIT_S", 0.0)
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    Judge.replies.clear()
    Judge.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def judge(endpoint: str, kind: str = "score_model", **more: Any) -> dict[str, Any]:
    turns = [{"role": "system", "content": "Grade."}, {"role": "user", "content": [{"type": "input_text", "text": "{{sample.output_text}}"}]}]  # fmt: skip
    form = {
        "type": kind,
        "name": "judge",
        "model": "big",
        "input": turns,
        "endpoint": endpoint,
        "api_key_env": "JUDGE_KEY",
    }
    return {**form, **more}


def test_a_model_scores_within_its_range(endpoint: str) -> None:
    said = ['{"result": 4}', "```json\n{\"result\": 2.5}\n```", "I'd say 3", '{"result": 6}', "between 2 and 3", '{"result": true}', '{"result": %s}' % ("9" * 400)]  # fmt: skip
    Judge.replies[:] = [*said]
    form = judge(endpoint, range=[1, 5], sampling_params={"temperature": 0, "max_completions_tokens": 9})
    found = grades(form, *"abcdefg")
    assert [g.score for g in found] == [4, 2.5, 3, None, None, None, None]
    assert "isn't from 1 to 5" in found[3].why
    path, key, body = Judge.asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer s3cret")
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("big", 0, 9)
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"].startswith("a\n\nAnswer with JSON alone")


def test_a_model_gives_labels_of_which_some_pass(endpoint: str) -> None:
    Judge.replies[:] = ['{"result": "good"}', '{"result": "BAD"}', "It is good.", "good or bad", "who knows"]
    form = judge(endpoint, "label_model", labels=["good", "bad"], passing_labels=["good"])
    assert [g.score for g in grades(form, *"abcde")] == [1, 0, 1, None, None]


def test_an_endpoint_that_stumbles_is_asked_again_and_one_that_refuses_is_an_error(endpoint: str) -> None:
    Judge.replies[:] = [(503, {}), (200, {"choices": []}), '{"result": 1}']
    assert score(judge(endpoint), "a") == 1
    for status, content in ((401, {"error": "bad key s3cret"}), (302, {})):
        Judge.replies[:], Judge.asked[:] = [(status, content)], []
        with pytest.raises(ModelError, match=f"HTTP {status}") as caught:
            score(judge(endpoint), "a")
        assert len(Judge.asked) == 1
        assert "s3cret" not in str(caught.value)
    Judge.replies[:] = [(500, {})] * 4
    with pytest.raises(ModelError, match="HTTP 500"):
        score(judge(endpoint), "a")


@pytest.mark.parametrize("key", ["s3cret\r", "s3cret\n", " s3cret", "s3 cret", "s3cret\u2013"])
def test_a_key_that_no_header_can_hold_is_refused_unnamed(
    endpoint: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    for begin in (lambda: score(judge(endpoint), "a"), lambda: check_graders([build_grader(judge(endpoint))], [])):
        with pytest.raises(ModelError, match="holds white space") as caught:
            begin()
        assert "s3" not in str(caught.value)
    assert not Judge.asked


def test_no_part_of_an_echoed_key_is_shown(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "k" * 40)
    for before in range(asking.SAID - 60, asking.SAID):  # wherever what is shown ends
        Judge.replies[:] = [(401, "." * before + "k" * 40)]
        with pytest.raises(ModelError) as caught:
            score(judge(endpoint), "a")
        assert "kk" not in str(caught.value)


def test_a_refusal_is_a_row_without_a_grade(endpoint: str) -> None:
    refusal = {"choices": [{"message": {"content": None, "refusal": "I can't give it a 1, which would be good."}}]}
    Judge.replies[:] = [(200, refusal), '{"result": 1}']
    assert [g.score for g in grades(judge(endpoint), "a", "b")] == [None, 1]
    Judge.replies[:] = [(200, refusal)]
    form = judge(endpoint, "label_model", labels=["good", "bad"], passing_labels=["good"])
    assert grades(form, "a")[0].score is None
    assert len(Judge.asked) == 3


def test_an_answer_that_cannot_be_read_is_an_error(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: Any) -> bytes:
        raise http.client.IncompleteRead(b"half")

    for post in (cut, lambda *_: b"[" * 200_000):
        monkeypatch.setattr(asking, "_post", post)
        with pytest.raises(ModelError, match="got no grade"):
            score(judge(endpoint), "a")


def test_offline_forbids_other_machines_and_a_key_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_OFFLINE", "1")
    grader = build_grader(judge("https://judge.example/v1"))
    with pytest.raises(ModelError) as caught:
        check_graders([grader], [])
    assert caught.value.problems[0].code == "model.offline"
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ModelError, match="export JUDGE_KEY"):
        check_graders([build_grader(judge("http://localhost:1/v1"))], [])


def test_a_local_model_grades_too(tiny_model: Path) -> None:
    turns = [{"role": "developer", "content": "Grade."}, {"role": "user", "content": "{{sample.output_text}}"}]
    form = {"type": "score_model", "model": str(tiny_model), "input": turns}
    found = grades(form, "answer", "plan")  # random weights say nothing that is a number
    assert [(g.score, g.why[:24]) for g in found] == [(None, "the model gave no number")] * 2
    with pytest.raises(HeadstartError, match="no such model"):
        grades({**form, "model": "nobody"}, "x")
    asking._chat_model.cache_clear()


# --- rows ---


def row(line: int, answer: str | None, **grades: float | None) -> RowResult:
    whys = {name: "broken" for name, value in grades.items() if value is None}
    return RowResult(f"a:{line}", 1.0, 1.0, "q", "yes", answer, grades=grades, ungraded=whys)


def test_grades_are_metrics_and_only_answered_rows_have_them() -> None:
    grader = build_grader({"type": "string_check", "name": "hit", "operation": "eq", "input": "{{sample.output_text}}", "reference": "{{row.reference}}"})  # fmt: skip
    rows = Measured([row(1, "yes"), row(2, "no"), row(3, None)], "chat")
    graded = Grading([grader]).grade(rows, print)
    assert [r.grades for r in graded.rows] == [{"hit": 1}, {"hit": 0}, {}]
    metric = graded.metrics()["hit"]
    assert (len(metric), not metric.lower_is_better) == (2, True)


def test_only_what_can_pass_or_fail_has_the_interval_of_a_rate() -> None:
    forms = {
        "string_check": {"operation": "ilike", "input": "{{sample.output_text}}", "reference": "{{row.reference}}"},
        "exact_match": {"input": "{{sample.output_text}}", "reference": "{{row.reference}}"},
        "numeric": {"input": "7 {{sample.output_text}}", "reference": "7"},
        "json_schema": {"input": "1", "schema": {"type": "number"}},
        "python": {"source": "def grade(sample, item):\n    return sample['output_text'] == 'yes'"},
        "text_similarity": {
            "input": "{{sample.output_text}}",
            "reference": "{{row.reference}}",
            "evaluation_metric": "rouge_l",
        },
        "multi": {
            "graders": {"a": {"type": "numeric", "input": "1", "reference": "1"}},
            "calculate_output": "1 + 4 * (1 - a)",
        },
    }
    graders = [build_grader({"type": kind, "name": kind, **form}) for kind, form in forms.items()]
    counted = build_grader({"type": "python", "name": "counted", "source": "def grade(sample, item):\n    return 1"})
    rows = Measured([row(line, "yes") for line in range(8)], "chat")
    graded = Grading([*graders, counted]).grade(rows, print)
    again = Measured.from_json(json.loads(json.dumps(graded.to_json())), "chat")
    low = binomtest(8, 8).proportion_ci(method="wilson").low
    for side in (graded, again):  # a scale from 1 to 5, of which every answer got the 1, is no rate
        found = {name: interval(metric) for name, metric in side.metrics().items() if name in {*forms, "counted"}}
        assert {name: bounds.low for name, bounds in found.items() if bounds.low < 1} == pytest.approx(
            dict.fromkeys(("string_check", "exact_match", "numeric", "json_schema", "python"), low)
        )


def test_a_label_passes_or_fails_and_a_score_of_a_model_is_on_its_scale(endpoint: str) -> None:
    Judge.replies[:] = ['{"result": "good"}'] * 8 + ['{"result": 1}'] * 8
    labels = build_grader(judge(endpoint, "label_model", labels=["good", "bad"], passing_labels=["good"]))
    scores = build_grader(judge(endpoint, range=[1, 5]))
    rows = Measured([row(line, "yes") for line in range(8)], "chat")
    passed = Grading([labels]).grade(rows, print).metrics()["judge"]
    assert interval(passed).low == pytest.approx(binomtest(8, 8).proportion_ci(method="wilson").low)
    assert interval(Grading([scores]).grade(rows, print).metrics()["judge"]).low == 1


def test_a_row_that_one_side_could_not_grade_counts_on_neither() -> None:
    before = Measured([row(1, "x", g=1.0), row(2, "x", g=None), row(3, "x", g=0.0)], "chat")
    after = Measured([row(1, "x", g=0.5), row(2, "x", g=1.0), row(3, "x", g=None)], "chat")
    first, second = pair_grades([before, after])
    assert [len(side.metrics()["g"]) for side in (first, second)] == [1, 1]
    told = ungraded({"before": before, "after": after})
    assert told == {"g": {"before": 1, "after": 1, "first": "a:2: broken"}}
    nothing = Measured([row(1, "x", g=None)], "chat")
    assert "g" not in nothing.metrics()
    assert math.isclose(Measured.from_json(after.to_json(), "chat").rows[0].grades["g"] or 0, 0.5)
