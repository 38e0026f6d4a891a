"""A layer as one call of the kernels = the same in parts, bit for bit; and its adapters = their formula in double precision."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from headstart.engine.forward import PackReader
from headstart.engine.loop import _free
from headstart.engine.memory import trace
from headstart.evaluate.generate import generate
from headstart.machine import out_of_memory
from headstart.models.attention import Forest, register, run_decoder
from headstart.models.fast import let_go, speed_up
from headstart.models.linear import Part, Product
from headstart.models.native import Native
from headstart.models.whole import Spare, Whole
from headstart.tune import _Session
from tests.conftest import example
from tests.laws.test_native import kernels, needs_compiler, needs_wide_registers

pytestmark = [needs_compiler, needs_wide_registers]

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
MODELS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}  # the second has biases
FORESTS = {
    "a row": ([70], [-1], [*range(70)]),
    "a tree": ([40, 30, 9, 5], [-1, 0, 0, -1], [*range(40), *range(40, 70), *range(40, 49), *range(5)]),
}
Gradients = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def build(name: str = "llama", targets: Any = "all-linear", **changes: Any) -> Any:
    """Return a model with adapters, of which B isn't zero."""
    register()
    torch.manual_seed(0)
    config, model = MODELS[name]
    lora = LoraConfig(r=16, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model(config(**{**SIZES, **changes})), lora)
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key or "bias" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.get_base_model().train()


def steps(model: Any, forest: str, packs: int = 2) -> tuple[Tensor, Gradients]:
    """Return what some packs give, and their gradients added up."""
    lengths, parents, depths = FORESTS[forest]
    model.zero_grad(set_to_none=True)
    positions, found = torch.tensor(depths), []
    for pack in range(packs):
        ids = torch.arange(len(depths)) * (7 + pack) % 64
        found.append(run_decoder(model, ids, positions, Forest(lengths, parents, positions)))
        found[-1].square().sum().backward()
    return torch.stack(found).detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def in_parts(model: Any) -> None:
    for layer in model.model.layers:
        layer.forward = dataclasses.replace(layer.forward, whole=None)


