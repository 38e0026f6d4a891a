"""A parameter's gradient is added to in place, however the product that it's made of lies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headstart.models.linear import add_product


@pytest.mark.parametrize("shape", [(130, 16), (20, 16), (130, 80)], ids=["narrow", "low", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_added_to_a_gradient(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, columns = shape
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    gradient, inputs = torch.randn(9, rows, dtype=dtype), torch.randn(9, columns, dtype=dtype)
    theirs = 0.5 * torch.einsum("tn,td->nd", gradient, inputs)
    add_product(parameter, gradient.t(), inputs, 0.5)
    assert parameter.grad is not None
    assert parameter.grad.is_contiguous()
    torch.testing.assert_close(parameter.grad, theirs)
    place = parameter.grad.data_ptr()
    add_product(parameter, gradient.t(), inputs, 0.5)
    torch.testing.assert_close(parameter.grad, 2 * theirs)
    assert parameter.grad.data_ptr() == place
