"""Rows of every task: found, read, refused with their place, and turned into what a model is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headstart.config import DataSettings
from headstart.data.encode import Encoder
from headstart.data.formats import Formatted, Named, format_rows
from headstart.data.images import PIXELS_MAX, Look, load_pixels, segment_pictures, vary_image
from headstart.data.labels import Labels, find_labels, label_notes, segment_labelled, segment_tagged
from headstart.data.masking import find_masking, segment_masked
from headstart.data.prepare import form_rows
from headstart.data.read import Row, Where, find_files, read
from headstart.data.records import Document, Labelled, Picture, Related, Tagged
from headstart.data.related import as_related, scale_scores, segment_related
from headstart.data.segments import Example, Image
from headstart.errors import DataError, ModelError, Problem
from tests.tokens import make_tokenizer


def form(*rows: dict[str, Any], **how: Any) -> Formatted:
    named = Named(**{key: how.pop(key) for key in list(how) if key in Named.__dataclass_fields__})
    return format_rows([Row(Where("f", n), row) for n, row in enumerate(rows, 1)], named=named, **how)


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> Encoder:
    from transformers import AutoTokenizer

    return Encoder(AutoTokenizer.from_pretrained(tiny_encoder))


# --- which task ---


@pytest.mark.parametrize(
    ("row", "how", "format", "task"),
    [
        ({"text": "a", "label": "x"}, {}, "labels", "classification"),
        ({"text": "a", "label": 3}, {}, "labels", "classification"),
        ({"text": "a", "label": 3}, {"task": "regression"}, "labels", "regression"),
        ({"text": "a", "label": "3.5"}, {}, "labels", "regression"),
        ({"text": "a", "label": ["x", "y"]}, {}, "labels", "multilabel"),
        ({"text": "a", "label": [0.5, 2]}, {}, "labels", "regression"),
        ({"text": "a", "rude": "0", "long": "1"}, {"label": ("rude", "long")}, "labels", "multilabel"),
        ({"text": "a", "price": "0", "age": "17"}, {"label": ("price", "age")}, "labels", "regression"),
        ({"premise": "a", "hypothesis": "b", "label": 1}, {}, "labels", "classification"),
        ({"sentence1": "a", "sentence2": "b", "score": 2.5}, {}, "labels", "regression"),
        ({"sentence1": "a", "sentence2": "b", "score": 2.5}, {"task": "embedding"}, "labels", "embedding"),
        ({"anchor": "a", "positive": "b"}, {}, "related", "embedding"),
        ({"q": "a", "d": "b"}, {"text": "q", "text_pair": "d", "task": "embedding"}, "related", "embedding"),
        (
            {"q": "a", "d": "b", "s": 2.0},
            {"text": "q", "text_pair": "d", "label": ("s",), "task": "embedding"},
            "labels",
            "embedding",
        ),
        ({"tokens": ["a"], "ner_tags": ["O"]}, {}, "tags", "tagging"),
        ({"w": ["a"], "t": ["O"]}, {"text": "w", "label": ("t",), "task": "tagging"}, "tags", "tagging"),
        ({"text": "a"}, {"task": "embedding"}, "text", "embedding"),
    ],
)
def test_the_task_is_seen_from_the_rows(row: dict[str, Any], how: dict[str, Any], format: str, task: str) -> None:
    found = form(row, row, **how)
    assert (found.detection.format, found.detection.task, found.problems) == (format, task, [])
    assert found.detection.kind == ("unsupervised" if format == "text" else "supervised")


def test_what_could_be_two_texts_is_asked() -> None:
    with pytest.raises(DataError, match="'text' and 'review' could each be the text") as error:
        form({"text": "a", "review": "b", "label": "x"})
    assert error.value.problems[0].cure == "-s data.text=text or -s data.text=review"
    assert form({"text": "a", "review": "b", "label": "x"}, text="review").detection.certainty == "given"


def test_rows_of_no_known_format_are_shown_with_what_each_kind_needs() -> None:
    with pytest.raises(DataError) as error:
        form({"foo": "something", "bar": "else"})
    problem = error.value.problems[0]
    assert '{"foo": "something", "bar": "else"}' in problem.what
    for needed in ("data.prompt", "data.label", "data.text"):
        assert needed in problem.cure


def problems(*rows: dict[str, Any], **how: Any) -> list[tuple[str, str]]:
    return [(problem.where, problem.what) for problem in form(*rows, **how).problems]


def test_labels_that_cannot_be_are_named() -> None:
    good = {"text": "a", "label": 1.5}
    assert problems(good, good, good, {"text": "a", "label": float("nan")}, {"text": "a", "label": "x"}) == [
        ("f:4:label", "nan where a number is expected"),
        ("f:5:label", "'x' where a number is expected"),
    ]
    several = {"text": "a", "label": ["x"]}
    assert problems(several, several, {"text": "a", "label": "x"}, {"text": "a", "label": ["x", None]}) == [
        ("f:3:label", "a str where a list of classes is expected"),
        ("f:4:label[1]", "no label"),
    ]
    flags = {"text": "a", "rude": 0, "long": 1}
    assert problems(flags, {**flags, "rude": 2}, label=("rude", "long"), task="multilabel") == [
        ("f:2:rude", "2 where 0 or 1 is expected")
    ]
    assert problems(
        {"tokens": ["a", "b"], "tags": ["O"]}, {"tokens": [], "tags": []}, {"tokens": ["a", None], "tags": ["O", "O"]}
    ) == [
        ("f:1", "2 words and 1 tags"),
        ("f:2:tokens", "empty where a list is expected"),
        ("f:3:tokens[1]", "None is no text"),
    ]
    with pytest.raises(DataError, match="not 1 numbers, as others have"):
        find_labels([Labelled(Where("f", n), "a", (1.0,) * (1 + (n == 2))) for n in range(3)], "regression")
    with pytest.raises(DataError, match="the same in every row"):
        find_labels([Labelled(Where("f", n), "a", (1.0,)) for n in range(3)], "regression")


# --- files of tags, and of images ---


def test_conll_files_are_read_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.conll"
    file.write_text(
        "-DOCSTART- O\n\nthe DT O\ncat NN B-x\n# # O\n\n\n# a comment\na\tO\nb c\tI-x\n\nbad\nrow O\n\nend O",
        encoding="utf-8",
    )
    items = list(read(find_files([str(file)])))
    rows = [(item.where.line, item.fields) for item in items if isinstance(item, Row)]
    assert rows == [
        (3, {"tokens": ["the", "cat", "#"], "tags": ["O", "B-x", "O"]}),
        (9, {"tokens": ["a", "b c"], "tags": ["O", "I-x"]}),
        (15, {"tokens": ["end"], "tags": ["O"]}),
    ]
    (problem,) = [item for item in items if isinstance(item, Problem)]
    assert (problem.code, problem.where.endswith("a.conll:12")) == ("row.tags", True)


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    from PIL import Image as Pillow

    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.new("RGB", size, (255, 0, 0)).save(path)
    return path


def test_images_are_read_by_folder_or_named_by_a_table(tmp_path: Path) -> None:
    for name in ("cats/1.png", "cats/2.png", "dogs/1.jpg"):
        picture(tmp_path / "all" / name, (8 + len(name) + int(name[5]), 30))
    formed = form_rows([str(tmp_path / "all")], DataSettings())
    assert (formed.detection.task, str(formed.detection)) == (
        "images",
        "images (certain): 3 of 3 rows have `image` and `label`",
    )
    assert [record.label for record in formed.formatted.examples if isinstance(record, Picture)] == ["cats"] * 2 + [
        "dogs"
    ]
    (tmp_path / "all" / "table.csv").write_text("image,label\ncats/1.png,a\ndogs/1.jpg,b\ngone.png,c\n")
    formed = form_rows([str(tmp_path / "all")], DataSettings())
    assert len(formed.formatted.examples) == 2
    assert [problem.code for problem in formed.formatted.problems] == ["row.image"]
    assert formed.formatted.problems[0].where.endswith("gone.png")


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    good = picture(tmp_path / "good.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:60])
    text = tmp_path / "text.png"
    text.write_text("no image")
    bomb = picture(tmp_path / "bomb.png", (PIXELS_MAX // 1000 + 1, 1000))
    look = Look(32, 32, (0.5,) * 3, (0.5,) * 3)
    made = segment_pictures(
        [Picture(Where(str(p), 1), str(p), "a", "") for p in (good, broken, text, bomb)], None, look
    )
    assert [example.where.path for example in made.examples] == [str(good)]
    assert [(p.code, p.where) for p in made.problems] == [("row.image", str(p)) for p in (broken, text, bomb)]
    assert "64,001 x 1,000 pixels, over 64,000,000" in made.problems[2].what


def test_pixels_are_those_of_the_image(tmp_path: Path) -> None:
    from PIL import Image as Pillow

    left = np.zeros((4, 8, 3), np.uint8)
    left[:, :4] = (255, 127, 0)
    path = tmp_path / "a.png"
    Pillow.fromarray(left).save(path)
    look = Look(4, 8, (0.5, 0.5, 0.5), (0.25, 0.5, 1.0), resample=0)
    pixels = load_pixels(Image(str(path)), look)
    assert pixels.shape == (3, 4, 8)
    assert pixels[:, 0, 0] == pytest.approx([(1 - 0.5) / 0.25, (127 / 255 - 0.5) / 0.5, -0.5])
    assert pixels[:, 0, 7] == pytest.approx([-2, -1, -0.5])
    assert load_pixels(Image(str(path), mirrored=True), look)[:, :, ::-1].tolist() == pixels.tolist()
    half = load_pixels(Image(str(path), (0.0, 0.0, 0.5, 1.0)), look)
    assert half[0].min() == half[0].max() == 2.0
    middle = load_pixels(Image(str(path)), Look(4, 4, (0.0,) * 3, (1.0,) * 3, resize=4, resample=0))
    assert middle[0].tolist() == [[1.0, 1.0, 0.0, 0.0]] * 4
    example = Example(Where("f", 1), (), image=Image(str(path)))
    seen = [vary_image(3)(example, place).image for place in (0, 1, 0)]
    assert seen[0] == seen[2] != seen[1]
    for image in seen:
        assert image
        assert 0 <= image.box[0] < image.box[2] <= 1


# --- what a model is held against ---


def test_a_pair_is_framed_as_the_tokenizer_frames_it(encoder: Encoder, tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    own = Encoder(BertTokenizerFast(str(vocabulary)))
    theirs = own.tokenizer("a b c", "d e")
    rows = [Labelled(Where("f", 1), "a b c", "x", pair="d e"), Labelled(Where("f", 2), "a b c d e f g", "y", pair="h")]
    labels = Labels("classification", ("x", "y"))
    made = segment_labelled(rows, own, labels, max_length=8, over_length="cut")
    (segment,) = made.examples[0].segments
    assert segment.types is not None
    assert (segment.ids.tolist(), segment.types.tolist()) == (theirs["input_ids"], theirs["token_type_ids"])
    # Of the other, the longer text is cut at its end.
    assert made.examples[1].segments[0].ids.tolist() == own.tokenizer("a b c d", "h")["input_ids"]
    assert (made.examples[1].cut, made.examples[1].label) == ("e f g", 1)
    assert len(segment_labelled(rows, own, labels, max_length=8).dropped) == 1


def test_each_words_first_token_is_held_against_its_tag(encoder: Encoder) -> None:
    labels = Labels("tagging", ("O", "B-x"), (1, 1))
    rows = [Tagged(Where("f", 1), ("text", "7-8", "9"), ("O", "B-x", "B-new"))]
    (example,) = segment_tagged(rows, encoder, labels, max_length=20).examples
    (segment,) = example.segments
    # [CLS] text 7 - 8 9 [SEP]; the tag of the last word is none that training saw.
    assert segment.weights.tolist() == [0, 1, 1, 0, 0, 0, 0]
    assert segment.asked is not None
    assert segment.asked.tolist() == [0, 1, 1, 0, 0, 1, 0]
    assert segment.targets is not None
    assert segment.targets[[1, 2]].tolist() == [0, 1]
    cut = segment_tagged(rows, encoder, labels, max_length=5, over_length="cut").examples[0]
    assert (len(cut.segments[0]), cut.cut) == (3, "7-8 9")
    assert segment_tagged(rows, encoder, labels, max_length=5).dropped == [(rows[0].where, 7)]
    long = [Tagged(Where("f", 2), ("1-2-3-4-5-6-7-8", "9"), ("B-x", "O"))]
    (short,) = segment_tagged(long, encoder, labels, max_length=6, over_length="cut").examples
    assert (len(short.segments[0]), short.target_count, short.cut) == (6, 1, "9")
    notes = label_notes([Tagged(Where("f", 3), ("a", "b"), ("O", "I-x")), *rows], [], labels)
    assert any("1 rows have an entity that begins with I-" in note and "f:3" in note for note in notes)


def test_tokens_are_hidden_as_bert_hides_them_and_anew_each_time(encoder: Encoder) -> None:
    with pytest.raises(ModelError, match="no mask token"):
        find_masking(Encoder(make_tokenizer("chatml")), 0, whole_words=False)
    masking = find_masking(encoder, 7, whole_words=False)
    document = Document(Where("f", 1), " ".join(str(n % 50) for n in range(4000)))
    made = segment_masked([document], encoder, masking, max_length=402)
    assert [len(example.segments[0]) for example in made.examples] == [402] * 10
    assert made.examples[0].target_count == 0
    hidden = other = chosen = 0
    for place in range(60):
        before = made.examples[place % 10].segments[0]
        (after,) = masking.vary(made.examples[place % 10], place).segments
        picked = after.weights > 0
        assert after.targets is not None
        assert (after.targets == before.ids).all()
        assert (after.ids[~picked] == before.ids[~picked]).all()
        assert not picked[[0, -1]].any()
        assert picked.sum() == 60  # 15% of 400
        chosen += 60
        hidden += int((after.ids[picked] == masking.mask_id).sum())
        other += int(((after.ids != before.ids) & (after.ids != masking.mask_id)).sum())
    assert hidden / chosen == pytest.approx(0.8, abs=0.03)
    assert other / chosen == pytest.approx(0.1, abs=0.03)
    once, again, elsewhere = (masking.vary(made.examples[0], place).segments[0].ids.tolist() for place in (3, 3, 4))
    assert once == again != elsewhere


def test_to_score_each_token_is_hidden_once(encoder: Encoder) -> None:
    masking = find_masking(encoder, 0, whole_words=False)
    document = Document(Where("f", 1), " ".join(str(n % 50) for n in range(100)))
    (example,) = segment_masked([document], encoder, masking, max_length=32, whole=True).examples
    assert example.target_count == 100
    assert len(example.segments) == 4 * 7  # pieces of 30, seven copies of each
    for start in range(0, 28, 7):
        copies = example.segments[start : start + 7]
        assert (np.sum([copy.weights for copy in copies], 0)[1:-1] == 1).all()
        for copy in copies:
            assert (copy.ids[copy.weights > 0] == masking.mask_id).all()


def test_whole_words_are_hidden_together(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##do", "##ing", "it"]))
    own = Encoder(BertTokenizerFast(str(vocabulary)))
    masking = find_masking(own, 0, whole_words=True)
    made = segment_masked([Document(Where("f", 1), "undoing it " * 20)], own, masking, max_length=200)
    for place in range(20):
        (segment,) = masking.vary(made.examples[0], place).segments
        picked = (segment.weights > 0)[1:-1].reshape(20, 4)  # un ##do ##ing | it
        assert (picked[:, 0] == picked[:, 1]).all()
        assert (picked[:, 0] == picked[:, 2]).all()
        assert picked[:, [0, 3]].sum() == 6  # 15% of 40 words


def test_related_texts_and_their_scores(encoder: Encoder) -> None:
    rows = [Related(Where("f", n), (f"text {n}", "2 3"), score) for n, score in enumerate((1.0, 3.0, 5.0))]
    with pytest.raises(DataError, match="every score is 1"):
        scale_scores(rows[:1] * 3, rows[:1] * 3)
    assert [row.score for row in scale_scores(rows, [])] == [0.0, 0.5, 1.0]
    made = segment_related(scale_scores(rows, rows), encoder, max_length=10)
    assert [float(e.label[0]) for e in made.examples] == [0.0, 0.5, 1.0]  # type: ignore[index]
    assert made.examples[0].segments[1].ids.tolist() == encoder.tokenizer("2 3")["input_ids"]
    document = Document(Where("f", 1), "1 2 3 4 5")
    assert as_related(document, halves=False).texts == ("1 2 3 4 5",) * 2
    assert as_related(document, halves=True).texts == ("1 2 3", "4 5")


def test_names_of_columns_become_names_of_numbers() -> None:
    rows = [Labelled(Where("f", n), "a", (float(n), 2.0 * n)) for n in range(4)]
    labels = find_labels(rows, "regression", ("price", "age"))
    assert labels.names == ("price", "age")
    assert labels.mean == pytest.approx((1.5, 3.0))
    assert labels.spread == pytest.approx((np.std([0, 1, 2, 3]), np.std([0, 2, 4, 6])))
    assert Labels.from_json(labels.to_json()) == labels
    assert labels.encode("") == pytest.approx([0.0, 0.0])  # a row that is yet to be labelled


def test_a_text_that_no_token_spells_is_scored_all_the_same(encoder: Encoder) -> None:
    masking = find_masking(encoder, 0, whole_words=False)
    (example,) = segment_masked(
        [Document(Where("f", 1), "\u2603 \u2603")], encoder, masking, max_length=20, whole=True
    ).examples
    assert example.target_count == 2


def test_a_row_with_another_number_of_numbers_is_named(encoder: Encoder) -> None:
    labels = Labels("regression", ("a", "b"), (), (0.0, 0.0), (1.0, 1.0))
    made = segment_labelled([Labelled(Where("f", 3), "1", (1.5,))], encoder, labels, max_length=20)
    assert [(p.code, p.where) for p in made.problems] == [("row.label", "f:3")]


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        ({"size": {"height": 24, "width": 32}}, (24, 32, None)),
        ({"size": 24}, (24, 24, None)),
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224}, (224, 224, 256)),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (224, 224, 256)),
        ({"size": {"shortest_edge": 224}}, (224, 224, 224)),
    ],
)
def test_how_a_model_sees_is_read_as_transformers_means_it(said: dict[str, Any], seen: tuple[Any, ...]) -> None:
    look = Look.from_json(said, 1)
    assert (look.height, look.width, look.resize) == seen
    with pytest.raises(ModelError, match="no one size"):
        Look.from_json({"size": {"longest_edge": 500}}, 1)


def test_images_of_more_than_eight_bits_are_named(tmp_path: Path) -> None:
    from PIL import Image as Pillow

    path = tmp_path / "deep.png"
    Pillow.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path)
    made = segment_pictures(
        [Picture(Where(str(path), 1), str(path), "a", "")], None, Look(8, 8, (0.5,) * 3, (0.5,) * 3)
    )
    assert [problem.code for problem in made.problems] == ["row.image"]
    assert "more than 8 bits" in made.problems[0].what
