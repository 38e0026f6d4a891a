"""LoRA at the start = the base; what is saved, loaded by plain transformers or peft = what was in memory; merged = adapted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from headstart.data.forest import build_packs
from headstart.data.segments import Example
from headstart.engine.engine import Engine
from headstart.engine.forward import PackReader
from headstart.engine.loop import LoopPlan, take_step
from headstart.engine.optim import Schedule
from headstart.errors import DivergedError, ModelError
from headstart.models.adapt import Adapted, Lora, adapt
from headstart.models.attention import register, use_attention
from headstart.models.save import save_result
from headstart.objectives.tokens import nll
from tests.conftest import example
from tests.tokens import make_tokenizer
from tests.twins import twin

LORA = Lora(rank=4, alpha=8, dropout=0.0, targets=("all-linear",))
IDS = torch.arange(3, 20)[None]


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def logits(model: torch.nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def examples() -> list[Example]:
    return [example([3 + (7 * n + k * k) % 90 for k in range(12)], line=n) for n in range(8)]


def trained(adapted: Adapted, steps: int = 3, batch: int = 4, tokens_per_pack: int = 1000) -> Adapted:
    engine = Engine(PackReader(adapted.model), adapted.trainable(), nll)
    plan = LoopPlan(Schedule(1e-2, 100), tokens_per_pack)
    for step in range(steps):
        take_step(engine, examples()[:batch], range(batch), plan, step, 0.0)
    use_attention(adapted.model, packed=False)
    return adapted


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "phi3"])
def test_an_adapter_adds_nothing_at_the_start(name: str) -> None:
    before = logits(twin(name))
    adapted = adapt(twin(name), LORA, seed=0)
    assert torch.equal(logits(adapted.model), before)
    assert adapted.modules > 0
    assert all("lora_" in key for key in adapted.trainable())


def test_training_moves_the_adapter_and_nothing_else() -> None:
    model = twin("llama", torch.float32)
    frozen = {key: p.clone() for key, p in model.named_parameters()}
    adapted = trained(adapt(model, LORA, seed=0))
    for key, parameter in adapted.model.named_parameters():
        original = frozen.get(key.replace(".base_layer", ""))
        if original is not None:
            assert torch.equal(parameter, original), key
    assert all(p.abs().sum() > 0 for key, p in adapted.trainable().items() if "lora_B" in key)


def test_full_training_moves_every_parameter() -> None:
    model = twin("llama", torch.float32)
    before = {key: p.clone() for key, p in model.named_parameters()}
    adapted = trained(adapt(model, None, seed=0))
    assert all(not torch.equal(p, before[key]) for key, p in adapted.trainable().items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_saved_adapter_loaded_by_peft_is_the_one_in_memory(name: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    twin(name, torch.float32).save_pretrained(tmp_path / "base")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = trained(adapt(model, LORA, seed=0))
    save_result(adapted.saved, make_tokenizer("chatml"), [5], tmp_path / "model")
    # Older versions of transformers load Gemma 2 with an attention that leaves out its soft cap.
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation=model.config._attn_implementation
    )
    loaded = PeftModel.from_pretrained(base, tmp_path / "model")
    assert torch.equal(logits(loaded), logits(adapted.model))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(adapted.model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(twin(name, torch.float32)), logits(merged), atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_saved_model_loaded_by_transformers_is_the_one_in_memory(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapted = trained(adapt(twin(name, torch.float32), None, seed=0))
    save_result(adapted.saved, make_tokenizer("chatml"), [5, 6], tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(adapted.model))
    assert loaded.generation_config.eos_token_id == [5, 6]
    # Our attention is known in this process alone; what is saved must not ask for it.
    assert "headstart" not in (tmp_path / "model" / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == make_tokenizer("chatml").chat_template
    assert not list((tmp_path / "model").glob("*.bin"))


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_one_step_is_the_same_however_it_is_split_into_packs(lora: Lora | None) -> None:
    found = []
    for tokens_per_pack in (1, 25, 1000):
        adapted = trained(adapt(twin("llama"), lora, seed=0), steps=2, batch=8, tokens_per_pack=tokens_per_pack)
        found.append({key: p.detach().clone() for key, p in adapted.trainable().items()})
    for key, first in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[key], first, rtol=1e-6, atol=1e-9)


def test_a_step_is_that_of_plain_torch() -> None:
    model, reference = twin("llama"), twin("llama")
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0)
    rows = examples()[:4]
    total = sum(float(row.segments[0].weights.sum()) for row in rows)
    for row in rows:
        ids = torch.tensor(row.segments[0].ids.astype("int64"))[None]
        (reference(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1) / total).backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    optimizer.step()
    adapted = adapt(model, None, seed=0)
    engine = Engine(PackReader(adapted.model), adapted.trainable(), nll, clip=1.0)
    take_step(engine, rows, range(4), LoopPlan(Schedule(1e-2, 10, shape="constant"), 1000), 0, 0.0)
    for (key, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_the_weights_alone_and_names_its_rows(bad: float) -> None:
    adapted = adapt(twin("llama", torch.float32), LORA, seed=0)
    engine = Engine(PackReader(adapted.model), adapted.trainable(), nll)
    before = {key: p.clone() for key, p in adapted.trainable().items()}
    rows = [example([3, 4, 5], [0.0, 1.0, bad], line=7), example([5, 6, 7], line=8)]
    with pytest.raises(DivergedError, match=r"rows:7, rows:8: step 1") as error:
        take_step(engine, rows, range(2), LoopPlan(Schedule(1e-2, 10), 1000), 0, 0.0)
    assert error.value.exit_code == 5
    assert all(torch.equal(p, before[key]) for key, p in adapted.trainable().items())
    take_step(engine, examples()[:2], range(2), LoopPlan(Schedule(1e-2, 10), 1000), 0, 0.0)


def test_a_target_that_is_not_there_is_an_error_that_names_those_that_are() -> None:
    with pytest.raises(ModelError, match="no module is called nope") as error:
        adapt(twin("llama"), Lora(4, 8, 0.0, ("q_proj", "nope")), seed=0)
    assert "q_proj" in error.value.problems[0].cure


def test_the_learning_rate_by_step() -> None:
    cosine = Schedule(1.0, 10, 2)
    assert [round(cosine.lr(step), 4) for step in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
    linear = Schedule(1.0, 10, 0, "linear")
    assert [linear.lr(step) for step in (0, 5)] == [1.0, 0.5]
    assert Schedule(1.0, 10, 0, "constant").lr(9) == 1.0


def test_scores_are_those_of_each_row() -> None:
    from headstart.evaluate.score import score_rows

    model = twin("llama")
    scores = score_rows(PackReader(model), examples(), 30)
    use_attention(model, packed=False)
    for number, row in enumerate(examples()):
        ids = torch.tensor(row.segments[0].ids.astype("int64"))[None]
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        assert scores.nll[number] / scores.targets[number] == pytest.approx(float(loss), rel=1e-6)
    assert len(build_packs(examples(), 30)) > 1
