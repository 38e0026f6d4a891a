"""Heads for tokens, for several classes, for numbers, for texts that belong together, for images: packed = plain, value and gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from headstart.data.images import Look, load_pixels
from headstart.data.labels import Labels
from headstart.data.read import Where
from headstart.data.segments import Example, Image, Segment
from headstart.engine.engine import Engine
from headstart.engine.forward import EmbeddingReader, ImageReader, LabelReader, TokenReader
from headstart.evaluate.metrics import tell
from headstart.evaluate.score import compare_rows, embed_rows, output_rows, tag_rows
from headstart.models import efficientnet
from headstart.models.adapt import Lora, adapt
from headstart.models.attention import register, use_attention
from headstart.models.load import load_model
from headstart.models.save import save_result
from headstart.models.source import find_model
from headstart.objectives.embeddings import embedding_loss
from headstart.objectives.labels import class_losses, number_losses, several_losses, summed
from headstart.objectives.tokens import nll
from tests.laws.test_labels import _ENCODER
from tests.tokens import make_tokenizer
from tests.twins import _SMALL

CLASSES = 5
_EXTRA = {
    "mistral": {"sliding_window": 6},
    "electra": {"embedding_size": 32},
    "modernbert": {"local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SMALL),
    "qwen2": ("Qwen2Config", _SMALL),
    "mistral": ("MistralConfig", _SMALL),
    "bert": ("BertConfig", _ENCODER),
    "electra": ("ElectraConfig", _ENCODER),
    "roberta": ("RobertaConfig", _ENCODER),
    "modernbert": ("ModernBertConfig", _ENCODER),
}
TAGGERS = list(CONFIGS)
MASKED = ["bert", "electra", "roberta", "modernbert"]


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()
    efficientnet.register()


def twin(name: str, auto: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    torch.manual_seed(0)
    shape, values = CONFIGS[name]
    config = getattr(transformers, shape)(**values, **_EXTRA.get(name, {}), **more)
    for key in list(vars(config)):
        if "dropout" in key and isinstance(getattr(config, key), float):
            setattr(config, key, dropout)
    config.classifier_dropout = dropout  # where it is absent, heads for tokens take a tenth
    model = getattr(transformers, auto).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def rows(make: Callable[[np.ndarray[Any, Any], np.random.Generator], Any], count: int = 7) -> list[Example]:
    chance = np.random.default_rng(0)
    shared = chance.integers(3, 97, 16)
    made = []
    for line in range(count):
        ids = np.concatenate([shared[: 8 * (line % 3)], chance.integers(3, 97, 3 + line)]).astype(np.int32)
        made.append(Example(Where("f", line), *make(ids, chance)))
    return made


def at_tokens(limit: int) -> Callable[..., Any]:
    """Return what makes a segment whose chosen tokens are held against something that stands at them."""

    def make(ids: Any, chance: Any) -> Any:
        weights = (chance.random(len(ids)) < 0.6).astype(np.float32) * 1.5
        weights[0] = 1.0
        return ((Segment(ids, weights, targets=chance.integers(0, limit, len(ids)).astype(np.int32)),),)

    return make


def check_gradients(model: Any, ours: dict[str, Tensor]) -> None:
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            error = (ours[key] - parameter.grad).abs().max() / parameter.grad.abs().max().clamp_min(1e-9)
            assert float(error) < 1e-5, key


def gradients(model: Any) -> dict[str, Tensor]:
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("name", "auto"),
    [(n, "AutoModelForTokenClassification") for n in TAGGERS] + [(n, "AutoModelForMaskedLM") for n in MASKED],
)
def test_what_is_told_of_tokens_is_that_of_the_plain_model(name: str, auto: str) -> None:
    tags = "Token" in auto
    model = twin(name, auto, **({"num_labels": CLASSES} if tags else {}))
    examples = rows(at_tokens(CLASSES if tags else 97))
    reader = TokenReader(model)
    engine = Engine(reader, dict(model.named_parameters()), nll)
    packs = reader.build_packs(examples, 60)
    assert (len(packs) < len(examples)) == reader.packs
    total = engine.forward_backward_all(packs)
    ours = gradients(model)
    found = tag_rows(reader, examples, 60) if tags else None
    use_attention(model, packed=False)
    model.eval()
    loss = 0.0
    for number, row in enumerate(examples):
        segment = row.segments[0]
        ids = torch.from_numpy(segment.ids.astype(np.int64))[None]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        picked = logits.log_softmax(-1)[torch.arange(ids.shape[1]), torch.from_numpy(segment.targets).long()]  # type: ignore[arg-type]
        part = -(picked * torch.from_numpy(segment.weights)).sum()
        part.backward()
        loss += float(part.detach())
        if found:
            best = logits.argmax(-1).numpy()[segment.weights > 0]
            assert found[number][0].tolist() == best.tolist()
    assert total.loss == pytest.approx(loss, rel=1e-6)
    assert total.count == pytest.approx(sum(float(row.segments[0].weights.sum()) for row in examples))
    check_gradients(model, ours)


@pytest.mark.parametrize("name", ["bert", "electra", "roberta", "llama", "qwen2", "mistral"])
@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_several_classes_and_numbers_are_those_of_the_plain_model(name: str, task: str) -> None:
    problem = {"multilabel": "multi_label_classification", "regression": "regression"}[task]
    model = twin(name, "AutoModelForSequenceClassification", num_labels=3, problem_type=problem)

    def make(ids: Any, chance: Any) -> Any:
        label = chance.random(3) < 0.5 if task == "multilabel" else chance.normal(size=3)
        return (Segment(ids, np.zeros(len(ids), np.float32)),), "", label.astype(np.float32)

    examples = rows(make)
    losses = several_losses if task == "multilabel" else number_losses
    reader = LabelReader(model, losses)
    engine = Engine(reader, dict(model.named_parameters()), summed(losses))
    total = engine.forward_backward_all(reader.build_packs(examples, 60))
    ours = gradients(model)
    use_attention(model, packed=False)
    model.eval()
    loss = 0.0
    for row in examples:
        ids = torch.from_numpy(row.segments[0].ids.astype(np.int64))[None]
        # The mean over a row's classes or numbers, as transformers has it for one row.
        part = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor(row.label)[None].double()
        ).loss
        part.backward()
        loss += float(part.detach())
    assert (total.loss, total.count) == (pytest.approx(loss, rel=1e-6), len(examples))
    check_gradients(model, ours)


def test_weights_of_classes_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    truth = ["a"] * 6 + ["b"] * 3 + ["c"]
    labels = Labels("classification", ("a", "b", "c"), (6, 3, 1))
    theirs = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=truth)
    assert labels.class_weights() == pytest.approx(theirs.tolist())
    logits, numbers = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, -1])
    total = summed(class_losses, torch.tensor(labels.class_weights()))(logits, numbers)
    weights = torch.tensor(theirs, dtype=torch.float32)
    reference = torch.nn.functional.cross_entropy(logits[:4], numbers[:4], weight=weights)
    assert float(total.loss / total.count) == pytest.approx(float(reference), rel=1e-5)


# --- texts that belong together ---


def related(scored: bool, texts: int = 2) -> list[Example]:
    def make(ids: Any, chance: Any) -> Any:
        others = [ids, *(chance.integers(3, 97, 4 + n).astype(np.int32) for n in range(texts - 1))]
        score = np.array([chance.random() if scored else np.nan], np.float32)
        return tuple(Segment(i, np.zeros(len(i), np.float32)) for i in others), "", score

    return rows(make)


@pytest.mark.parametrize("name", ["bert", "electra", "roberta", "llama"])
@pytest.mark.parametrize(("scored", "texts"), [(False, 2), (False, 3), (True, 2)])
def test_embeddings_learn_the_same_however_they_are_packed(name: str, scored: bool, texts: int) -> None:
    model = twin(name, "AutoModel")
    examples = related(scored, texts)
    reader = EmbeddingReader(model)
    engine = Engine(reader, dict(model.named_parameters()), embedding_loss, joint=True)
    packs = reader.build_packs(examples, 50)
    assert len(packs) > 1
    total = engine.forward_backward_all(packs)
    ours = gradients(model)
    embedded = embed_rows(reader, examples, 50)
    use_attention(model, packed=False)
    model.eval()
    vectors: list[list[Tensor]] = []
    for row in examples:
        vectors.append([])
        for segment in row.segments:
            ids = torch.from_numpy(segment.ids.astype(np.int64))[None]
            hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
            pooled = hidden[-1] if name == "llama" else hidden.mean(0)
            vectors[-1].append(pooled / pooled.norm())
    assert embedded == pytest.approx(torch.stack([v for row in vectors for v in row]).detach().numpy(), abs=1e-6)
    columns = [torch.stack([row[n] for row in vectors]) for n in range(texts)]
    if scored:
        wanted = torch.tensor([float(row.label[0]) for row in examples], dtype=torch.float64)  # type: ignore[index]
        loss = (((columns[0] * columns[1]).sum(-1) - wanted) ** 2).sum()
    else:
        logits = 20 * columns[0] @ torch.cat(columns[1:]).T
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(examples)), reduction="sum")
    loss.backward()
    assert total.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    check_gradients(model, ours)
    if not scored and texts == 2:
        near = compare_rows(reader, examples, 50)
        table = (columns[0] @ columns[1].T).detach().numpy()
        assert near.ranks.tolist() == [int((row > row[n]).sum()) + 1 for n, row in enumerate(table)]
        assert near.losses.sum() == pytest.approx(total.loss, rel=1e-6)


def test_the_second_pass_sees_the_dropout_of_the_first() -> None:
    """What GradCache gives equals the gradient of one graph over all packs, dropout and all."""
    model = twin("bert", "AutoModel", dropout=0.2)
    # A text and itself: told apart by dropout alone, as SimCSE does.
    twice = [Example(e.where, (e.segments[0], e.segments[0]), "", e.label) for e in related(False)]
    reader = EmbeddingReader(model)
    engine = Engine(reader, dict(model.named_parameters()), embedding_loss, joint=True)
    packs = reader.build_packs(twice, 60)
    assert len(packs) > 1
    torch.manual_seed(3)
    total = engine.forward_backward_all(packs)
    after = torch.get_rng_state()
    ours = gradients(model)
    torch.manual_seed(3)
    reader.train()
    outputs = torch.cat([reader.outputs(pack) for pack in packs])
    reference = embedding_loss(outputs, torch.cat([reader.targets(pack) for pack in packs]))
    reference.loss.backward()  # type: ignore[no-untyped-call]
    assert total.loss == pytest.approx(float(reference.loss.detach()), rel=1e-9)
    assert torch.equal(after, torch.get_rng_state())
    check_gradients(model, ours)


# --- images ---

LOOK = Look(32, 32, (0.5,) * 3, (0.25,) * 3)
TINY = {"stem": 8, "stages": [[1, 8, 1, 1, 3], [2, 12, 2, 2, 5]], "hidden_size": 16, "image_size": 32, "dropout": 0.0}


@pytest.fixture
def pictures(tmp_path: Path) -> list[Example]:
    """Return images of several sizes."""
    from PIL import Image as Pillow

    chance = np.random.default_rng(0)
    made = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        Pillow.fromarray(chance.integers(0, 256, (20 + 7 * number, 40, 3), np.uint8)).save(path)
        segment = Segment(np.zeros(LOOK.patches, np.int32), np.zeros(LOOK.patches, np.float32))
        made.append(Example(Where(str(path), 1), (segment,), label=number % 3, image=Image(str(path))))
    return made


@pytest.mark.parametrize("name", ["efficientnet", "vit", "resnet"])
def test_images_give_the_same_however_they_are_packed(name: str, pictures: list[Example]) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config: Any = {
        "efficientnet": lambda: efficientnet.EfficientNetLiteConfig(**TINY, num_labels=3),
        "vit": lambda: transformers.ViTConfig(**small, image_size=32, patch_size=8, num_labels=3),
        "resnet": lambda: transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3
        ),
    }[name]()
    model = transformers.AutoModelForImageClassification.from_config(config).double()
    reader = ImageReader(model, look=LOOK)
    engine = Engine(reader, dict(model.named_parameters()), summed(class_losses))
    totals, found = [], []
    for budget in (1, 8, 1000):  # one image, two images, all images a pack
        packs = reader.build_packs(pictures, budget)
        totals.append(engine.forward_backward_all(packs).loss)
        found.append(gradients(model))
    assert len(reader.build_packs(pictures, 8)) == 3
    assert totals == pytest.approx([totals[0]] * 3)
    pixels = torch.from_numpy(np.stack([load_pixels(e.image, LOOK) for e in pictures if e.image])).double()
    reader.train()
    reference = torch.nn.functional.cross_entropy(
        model(pixel_values=pixels).logits, torch.tensor([e.label for e in pictures]), reduction="sum"
    )
    assert totals[0] == pytest.approx(float(reference.detach()))
    for other in found[1:]:
        for key, gradient in found[0].items():
            assert torch.allclose(other[key], gradient, rtol=1e-7, atol=1e-9), key


def test_the_networks_shapes_are_those_of_lite0() -> None:
    model = efficientnet.EfficientNetLiteForImageClassification(efficientnet.EfficientNetLiteConfig(num_labels=1000))
    assert sum(p.numel() for p in model.parameters()) == 4_652_008  # Tan and Le's EfficientNet-Lite0
    assert len(model._blocks) == 16
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 224, 224)).logits.shape == (1, 1000)


# --- saved = in memory, by the plain library ---


@pytest.mark.parametrize("lora", [None, Lora(4, 8.0, 0.0, ("all-linear",))], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_tagger_is_loaded_by_plain_transformers(name: str, lora: Lora | None, tmp_path: Path) -> None:
    labels = Labels("tagging", ("O", "B-x", "I-x"), (9, 2, 1))
    model = twin(name, "AutoModelForTokenClassification", dtype=torch.float32, num_labels=3)
    model.config.id2label = dict(enumerate(labels.names))
    adapted = adapt(model, lora, 0, task=None)
    assert any("classifier" in key or "score" in key for key in adapted.trainable())
    assert bool(adapted.modules) == bool(lora)
    reader = TokenReader(adapted.model)
    engine = Engine(reader, adapted.trainable(), nll)
    examples = rows(at_tokens(3))
    engine.forward_backward_all(reader.build_packs(examples, 1000))
    engine.optim_step(1e-2)
    found = tag_rows(reader, examples, 1000)
    save_result(adapted.saved, make_tokenizer("chatml"), (), tmp_path / "model", labels=labels)
    loaded = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "model")
    assert loaded.config.id2label == {0: "O", 1: "B-x", 2: "I-x"}
    for row, (best, sure) in zip(examples, found, strict=True):
        ids = torch.from_numpy(row.segments[0].ids.astype(np.int64))[None]
        with torch.no_grad():
            again = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].softmax(-1)
        chosen = torch.from_numpy(np.flatnonzero(row.segments[0].weights))
        assert again[chosen].argmax(-1).tolist() == best.tolist()
        assert again[chosen].amax(-1).numpy() == pytest.approx(sure, abs=1e-4)
    kept = load_model(find_model(str(tmp_path / "model")), "cpu", task="tagging", labels=labels)
    assert not kept.fresh


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_saved_model_gives_numbers_in_their_own_units(name: str, tmp_path: Path) -> None:
    labels = Labels("regression", ("price", "age"), mean=(250.0, -3.0), spread=(40.0, 0.5))
    model = twin(
        name, "AutoModelForSequenceClassification", dtype=torch.float32, num_labels=2, problem_type="regression"
    )

    def make(ids: Any, _: Any) -> Any:
        return (Segment(ids, np.zeros(len(ids), np.float32)),), "", labels.encode((260.0, -2.0))

    examples = rows(make)
    assert examples[0].label == pytest.approx([0.25, 2.0])
    reader = LabelReader(model, number_losses)
    outputs = output_rows(reader, examples, 1000)
    told = [row.found for row in tell(outputs, labels)]
    save_result(model, make_tokenizer("chatml"), (), tmp_path / "model", labels=labels)
    assert output_rows(reader, examples, 1000) == pytest.approx(outputs)  # the model in memory is as it was
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    again = Labels.from_json(loaded.config.headstart_labels)
    # A head with a bias gives the units itself; one without leaves them to the config.
    assert again.mean == ((0.0, 0.0) if name == "bert" else labels.mean)
    for row, values in zip(examples, told, strict=True):
        ids = torch.from_numpy(row.segments[0].ids.astype(np.int64))[None]
        with torch.no_grad():
            plain = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert tell(plain.double().numpy(), again)[0].found == pytest.approx(values, rel=1e-4)


def test_an_image_model_carries_its_own_code(pictures: list[Example], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = efficientnet.EfficientNetLiteForImageClassification(
        efficientnet.EfficientNetLiteConfig(**TINY, num_labels=3)
    )
    reader = ImageReader(model, look=LOOK)
    outputs = output_rows(reader, pictures, 1000)
    labels = Labels("images", ("a", "b", "c"), (1, 1, 1))
    beside = {"preprocessor_config.json": LOOK.to_json()}
    save_result(model, None, (), tmp_path / "model", labels=labels, beside=beside)
    assert (tmp_path / "model" / "efficientnet.py").exists()
    assert Look.from_json(LOOK.to_json(), 1) == LOOK
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    again = output_rows(ImageReader(loaded, look=LOOK), pictures, 1000)
    assert again == pytest.approx(outputs, abs=1e-5)


@pytest.mark.parametrize("name", MASKED)
def test_an_adapter_merged_is_the_adapter_for_masked_tokens(name: str, tmp_path: Path) -> None:
    """A head that shares its matrix with the embeddings has no adapter: merged, it would change the embeddings."""
    model = twin(name, "AutoModelForMaskedLM", dtype=torch.float32, tie_word_embeddings=True)
    adapted = adapt(model, Lora(4, 8.0, 0.0, ("all-linear",)), 0, task=None)
    with torch.no_grad():
        for key, parameter in adapted.model.named_parameters():
            if "lora_B" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    assert adapted.modules
    ids = torch.arange(3, 12)[None]
    use_attention(adapted.model, packed=False)
    adapted.model.eval()
    with torch.no_grad():
        ours = adapted.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        save_result(adapted.saved, make_tokenizer("chatml"), (), tmp_path / "model")
        loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
        theirs = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert float((ours - theirs).abs().max()) < 1e-4 * float(ours.abs().max())


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_a_template_brings_are_learned_in_the_head_too(tied: bool) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SMALL, tie_word_embeddings=tied))
    adapted = adapt(model, Lora(4, 8.0, 0.0, ("all-linear",), (5, 7)), 0)
    rows_of = [key for key in adapted.trainable() if "trainable_tokens" in key]
    assert len(rows_of) == (1 if tied else 2), rows_of


def test_a_model_that_says_how_it_pools_is_pooled_so(tmp_path: Path) -> None:
    twin("bert", "AutoModel", dtype=torch.float32).save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    model = load_model(find_model(str(tmp_path)), "cpu", task="embedding").model
    examples = related(False)
    ids = torch.from_numpy(examples[0].segments[0].ids.astype(np.int64))[None]
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0, 0]
    found = embed_rows(EmbeddingReader(model), examples, 1000)[0]
    assert found == pytest.approx((first / first.norm()).numpy(), abs=1e-5)
