"""What tests share: real data where it is at hand, and a tiny chat model on disk."""

from __future__ import annotations

import ast
import contextlib
import gc
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headstart.data.read import Where
from headstart.data.records import Conversation, Message
from headstart.data.segments import Example, Segment
from headstart.engine.engine import Engine

# Runs leave signals alone that are ignored when they begin, as in the background or under nohup; tests send them.
for _name, _handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _handler)

# A worker of several has a core for itself, which its threads and processes share: they would only wait for each other.
if hasattr(os, "sched_setaffinity") and (_worker := os.environ.get("PYTEST_XDIST_WORKER")):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Keep what is imported out of the garbage collector's way: runs collect garbage, and would look through all of it."""
    gc.freeze()


SHARED = Path(__file__).parents[2] / "shared" / "data"


def is_test(name: str) -> bool:
    """Tell whether there is a test of this name, `file::function`: tables in the documentation name them."""
    file, _, function = name.partition("::")
    tree = ast.parse((Path(__file__).parents[1] / file).read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)


@contextlib.contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Interrupt training when it is about to take a step, counted from 1."""
    original, steps = Engine.optim_step, 0

    def until_killed(self: Engine, lr: float) -> float:
        nonlocal steps
        steps += 1
        if steps == step:
            raise KeyboardInterrupt
        return original(self, lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "optim_step", until_killed)
        yield


@pytest.fixture(scope="session")
def mts_dialog() -> Path:
    """Return the folder of real doctor-patient dialogues; skip where it isn't at hand."""
    folder = SHARED / "mts_dialog"
    if not folder.is_dir():
        pytest.skip(f"needs real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny Llama, its tokenizer and a ChatML template."""
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


def build_model(folder: Path) -> Path:
    """Write a tiny Llama, its tokenizer and a ChatML template; return the folder."""
    import transformers

    from tests.tokens import make_tokenizer

    tokenizer = make_tokenizer("chatml")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny BERT and its tokenizer of words."""
    return build_encoder(tmp_path_factory.mktemp("models") / "encoder")


def build_encoder(folder: Path) -> Path:
    """Write a tiny BERT and its tokenizer of words; return the folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "text", *map(str, range(50)), "[MASK]"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    frame = {"single": "[CLS] $A [SEP]", "special_tokens": [("[CLS]", 2), ("[SEP]", 3)]}
    backend.post_processor = processors.TemplateProcessing(**frame)
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names, model_max_length=64)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=64, pad_token_id=0, **shape)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small_data(tmp_path: Path) -> Path:
    """Return a file of forty small questions with answers that follow a rule."""
    words = ["sore throat", "plan", "report", "patient", "doctor", "answer", "three days", "reason"]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{n} {words[n % 8]}?"},
                {"role": "assistant", "content": f"The {words[n % 8]}."},
            ]
        }
        for n in range(40)
    ]
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def example(ids: list[int], weights: list[float] | None = None, line: int = 1) -> Example:
    """Return an example of one segment; by default every token but the first is a target."""
    import numpy as np

    weights = weights if weights is not None else [0.0] + [1.0] * (len(ids) - 1)
    return Example(Where("rows", line), (Segment(np.array(ids, np.int32), np.array(weights, np.float32)),))


def conversation(*turns: str, line: int = 1, system: str | None = None, group: str | None = None) -> Conversation:
    """Return a conversation of alternating user and assistant turns, every answer trained."""
    messages = [Message("system", system)] if system else []
    messages += [
        Message("user", text) if n % 2 == 0 else Message("assistant", text, True) for n, text in enumerate(turns)
    ]
    return Conversation(Where("rows", line), tuple(messages), group=group)


@pytest.fixture(scope="session")
def tiny_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny network for images of 32 x 32."""
    return build_network(tmp_path_factory.mktemp("models") / "network")


def build_network(folder: Path) -> Path:
    """Write a tiny network for images of 32 x 32; return the folder."""
    from headstart.data.images import Look
    from headstart.models.efficientnet import EfficientNetLiteConfig, EfficientNetLiteForImageClassification

    torch.manual_seed(0)
    stages = [[1, 8, 1, 1, 3], [2, 12, 2, 2, 5]]
    config = EfficientNetLiteConfig(stem=8, stages=stages, hidden_size=16, image_size=32, num_labels=10)
    EfficientNetLiteForImageClassification(config).save_pretrained(folder)
    look = Look(32, 32, (0.5,) * 3, (0.5,) * 3)
    (folder / "preprocessor_config.json").write_text(json.dumps(look.to_json()), encoding="utf-8")
    return folder


@pytest.fixture
def tiny_home(
    tmp_path: Path, tiny_model: Path, tiny_encoder: Path, tiny_network: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Let tiny models stand where the built-in ones are cached, and work in an empty folder; return that folder."""
    home = tmp_path / "home"
    for name, folder in (("smollm2-135m", tiny_model), ("minilm", tiny_encoder), ("efficientnet-lite0", tiny_network)):
        cache = home / "models" / name
        shutil.copytree(folder, cache)
        record = {"name": name, "sha256": "0" * 64, "license": "Apache-2.0", "origin": {}}
        (cache / "headstart.json").write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setenv("HEADSTART_HOME", str(home))
    monkeypatch.setenv("HEADSTART_OFFLINE", "1")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work
