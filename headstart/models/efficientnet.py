"""EfficientNet-Lite (Tan and Le, 2019; the Lite variants, 2020) as a model of transformers: a small network for images.

Without squeeze-and-excitation and with ReLU6, as made for small machines. This file stands alone: it is copied beside the
weights, so that a result loads without headstart (`trust_remote_code=True`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

# Of each stage of Lite0: expansion of the channels inside, channels out, blocks, stride of the first, kernel.
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class EfficientNetLiteConfig(PretrainedConfig):  # type: ignore[misc]
    """Shape of the network: `stem` channels after the first convolution, `stages` as in STAGES, `hidden_size` at the end."""

    model_type = "efficientnet_lite"

    def __init__(
        self,
        stem: int = 32,
        stages: Any = STAGES,
        hidden_size: int = 1280,
        image_size: int = 224,
        dropout: float = 0.2,
        **kwargs: Any,
    ) -> None:
        self.stem = stem
        self.stages = [list(stage) for stage in stages]
        self.hidden_size = hidden_size
        self.image_size = image_size
        self.dropout = dropout
        super().__init__(**kwargs)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class _Conv(nn.Conv2d):
    """A convolution padded as TensorFlow does ("same"), where the weights come from: an odd pixel goes to the far side."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, out, ceil(H / stride), ceil(W / stride)]."""
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            pads += [total // 2, total - total // 2]
        padded = nn.functional.pad(x, pads) if any(pads) else x
        mixed: Tensor = self._conv_forward(padded, self.weight, self.bias)
        return mixed


class _Block(nn.Module):
    """An inverted residual: channels widened, mixed in space, narrowed."""

    def __init__(self, channels: int, out: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = channels * expansion
        self._expands = expansion != 1
        if self._expands:
            self._expand_conv = nn.Conv2d(channels, inner, 1, bias=False)
            self._bn0 = _norm(inner)
        self._depthwise_conv = _Conv(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv = nn.Conv2d(inner, out, 1, bias=False)
        self._bn2 = _norm(out)
        self._adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, out, H / stride, W / stride]."""
        wide = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self._expands else x
        mixed = nn.functional.relu6(self._bn1(self._depthwise_conv(wide)))
        y: Tensor = self._bn2(self._project_conv(mixed))
        return x + y if self._adds else y


class EfficientNetLiteForImageClassification(PreTrainedModel):  # type: ignore[misc]
    """The network with its head: pixels [B, 3, H, W] -> logits [B, num_labels]."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    base_model_prefix = "body"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self._conv_stem = _Conv(3, config.stem, 3, 2, bias=False)
        self._bn0 = _norm(config.stem)
        blocks = []
        channels = config.stem
        for expansion, out, count, stride, kernel in config.stages:
            for number in range(count):
                blocks.append(_Block(channels, out, expansion, kernel, stride if number == 0 else 1))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, config.hidden_size, 1, bias=False)
        self._bn1 = _norm(config.hidden_size)
        self._dropout = nn.Dropout(config.dropout)
        self._fc = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """Return the logits and, with `labels` int64 [B], the cross-entropy."""
        x = nn.functional.relu6(self._bn0(self._conv_stem(pixel_values)))
        for block in self._blocks:
            x = block(x)
        x = nn.functional.relu6(self._bn1(self._conv_head(x)))
        logits = self._fc(self._dropout(x.mean((2, 3))))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def register() -> None:
    """Make the network known to transformers, and let results carry this file."""
    from transformers import AutoConfig, AutoModelForImageClassification

    AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
    AutoModelForImageClassification.register(
        EfficientNetLiteConfig, EfficientNetLiteForImageClassification, exist_ok=True
    )
    EfficientNetLiteConfig.register_for_auto_class()
    EfficientNetLiteForImageClassification.register_for_auto_class("AutoModelForImageClassification")
