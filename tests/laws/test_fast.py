"""Fast layers = plain layers: outputs and every gradient, for every form that is known, with adapters and without."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from headstart.data.forest import build_packs
from headstart.engine.engine import Engine
from headstart.engine.forward import PackReader, PreferenceReader
from headstart.engine.optim import total_norm
from headstart.models.adapt import Lora, adapt
from headstart.models.attention import register
from headstart.models.embedding import spread
from headstart.models.fast import slow_down, speed_up
from headstart.models.layers import GatedLayer
from headstart.objectives.tokens import nll
from tests.laws.test_packing import TOLERANCE, assert_same, rows
from tests.twins import PACKED, twin

FUSED = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "smollm3", "granite"]

Gradients = tuple[float, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def trained(name: str, dtype: torch.dtype, *, lora: Lora | None) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    adapted = adapt(twin(name, dtype), lora, seed=1)
    parameters = adapted.trainable()
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in parameters.items():
            if "lora_B" in key:  # at its start an adapter adds nothing, and hides what is wrong
                parameter.copy_(torch.randn(parameter.shape, generator=chance, dtype=parameter.dtype) * 0.1)
    return adapted.model.to(dtype), parameters


def step(model: Any, parameters: dict[str, torch.nn.Parameter], tokens_per_pack: int) -> Gradients:
    engine = Engine(PackReader(model), parameters, nll)
    model.zero_grad()
    total = sum(engine.forward_backward(pack).loss for pack in build_packs(rows(), tokens_per_pack))
    found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    for name, rows_of in engine.rows.items():
        found[name] = spread(rows_of.gradient.ids, rows_of.gradient.values, len(parameters[name]))
    return total, found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("lora", [None, Lora(4, 8, 0.0, ("all-linear",))], ids=["full", "lora"])
@pytest.mark.parametrize("name", PACKED)
def test_fast_equals_plain(name: str, lora: Lora | None, dtype: torch.dtype) -> None:
    model, parameters = trained(name, dtype, lora=lora)
    plain = step(model, parameters, 60)
    sped = speed_up(model)
    assert sped.layers == (2 if name in FUSED else 0)
    # Two packs and more, so that gradients are also added up.
    assert_same(step(model, parameters, 60), plain, TOLERANCE[dtype])
    assert_same(step(model, parameters, 1), plain, TOLERANCE[dtype])
    slow_down(model)
    assert_same(step(model, parameters, 60), plain, 1e-12 if dtype == torch.float64 else 1e-5)


def test_a_plain_layer_runs_once_to_be_read() -> None:
    model, _ = trained("llama", torch.float32, lora=None)
    times = [0, 0]
    for number, layer in enumerate(model.base_model.layers):

        def counted(*args: Any, plain: Any = layer.forward, number: int = number, **kwargs: Any) -> Any:
            times[number] += 1
            return plain(*args, **kwargs)

        layer.forward = counted
    assert speed_up(model).layers == 2
    assert times == [1, 1]


def taught(model: Any, parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Return what the parameters are after three steps."""
    engine = Engine(PackReader(model), parameters, nll)
    for _ in range(3):
        engine.forward_backward_all(build_packs(rows(), 60))
        engine.optim_step(1e-2)
    return {name: p.detach().clone() for name, p in parameters.items()}


