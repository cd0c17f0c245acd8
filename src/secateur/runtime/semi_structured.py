"""2:4 on NVIDIA GPUs, by torch's own semi-structured tensors (cuSPARSELt or CUTLASS underneath)."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.runtime.formats.two_four import breaks_two_of_four

_MULTIPLE = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (32, 128), torch.float32: (32, 32)}


class SemiStructuredRuntime:
    """Linear layers whose zeros are 2:4 on the Ampere generation of GPUs or later, in float16 or bfloat16."""

    exact: ClassVar[bool] = True
    needs_zeros: ClassVar[bool] = True

    def refuses(self, module: nn.Module, example: Tensor) -> str | None:
        """The reason why `module` cannot run so, probed by doing it once on `example`."""
        if example.device.type != "cuda":
            return f"2:4 kernels need a CUDA device, the layer runs on {example.device.type}"
        if type(module) is not nn.Linear:
            return "2:4 kernels serve linear layers only"
        weight = module.weight
        if reason := breaks_two_of_four(weight):
            return reason
        if torch.cuda.get_device_capability(example.device) < (8, 0):
            return f"{torch.cuda.get_device_name(example.device)} has no sparse tensor cores"
        out, columns = _MULTIPLE.get(weight.dtype, (0, 0))
        if not out or weight.shape[0] % out or weight.shape[1] % columns:
            return f"2:4 kernels do not take {weight.dtype} weights of shape {tuple(weight.shape)}"
        try:
            with torch.inference_mode():
                self.convert(module)(example)
        except RuntimeError as error:  # what this GPU and library accept is known only by asking
            return f"torch refuses it: {str(error).splitlines()[0]}"
        return None

    def convert(self, module: nn.Module) -> nn.Module:
        """A copy of the linear layer whose weight is a semi-structured tensor."""
        assert isinstance(module, nn.Linear)
        fast = copy.deepcopy(module)
        fast.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(module.weight.detach()), requires_grad=False)
        return fast
