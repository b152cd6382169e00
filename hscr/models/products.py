"""Matrix products by the faster of the two libraries that torch's CPU build holds."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


def fast_products(like: Tensor) -> AbstractContextManager[object]:
    """Inside the block, linear layers on `like`'s device and dtype run as fast as torch can run them there.

    On a CPU torch gives fp32 products to MKL. oneDNN does those of few rows (64 by a vocabulary of 32,000,
    128 by a feed-forward) in half to two thirds of the time, long ones in 0.9 of it. The operator, made for
    compiled code, knows no gradients: hence in inference mode only.
    """
    here = like.device.type == "cpu" and like.dtype == torch.float32 and torch.is_inference_mode_enabled()
    if torch.compiler.is_compiling() or not here:
        return nullcontext()
    has_one_dnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return _OneDNN() if has_one_dnn else nullcontext()


class _OneDNN(TorchFunctionMode):
    """Reaches the layers inside transformers' and peft's modules, and leaves these as they are."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is linear and not kwargs:
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