@pytest.mark.parametrize("lora", [None, Lora(4, 8, 0.0, ("all-linear",))], ids=["full", "lora"])
def test_fast_trains_as_plain_over_several_steps(lora: Lora | None) -> None:
    """An update must reach what is made of weights and adapters: the fused AdamW doesn't say that it changed them."""
    weights = []
    for fast in (False, True):
        model, parameters = trained("llama", torch.float64, lora=lora)
        if fast:
            speed_up(model)
        weights.append(taught(model, parameters))
    for name, plain in weights[0].items():
        torch.testing.assert_close(weights[1][name], plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_fast_layers_whose_activations_are_made_anew_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, parameters = trained(name, torch.float64, lora=Lora(4, 8, 0.0, ("all-linear",)))
    plain = step(model, parameters, 60)
    assert speed_up(model).layers == 2
    run, times = GatedLayer.run, [0]

    def counted(*args: Any) -> Any:
        times[0] += torch.is_grad_enabled()
        return run(*args)

    monkeypatch.setattr(GatedLayer, "run", counted)
    assert_same(step(model, parameters, 60), plain, 1e-6)
    once = times[0]
    PackReader(model).recompute_activations()
    times[0] = 0
    assert_same(step(model, parameters, 60), plain, 1e-6)
    assert times[0] == 2 * once > 0


def test_the_head_is_made_fast_with_the_layers_and_not_before() -> None:
    reader = PackReader(twin("llama"))
    assert not reader.head.fast
    reader.speed_up()
    assert reader.head.fast
    assert reader.answer_head is reader.head
    pairs = PreferenceReader(twin("llama"), lambda outputs, targets: (outputs, targets))
    pairs.speed_up()
    assert pairs.beside.head.fast


def test_an_adapter_that_is_switched_off_or_has_dropout_runs_the_plain_code() -> None:
    adapted = adapt(twin("llama"), Lora(4, 8, 0.0, ("all-linear",)), seed=1)
    with torch.no_grad():
        for name, parameter in adapted.trainable().items():
            if "lora_B" in name:
                parameter.normal_()
    reader = PackReader(adapted.model.double())
    assert speed_up(reader.model).layers == 2
    (pack,) = build_packs(rows(), 10_000)
    with_adapter = reader.forward(pack)
    with adapted.saved.disable_adapter():
        without = reader.forward(pack)
    torch.testing.assert_close(without, PackReader(twin("llama")).forward(pack), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(with_adapter, without, atol=1e-2)
    dropout = adapt(twin("llama"), Lora(4, 8, 0.1, ("all-linear",)), seed=1)
    assert speed_up(dropout.model).layers == 0


def test_of_an_adapter_that_trains_in_part_that_part_gets_its_gradient() -> None:
    model, parameters = trained("llama", torch.float64, lora=Lora(4, 8, 0.0, ("all-linear",)))
    for name in list(parameters):
        if "q_proj.lora_A" in name or "up_proj.lora_B" in name:
            parameters.pop(name).requires_grad_(False)
    plain = step(model, parameters, 60)
    speed_up(model)
    assert_same(step(model, parameters, 60), plain, 1e-6)


def test_an_adapter_beside_a_weight_that_trains_too() -> None:
    model, parameters = trained("llama", torch.float64, lora=Lora(4, 8, 0.0, ("all-linear",)))
    for name, parameter in model.named_parameters():
        if "up_proj.base_layer" in name or "o_proj.base_layer" in name:
            parameters[name] = parameter.requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    weights = []
    for fast in (False, True):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
        if fast:
            speed_up(model)
        weights.append(taught(model, parameters))
    for name, plain in weights[0].items():
        assert not torch.equal(plain, before[name])
        torch.testing.assert_close(weights[1][name], plain, rtol=1e-3, atol=1e-4)


def held() -> int:
    """Return the bytes of all tensors that are alive."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if is_tensor(t)}
    return sum(storages.values())


def is_tensor(thing: Any) -> bool:
    return issubclass(type(thing), Tensor) and not thing.is_meta


def test_an_adapter_keeps_no_second_copy_of_the_weights() -> None:
    model, parameters = trained("llama", torch.float32, lora=Lora(4, 8, 0.0, ("all-linear",)))
    step(model, parameters, 60)
    before = held()
    speed_up(model)
    step(model, parameters, 60)
    layers = sum(p.nbytes for name, p in model.named_parameters() if "base_layer" in name)
    adapters = sum(p.nbytes for p in parameters.values())
    assert (
        held() - before < 2 * adapters < layers
    )  # the A of layers that read the same input lie once more in one matrix


def test_what_shares_memory_still_does_once_layers_are_fast() -> None:
    """Tied weights as one; what is another's transpose, or a part of it, stays where it is."""
    model = twin("llama")
    one, two = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(4, 3))
    model.whole, model.again = one, torch.nn.Parameter(one.data)
    model.square, model.turned = two, torch.nn.Parameter(two.data.t())
    model.register_buffer("part", model.get_input_embeddings().weight.data[2:5])
    model.register_buffer("none", torch.empty(0, dtype=torch.int64))
    known = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    assert speed_up(model).layers
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, known[name])
        assert tensor.dtype == known[name].dtype
    with torch.no_grad():
        model.whole += 1
        model.square += 1
        model.get_input_embeddings().weight += 1
    assert torch.equal(model.again, model.whole)
    assert torch.equal(model.turned, model.square.t())
    assert torch.equal(model.part, model.get_input_embeddings().weight[2:5])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells what is mapped by /proc")
@pytest.mark.parametrize("lora", [None, Lora(4, 8, 0.0, ("all-linear",))], ids=["full", "lora"])
def test_a_file_of_weights_is_left_once_layers_are_fast(tmp_path: Path, lora: Lora | None) -> None:
    twin("llama").save_pretrained(tmp_path)
    model = adapt(AutoModelForCausalLM.from_pretrained(tmp_path), lora, seed=1).model
    (pack,) = build_packs(rows(), 10_000)
    plain = PackReader(model).forward(pack)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()  # else there is nothing to be shown here
    assert speed_up(model).layers
    torch.testing.assert_close(PackReader(model).forward(pack), plain, rtol=1e-4, atol=1e-4)
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def by_rows(fast: bool, weight_decay: float = 0.0) -> Engine:
    model, parameters = trained("llama", torch.float32, lora=None)
    if fast:
        speed_up(model)
    return Engine(PackReader(model), parameters, nll, weight_decay=weight_decay)


