"""oneDNN's products are MKL's to rounding, in inference on a CPU alone."""

import pytest
import torch
from torch import nn

from hscr.models.products import fast_products


@pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_gives_what_it_gave(shape: tuple[int, ...], bias: bool) -> None:
    layer, states = nn.Linear(5, 7, bias=bias), torch.randn(shape)
    with torch.inference_mode():
        plain = layer(states)
        with fast_products(states):
            torch.testing.assert_close(layer(states), plain)
            transposed = nn.functional.linear(states, torch.eye(5, 7).t())
            named = nn.functional.linear(input=states, weight=torch.eye(7, 5))
    torch.testing.assert_close(transposed, named)


def test_only_fp32_in_inference_goes_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def note(*args: torch.Tensor) -> torch.Tensor:
        asked.append(args)
        return args[0]

    monkeypatch.setattr("hscr.models.products._linear", note)
    layer, states = nn.Linear(4, 4), torch.randn(3, 4)
    with fast_products(states):
        layer(states).sum().backward()
    with torch.no_grad(), fast_products(states):
        layer(states)
    with torch.inference_mode():
        layer(states)
        with fast_products(states.double()):
            layer.double()(states.double())
    assert layer.weight.grad is not None
    assert not asked
    with torch.inference_mode(), fast_products(states):
        layer.float()(states)
    assert len(asked) == 1
