"""Dropout: as many values are dropped as was asked, each by itself, and the mean stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headstart.models.dropout import draw_kept, dropout, share


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_values_are_dropped_with_their_probability_and_by_themselves(p: float) -> None:
    torch.manual_seed(0)
    kept = draw_kept((400, 1001), p, torch.device("cpu")).double()
    n = kept.numel()
    spread = (p * (1 - p) / n) ** 0.5  # of a mean of n independent draws
    assert abs(float(kept.mean()) - (1 - p)) < 5 * spread
    for other in (kept.roll(1, 1), kept.roll(2, 1), kept.roll(4, 1), kept.roll(1, 0)):
        together = float((kept * other).mean())
        assert abs(together - (1 - p) ** 2) < 10 * spread


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_what_is_kept_is_a_byte_of_a_value_and_follows_from_the_seed(p: float) -> None:
    torch.manual_seed(3)
    kept = draw_kept((7, 31), p, torch.device("cpu"))
    torch.manual_seed(3)
    noise = torch.empty(55, dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)[:217]
    assert kept.element_size() == 1
    assert torch.equal(kept.flatten() == 1, noise >= round(p * 65536) - 32768)
    assert torch.equal(kept, kept != 0)


def test_all_or_none_can_be_dropped() -> None:
    assert not draw_kept((3, 5), 1.0, torch.device("cpu")).any()
    assert draw_kept((3, 5), 0.0, torch.device("cpu")).all()
    assert [share(p) for p in (0.0, 0.5, 1.0)] == [1.0, 2.0, 0.0]


def test_the_gradient_goes_where_the_value_went() -> None:
    torch.manual_seed(0)
    x = torch.rand(50, 30, requires_grad=True)
    module = nn.Dropout(0.4)
    given = dropout(x, module)
    given.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(given, x * x.grad)
    torch.testing.assert_close(x.grad.unique(), torch.tensor([0.0, share(0.4)]))
    torch.testing.assert_close(dropout(x, module.eval()), x)