def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by what is run as a whole."""
    called: list[str] = []
    for name in ("layer", "layer_back"):
        plain = getattr(Native, name)
        monkeypatch.setattr(Native, name, lambda *args, n=name, f=plain: (called.append(n), f(*args))[1])
    return called


@pytest.mark.parametrize("forest", FORESTS)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], ["up_proj"]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_layer_is_the_same_as_its_parts(
    name: str, targets: Any, forest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, targets)
    double = copy.deepcopy(model).double()
    speed_up(model)
    called = runs(monkeypatch)
    states, gradients = steps(model, forest)
    assert called.count("layer") == called.count("layer_back") == 6  # 3 layers, 2 packs
    called.clear()
    in_parts(model)
    others, wanted = steps(model, forest)
    assert not called
    assert torch.equal(states, others)
    assert list(gradients) == list(wanted)
    assert all(torch.equal(gradients[key], wanted[key]) for key in wanted)
    exact, exactly = steps(double, forest)
    torch.testing.assert_close(states.double(), exact, rtol=1e-4, atol=1e-5)
    assert list(exactly) == list(wanted)
    for key, value in exactly.items():
        torch.testing.assert_close(gradients[key].double(), value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))


def test_after_an_update_a_whole_layer_reads_what_changed() -> None:
    model = build()
    speed_up(model)
    steps(model, "a tree")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.sub_(parameter.grad, alpha=0.1)
    states, gradients = steps(model, "a tree")
    in_parts(model)
    others, wanted = steps(model, "a tree")
    assert torch.equal(states, others)
    assert all(torch.equal(gradients[key], wanted[key]) for key in wanted)


def thaw_weights(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.base_layer.weight.requires_grad_(True)


def thaw_norms(model: Any) -> None:
    model.model.layers[1].input_layernorm.weight.requires_grad_(True)


def thaw_biases(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.base_layer.bias.requires_grad_(True)


@pytest.mark.parametrize("thaw", [thaw_weights, thaw_norms, thaw_biases])
def test_a_layer_of_which_more_trains_than_adapters_runs_in_parts(thaw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen2")
    speed_up(model)
    called = runs(monkeypatch)
    steps(model, "a row")
    assert called.count("layer_back") == 6
    called.clear()
    thaw(model)
    _, gradients = steps(model, "a row")
    assert called.count("layer_back") == 4
    in_parts(model)
    _, wanted = steps(model, "a row")
    assert gradients.keys() == wanted.keys()
    assert all(torch.equal(gradients[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    "changes", [{"attention_dropout": 0.5}, {"hidden_act": "gelu"}, {"intermediate_size": 100}], ids=str
)
def test_a_layer_that_computes_anything_else_runs_in_parts(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(**changes)
    speed_up(model)
    called = runs(monkeypatch)
    steps(model, "a row")
    assert not called


def test_a_pack_that_the_kernels_do_not_take_runs_in_parts() -> None:
    model = build()
    speed_up(model)
    layer, positions = model.model.layers[0].forward, torch.arange(70)
    forest, x = Forest([70], [-1], positions), torch.randn(70, 64)
    cos, sin = torch.randn(1, 70, 16), torch.randn(1, 70, 16)
    assert layer._run_whole(x, forest, (cos, sin)) is not None
    assert layer._run_whole(torch.randn(70, 96), forest, (cos, sin)) is None
    assert layer._run_whole(x.double(), forest, (cos, sin)) is None
    assert layer._run_whole(x, forest, (torch.randn(1, 70, 34), torch.randn(1, 70, 34))) is None  # more than a head has
    with torch.autocast("cpu", torch.bfloat16):
        assert layer._run_whole(x, forest, (cos, sin)) is None


def offset_norm(columns: Any, out: Any, mlp: Any, before: Any, after: Any, heads: Any) -> Any:
    return columns, out, mlp, dataclasses.replace(before, offset=1.0), after, heads


def narrow_norm(columns: Any, out: Any, mlp: Any, before: Any, after: Any, heads: Any) -> Any:
    narrow = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    return columns, out, mlp, before, dataclasses.replace(after, weight=narrow), heads


def other_heads(columns: Any, out: Any, mlp: Any, before: Any, after: Any, heads: Any) -> Any:
    return columns, out, mlp, before, after, dataclasses.replace(heads, groups=1)


def biased_out(columns: Any, out: Any, mlp: Any, before: Any, after: Any, heads: Any) -> Any:
    part = dataclasses.replace(out.parts[0], bias=torch.zeros(64))
    return columns, Product([part]), mlp, before, after, heads


def tied_adapters(columns: Any, out: Any, mlp: Any, before: Any, after: Any, heads: Any) -> Any:
    part = dataclasses.replace(out.parts[0], a=columns.parts[0].a)
    return columns, Product([part]), mlp, before, after, heads


def wide_down(columns: Any, out: Any, mlp: Any, before: Any, after: Any, heads: Any) -> Any:
    down = Product([Part(torch.randn(64, 192), None)])
    return columns, out, dataclasses.replace(mlp, down=down), before, after, heads


@pytest.mark.parametrize("change", [offset_norm, narrow_norm, other_heads, biased_out, tied_adapters, wide_down])
def test_a_layer_that_is_put_together_otherwise_does_not_fit(change: Any) -> None:
    model = build()
    speed_up(model)
    parts = model.model.layers[0].forward.whole._parts
    assert Whole(*parts).fits(kernels())
    assert not Whole(*change(*parts)).fits(kernels())


def test_a_copy_has_gradients_of_its_own() -> None:
    model = build()
    speed_up(model)
    _, wanted = steps(model, "a tree")
    kept = {key: value.clone() for key, value in wanted.items()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    steps(other, "a tree")
    _, again = steps(model, "a tree")
    assert all(torch.equal(again[key], kept[key]) for key in kept)


@pytest.mark.parametrize("rows", [1, 70, 150])
@pytest.mark.parametrize("ranks", [(16,), (32, 16), (16, 0, 48)], ids=str)
def test_adapters_equal_their_formula(ranks: tuple[int, ...], rows: int) -> None:
    torch.manual_seed(0)
    depth, widths = 208, (144, 48, 80)[: len(ranks)]
    parts = []
    for rank, width in zip(ranks, widths, strict=True):
        a, b = (torch.nn.Parameter(torch.randn(m, n) / n**0.5) for m, n in ((rank, depth), (width, rank or 1)))
        weight = torch.randn(width, depth) / depth**0.5
        parts.append(Part(weight, None, *((a, b) if rank else (None, None)), scale=1.0 + len(parts)))
    product, scale = Product(parts), 3.0
    x, sums = torch.randn(rows, depth), torch.randn(rows, sum(widths))
    gradient = torch.randn(rows, sum(widths))
    with torch.no_grad():
        found, narrow = product.add_to(sums, x, scale)
        d_x, back = product.backward(gradient)
        for _ in range(2):  # the second time what is there is added to
            product.accumulate(gradient, x, narrow, back)
    own = [p for part in parts for p in (part.a, part.b) if p is not None]
    inputs = x.double().requires_grad_(True)
    twins = [p.detach().double().requires_grad_(True) for p in own]
    left = iter(twins)
    made = [inputs @ part.weight.double().t() for part in parts]
    for number, part in enumerate(parts):
        if part.a is not None:
            a, b = next(left), next(left)
            made[number] = made[number] + part.scale * (inputs @ a.t() @ b.t())
    theirs = torch.cat(made, 1)
    torch.testing.assert_close(found.double(), sums.double() + scale * theirs.detach(), rtol=1e-5, atol=2e-4)
    wanted = torch.autograd.grad(theirs, [inputs, *twins], gradient.double())
    torch.testing.assert_close(d_x.double(), wanted[0], rtol=1e-5, atol=2e-4)
    for parameter, exact in zip(own, wanted[1:], strict=True):
        torch.testing.assert_close(parameter.grad.double(), 2 * exact, rtol=1e-5, atol=5e-4)


def test_several_packs_go_through_before_their_gradients_come_back() -> None:
    model = build()
    speed_up(model)
    wanted = {}
    for forest in FORESTS:
        wanted[forest] = {key: value.clone() for key, value in steps(model, forest, packs=1)[1].items()}
    outputs = {}
    for forest, (lengths, parents, depths) in FORESTS.items():
        ids, positions = torch.arange(len(depths)) * 7 % 64, torch.tensor(depths)
        outputs[forest] = run_decoder(model, ids, positions, Forest(lengths, parents, positions))
    with torch.no_grad():  # what is laid of weights is laid anew then
        model.model.layers[0].self_attn.o_proj.base_layer.weight.mul_(1)
    layers = [layer.forward for layer in model.model.layers]
    in_parts(model)
    steps(model, "a row", packs=1)
    for layer, forward in zip(model.model.layers, layers, strict=True):
        layer.forward = forward
    for forest, output in outputs.items():
        model.zero_grad(set_to_none=True)
        output.square().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == wanted[forest].keys()
        assert all(torch.equal(found[key], wanted[forest][key]) for key in found)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "layers.1."])
def test_adapters_that_do_not_train_are_left(frozen: str) -> None:
    model = build()
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    speed_up(model)
    states, gradients = steps(model, "a tree")
    assert gradients
    assert not any(frozen in name for name in gradients)
    in_parts(model)
    others, wanted = steps(model, "a tree")
    assert torch.equal(states, others)
    assert gradients.keys() == wanted.keys()
    assert all(torch.equal(gradients[key], wanted[key]) for key in wanted)


def test_a_weight_with_gaps_between_its_rows_runs_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    speed_up(model)
    _, wanted = steps(model, "a row")
    wanted = {key: value.clone() for key, value in wanted.items()}
    weight = model.model.layers[1].mlp.down_proj.base_layer.weight
    weight.data = torch.cat([weight.data, weight.data], 1)[:, : weight.shape[1]]
    called = runs(monkeypatch)
    _, gradients = steps(model, "a row")
    assert called.count("layer_back") == 4
    for key, value in wanted.items():
        torch.testing.assert_close(gradients[key], value, rtol=1e-3, atol=1e-4)


def test_no_weight_is_held_where_it_lay_before() -> None:
    model = build()
    weights = [layer.mlp.down_proj.base_layer.weight for layer in model.model.layers]
    gone: list[int] = []
    for weight in weights:
        weakref.finalize(weight.untyped_storage(), gone.append, weight.data_ptr())
    before = {weight.data_ptr() for weight in weights}
    speed_up(model)
    positions = torch.arange(70)
    chosen = torch.tensor([3, 69])  # of which alone the last layer computes what is behind its attention
    run_decoder(model, positions % 64, positions, Forest([70], [-1], positions, chosen))
    gc.collect()
    assert before == set(gone)


def test_what_a_pack_fills_is_seen_whatever_its_size() -> None:
    model = build()
    speed_up(model)

    def work(tokens: int) -> None:
        model.zero_grad(set_to_none=True)
        positions = torch.arange(tokens)
        run_decoder(model, positions % 64, positions, Forest([tokens], [-1], positions)).sum().backward()

    work(64)  # after which nothing of the model is laid any more
    traces = [trace(lambda tokens=tokens: work(tokens)) for tokens in (64, 128, 256)]
    assert traces[0].like(traces[1])
    assert traces[0].like(traces[2])


def test_spare_memory_is_used_anew_once_nothing_holds_it() -> None:
    spare, like = Spare(), torch.empty(0)
    first, second = spare.take(100, like), spare.take(100, like)
    places = [first.data_ptr(), second.data_ptr()]
    assert places[0] + 400 <= places[1] or places[1] + 400 <= places[0]
    first.fill_(1.0)
    view = first[50:]
    del first
    third = spare.take(100, like).fill_(3.0)  # a view still holds the first
    assert third.data_ptr() not in places
    assert view.eq(1.0).all()
    del view
    assert spare.take(90, like).data_ptr() == places[0]
    found = spare.take(107, like)  # what was asked for in steps of a quarter of a power of two
    assert found.data_ptr() == places[0]
    assert (len(found), found.dtype) == (107, torch.float32)
    del second, third, found
    sizes = {len(pages) for pages, _ in spare._free}
    large = spare.take(120, like)
    assert (sizes, spare._free) == ({4 * 107}, [])  # none of these is of use any more
    del large
    spare.let_go()
    assert spare._free == []


def test_memory_that_the_system_does_not_give_is_said_to_have_run_out() -> None:
    with pytest.raises(MemoryError, match="bytes: Cannot allocate memory") as caught:
        Spare().take(1 << 58, torch.empty(0))
    assert out_of_memory(caught.value)


def test_layers_keep_what_they_need_where_the_pack_before_kept_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    speed_up(model)
    places: list[int] = []
    plain = Native.layer

    def noted(native: Native, layer: Any, x: Tensor, output: Tensor, kept: Tensor, *works: Tensor) -> None:
        places.append(kept.data_ptr())
        plain(native, layer, x, output, kept, *works)

    monkeypatch.setattr(Native, "layer", noted)
    steps(model, "a tree", packs=1)
    steps(model, "a row", packs=1)
    assert len(set(places[:3])) == 3
    assert set(places[3:]) == set(places[:3])
    lengths, parents, depths = FORESTS["a row"]
    ids, positions = torch.arange(len(depths)) * 7 % 64, torch.tensor(depths)
    places.clear()
    output = run_decoder(model, ids, positions, Forest(lengths, parents, positions))
    other = run_decoder(model, ids, positions, Forest(lengths, parents, positions))
    assert len(set(places)) == 6  # two packs are on their way
    del output  # and one never goes back
    gc.collect()
    run_decoder(model, ids, positions, Forest(lengths, parents, positions))
    assert set(places[6:]) == set(places[:3])
    (spare,) = {layer.forward.whole.spare for layer in model.model.layers}
    del other
    assert len(spare._free) == 6
    with torch.no_grad():
        run_decoder(model, ids, positions, Forest(lengths, parents, positions))
    assert len(spare._free) == 6
    assert len(set(places[-3:])) == 1  # one layer is done before the next begins
    let_go(model)
    assert spare._free == []


def test_spare_memory_is_let_go_where_memory_runs_out_and_before_answers_are_written() -> None:
    model = build()
    speed_up(model)
    (spare,) = {layer.forward.whole.spare for layer in model.model.layers}
    reader = SimpleNamespace(model=model, device=torch.device("cpu"))
    held: list[int] = []

    def kept() -> int:
        steps(model, "a tree", packs=1)
        return len(spare._free)

    assert kept() == 3
    _free(SimpleNamespace(reader=reader))  # type: ignore[arg-type]
    assert spare._free == []

    def score(tokens: int, part: int) -> int:
        held.append(len(spare._free))
        if part == 1:
            raise MemoryError
        return tokens

    assert kept() == 3
    engine = SimpleNamespace(tokens_per_pack=64)
    job = SimpleNamespace(
        config=SimpleNamespace(settings=SimpleNamespace(engine=engine)), engine=SimpleNamespace(reader=reader)
    )
    session = SimpleNamespace(job=job, display=SimpleNamespace(warn=lambda _: None))
    assert _Session._within_memory(session, [example([1, 2, 3])], score) == 32  # type: ignore[arg-type]
    assert held == [3, 0]
    assert kept() == 3
    generate(model, [[3, 4, 5]], [63], [2], 64)
    assert len(spare._free) == 1  # that of a trial of its own, of a few tokens


def test_recomputed_layers_share_what_one_of_them_needs() -> None:
    model = build()
    speed_up(model)
    states, gradients = steps(model, "a tree")
    (spare,) = {layer.forward.whole.spare for layer in model.model.layers}
    spare.let_go()
    PackReader(model).recompute_activations()
    model.train()
    others, wanted = steps(model, "a tree")
    assert len(spare._free) == 1
    assert torch.equal(states, others)
    assert all(torch.equal(gradients[key], wanted[key]) for key in wanted)


def test_what_layers_keep_is_seen_though_they_used_it_before() -> None:
    model = build()
    speed_up(model)
    first = trace(lambda: steps(model, "a tree", packs=1))
    steps(model, "a tree")
    assert trace(lambda: steps(model, "a tree", packs=1)).peak() == first.peak()