def some_steps(engine: Engine, steps: range) -> None:
    """Take steps of which each looks up other words."""
    for number in steps:
        chosen = rows()[number % 3 :: 3]
        engine.forward_backward_all(build_packs(chosen, 40))
        engine.optim_step(1e-2)


def test_an_embedding_learns_by_rows_what_it_learns_as_a_whole() -> None:
    """The same gradients go to AdamW of the whole embedding, as torch has it, and to that of its rows: the same bits come out."""
    engine = by_rows(fast=True)
    ((name, learned),) = engine.rows.items()
    whole = torch.nn.Parameter(learned.weight.detach().clone())
    optimizer = torch.optim.AdamW([whole], lr=0.0, weight_decay=0.0, fused=True)
    update = learned.update

    def both(lr: float, divisor: Tensor, *rest: Any) -> None:
        whole.grad = spread(learned.gradient.ids, learned.gradient.values, len(whole))
        optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        update(lr, divisor, *rest)

    learned.update = both  # type: ignore[method-assign]
    some_steps(engine, range(6))
    assert 0 < len(learned.state()["rows"]) < len(whole)
    assert torch.equal(engine.trainable[name], whole)


def test_an_embedding_that_decays_or_is_tied_learns_as_a_whole() -> None:
    assert by_rows(fast=True).rows
    assert not by_rows(fast=True, weight_decay=0.1).rows
    assert not by_rows(fast=False).rows
    model, parameters = trained("gemma2", torch.float32, lora=None)
    speed_up(model)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not Engine(PackReader(model), parameters, nll).rows


@pytest.mark.parametrize(("fast", "later"), [(True, True), (True, False), (False, True)])
def test_what_rows_have_learned_goes_on_from_its_state(fast: bool, later: bool) -> None:
    """By rows or as a whole, whichever wrote the state: bit for bit where both are alike, up to rounding where not."""
    straight, first, second = by_rows(fast), by_rows(fast), by_rows(later)
    some_steps(straight, range(6))
    some_steps(first, range(3))
    second.load_state(*first.state())
    some_steps(second, range(3, 6))
    for name, parameter in straight.trainable.items():
        if fast == later:
            assert torch.equal(parameter, second.trainable[name])
        torch.testing.assert_close(parameter, second.trainable[name], rtol=1e-3, atol=1e-4)


def test_an_engine_after_one_by_rows_learns_the_whole_and_no_gradient_is_left_aside() -> None:
    first = by_rows(fast=True)
    (name,) = first.rows
    second = Engine(first.reader, first.trainable, nll, weight_decay=0.1)
    before = first.trainable[name].detach().clone()
    some_steps(second, range(1))
    moved = (second.trainable[name] / before - 1).abs()
    assert float(moved.max(1).values.gt(1e-2).sum()) > 0  # more than decay alone
    third = by_rows(fast=True)
    third.trainable[name].grad = torch.ones_like(before)
    with pytest.raises(RuntimeError, match="gradient of the whole"):
        some_steps(third, range(1))


def test_rows_that_were_rehearsed_have_learned_nothing() -> None:
    rehearsed, fresh = by_rows(fast=True), by_rows(fast=True)
    rehearsed.rehearse(build_packs(rows(), 1000)[0])
    rehearsed.rehearse_optim_step(words=60)
    for engine in (rehearsed, fresh):
        some_steps(engine, range(2))
    assert all(torch.equal(rehearsed.trainable[name], fresh.trainable[name]) for name in fresh.trainable)


@pytest.mark.parametrize("shapes", [[(3000, 1001), (7,), (0, 5)], [(1,)], []])
def test_the_norm_of_all_gradients_is_that_in_double_precision(shapes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(shape).mul_(torch.rand(shape).mul_(20).sub_(15).exp_()) for shape in shapes]
    gradients += [gradient.t() for gradient in gradients if gradient.ndim == 2]
    exact = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    found = [float(total_norm(gradients)) for _ in range(20)]
    assert found[0] == pytest.approx(exact, rel=3e-6)
    assert len(set(found)) == 1
    alike = [torch.full((12, 1000, 1000), 0.1)]  # the worst case: all errors point one way
    assert float(total_norm(alike)) == pytest.approx(math.sqrt(12e6) * 0.1, rel=3e-5)
    assert float(total_norm([gradient.double() for gradient in gradients])) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e20, 2e19])
def test_a_norm_that_is_past_its_type_is_never_finite_and_wrong(bad: float) -> None:
    gradients = [torch.ones(50, 40), torch.zeros(3)]
    gradients[0][31, 7] = bad
    assert not math.isfinite(total_norm(gradients))
