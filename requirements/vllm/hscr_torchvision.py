"""Lets torchvision from PyPI be imported beside the CPU build of torch. Installed by install-vllm.sh.

That torchvision is linked against CUDA, so its compiled operators cannot be loaded here, and importing it
ends with "operator torchvision::nms does not exist" where it describes them to torch. vLLM's LLaVA needs
`torchvision.transforms.v2` and none of these operators: their schemas are enough.
"""

import sys
from importlib.abc import MetaPathFinder

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing itself: it only learns that torchvision is about to be imported."""

    def find_spec(self, fullname, path=None, target=None):  # noqa: ARG002
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch  # noqa: PLC0415

            self.library = torch.library.Library("torchvision", "DEF")
            for schema in SCHEMAS:
                self.library.define(schema)
            _kept.append(self)  # a library that is collected takes its schemas along


_kept: list[_BeforeTorchvision] = []
sys.meta_path.insert(0, _BeforeTorchvision())
