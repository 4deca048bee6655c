"""Convolutions that standardise their filters, while some of their inputs are masked.

Weight standardisation takes mean and variance of each filter over its inputs, so masked ones would count as zeros; once
they are removed they do not (Qiao et al., "Micro-batch training with batch-channel normalization and weight
standardization", 2019; Brock et al., "Characterizing signal propagation to close the performance gap in unnormalized
ResNets", 2021).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pruningawaretraining.models.masked_modules import KeptChannels, KeptModule

Conv = nn.modules.conv._ConvNd


def computes_filters(module: nn.Module) -> bool:
    """Whether a convolution has code of its own, and all of its filters read all of its inputs."""
    if not isinstance(module, Conv) or type(module).__module__.startswith("torch.nn."):
        return False
    return module.groups == 1 and not module.transposed and "weight" in module._parameters


class KeptFilters(KeptModule):
    """Forward hook: what a convolution computes of the kept inputs alone.

    Args:
        module: the convolution; see :func:`computes_filters`.
        device: where it is.
    """

    def __call__(self, module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        keep: KeptChannels = self.keep_C
        if keep.all:
            return output
        index = keep.on(output.device)
        kind: Any = type(module)
        small = kind.__new__(kind)
        own = vars(small)
        own.update(vars(module))
        own.update(_parameters={**module._parameters}, in_channels=len(index))
        del own["_parameters"]["weight"]
        own["weight"] = module.weight.index_select(1, index)
        first, *others = inputs
        channels = first.dim() - module.weight.dim() + 1  # a single image has no dimension of a batch
        found: Tensor = small.forward(first.index_select(channels, index), *others)
        return found
