"""Two repairs of vLLM's CPU build, each made just before the module that needs it is imported.

A `.pth` file beside this one imports it when Python starts. The CUDA build needs neither.
"""

import sys
from importlib.abc import MetaPathFinder


def describe_operators() -> None:
    """Let torchvision from PyPI be imported beside the CPU build of torch.

    It is linked against CUDA, so its operators cannot be loaded here, and importing it ends with "operator
    torchvision::nms does not exist" where it describes them to torch. vLLM's LLaVA needs
    `torchvision.transforms.v2` and none of the operators: their schemas are enough.
    """
    import torch  # noqa: PLC0415

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)  # a library that is collected takes its schemas along


def leave_the_base_alone() -> None:
    """Let a request without an adapter be answered without one (vllm#48421, open).

    Such a request has the adapter index -1, which these operators read as Python does: the last slot. Once
    an adapter lies there, the base model answers as that adapter.
    """
    from vllm.lora.ops import torch_ops  # noqa: PLC0415
    from vllm.lora.ops.torch_ops import lora_ops  # noqa: PLC0415

    shrink = lora_ops.bgmv_shrink

    def bgmv_shrink(inputs, lora_a, output, adapters, scaling=1.0):
        shrink(inputs, lora_a, output, adapters, scaling)
        output.masked_fill_((adapters < 0)[:, None], 0)  # one index may stand for all rows

    lora_ops.bgmv_shrink = torch_ops.bgmv_shrink = bgmv_shrink


class _Repairs(MetaPathFinder):
    """Finds nothing itself: it only learns what is about to be imported."""

    def __init__(self) -> None:
        self.before = {
            "torchvision": describe_operators,
            "vllm.lora.punica_wrapper.punica_cpu": leave_the_base_alone,
        }

    def find_spec(self, fullname, path=None, target=None) -> None:  # noqa: ARG002
        repair = self.before.pop(fullname, None)
        if repair:
            repair()


_kept: list[object] = []
sys.meta_path.insert(0, _Repairs())
