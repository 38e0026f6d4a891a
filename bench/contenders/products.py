"""The best rate of float32 matrix products on this machine, torch's or our own, over the shapes of the model and numbers of rows."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModel

from bench.contenders.common import now, read_spec, report
from headstart.models.native import plain_product, product

ROWS = (128, 256, 512, 1024, 2048)
SECONDS = 0.4


def main() -> None:
    """Time each shape for a while and report the best rate of each number of rows."""
    spec = read_spec()
    with torch.device("meta"):
        body = AutoModel.from_config(AutoConfig.from_pretrained(spec["model_path"]))
    shapes = {tuple(module.weight.shape) for module in body.modules() if isinstance(module, torch.nn.Linear)}
    rates = {rows: max(_rate(rows, *shape) for shape in shapes) for rows in ROWS}
    report(best_flops=max(rates.values()), by_rows={str(rows): rate for rows, rate in rates.items()})


def _rate(rows: int, outputs: int, inputs: int) -> float:
    """Return the operations a second of the quickest of several products [rows, inputs] x [inputs, outputs]."""
    a, b, c = torch.randn(rows, inputs), torch.randn(inputs, outputs), torch.empty(rows, outputs)
    best, end = float("inf"), now() + SECONDS
    while now() < end:
        for way in (plain_product, product):
            begun = now()
            way(a, b, None, c)
            best = min(best, now() - begun)
    return 2.0 * rows * inputs * outputs / best


if __name__ == "__main__":
    main()
