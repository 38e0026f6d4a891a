"""Image files -> pixels as a model wants them, decoded and resized by Pillow."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.data.labels import Labels
from headstart.data.records import Picture
from headstart.data.segments import Example, Image, Segment, Segmented
from headstart.errors import ModelError, Problem

PIXELS_MAX = 64_000_000
PATCH = 16  # an image counts as many tokens as it has patches of this size
DEEP = ("I", "F")  # how Pillow calls pixels of 16 bits, of 32 bits and of fractions
CROP = (0.6, 1.0)  # sides of the part of an image that training looks at, as parts of the whole


@dataclass(frozen=True)
class Look:
    """How a model wants to see: the size of its images, and the mean and spread of each colour (of 0 to 1).

    An image is resized so that its shorter side is `resize`, and its middle is cut out; without `resize` it is squeezed
    into the size.
    """

    height: int
    width: int
    mean: tuple[float, ...]
    spread: tuple[float, ...]
    resize: int | None = None
    resample: int = 3  # bicubic

    @property
    def patches(self) -> int:
        """How many patches of 16 x 16 pixels an image has."""
        return -(-self.height // PATCH) * -(-self.width // PATCH)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads, as transformers writes it."""
        crop = {"do_center_crop": True, "crop_size": {"height": self.height, "width": self.width}}
        size = {"shortest_edge": self.resize} if self.resize else {"height": self.height, "width": self.width}
        return {
            "image_processor_type": "CLIPImageProcessor" if self.resize else "ViTImageProcessor",
            "do_resize": True,
            "size": size,
            "resample": self.resample,
            **(crop if self.resize else {}),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.spread),
        }

    @staticmethod
    def from_json(values: Mapping[str, Any], size: int) -> Look:
        """Read a `preprocessor_config.json` of transformers; `size` where it names none."""
        asked = values.get("size", size)
        asked = {"height": asked, "width": asked} if isinstance(asked, int) else asked
        crop = values.get("crop_size") if values.get("do_center_crop") else None
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        shorter = asked.get("shortest_edge")
        if not shorter and not {"height", "width"} <= set(asked):
            cure = "use a model whose images have one size"
            raise ModelError(
                Problem("model.kind", f"its images have no one size: {asked}", "preprocessor_config.json", cure)
            )
        final = crop or ({"height": shorter, "width": shorter} if shorter else asked)
        whole = round(shorter / (values.get("crop_pct") or 1)) if shorter else None
        resize = whole or (asked["height"] if crop else None)
        plain = not values.get("do_normalize", True)
        mean = (0.0, 0.0, 0.0) if plain else tuple(values.get("image_mean", (0.485, 0.456, 0.406)))
        spread = (1.0, 1.0, 1.0) if plain else tuple(values.get("image_std", (0.229, 0.224, 0.225)))
        return Look(final["height"], final["width"], mean, spread, resize, int(values.get("resample", 3)))


def load_pixels(image: Image, look: Look) -> NDArray[np.float32]:
    """Return the pixels of an image, [3, H, W]."""
    with _open(image.path) as file:
        picture = file.convert("RGB")
    width, height = picture.size
    left, top, right, bottom = image.box
    picture = picture.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))
    if look.resize:
        scale = look.resize / min(picture.size)
        wide, high = (
            max(side, round(old * scale)) for side, old in zip((look.width, look.height), picture.size, strict=True)
        )
        picture = picture.resize((wide, high), look.resample)
        x, y = (wide - look.width) // 2, (high - look.height) // 2
        picture = picture.crop((x, y, x + look.width, y + look.height))
    else:
        picture = picture.resize((look.width, look.height), look.resample)
    pixels = np.asarray(picture, np.float32) / 255
    pixels = (pixels - np.array(look.mean, np.float32)) / np.array(look.spread, np.float32)
    pixels = pixels[:, ::-1] if image.mirrored else pixels
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def vary_image(seed: int) -> Any:
    """Return what shows another part of an image, perhaps mirrored, each time that it is seen."""

    def vary(example: Example, place: int) -> Example:
        chance = np.random.default_rng((seed, place))
        side = float(chance.uniform(*CROP))
        left, top = (float(chance.uniform(0, 1 - side)) for _ in range(2))
        seen = Image(example.image.path, (left, top, left + side, top + side), bool(chance.random() < 0.5))  # type: ignore[union-attr]
        return replace(example, image=seen)

    return vary


def segment_pictures(pictures: Sequence[Picture], labels: Labels | None, look: Look) -> Segmented:
    """Turn images into examples; those that can't be read are problems."""
    result = Segmented()
    blank = Segment(np.zeros(look.patches, np.int32), np.zeros(look.patches, np.float32))
    for picture in pictures:
        if problem := _fault(picture):
            result.problems.append(problem)
            continue
        label = labels.encode(picture.label) if labels else -1
        result.examples.append(Example(picture.where, (blank,), label=label, image=Image(picture.path)))
        result.kept.append(picture)
    return result


def _fault(picture: Picture) -> Problem | None:
    try:
        with _open(picture.path) as file:
            wide, high = file.size
            if wide * high > PIXELS_MAX:
                what = f"{wide:,} x {high:,} pixels, over {PIXELS_MAX:,}"
                return Problem("row.image", what, picture.path, "make it smaller, or delete it")
            if file.mode.startswith(DEEP):
                what = f"its colours have more than 8 bits ({file.mode}), which would be cut off"
                return Problem("row.image", what, picture.path, "scale it to 8 bits, as suits what is seen")
            file.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        return Problem("row.image", f"no image that can be read: {error}", picture.path, "mend it, or delete it")
    return None


@contextlib.contextmanager
def _open(path: str) -> Iterator[Any]:
    from PIL import Image as Pillow

    Pillow.MAX_IMAGE_PIXELS = None  # the size is checked before a pixel is decoded
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it says, the problem says
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Pillow.open(path) as file:
            yield file
