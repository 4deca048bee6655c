"""Routers of experts, while some experts are masked: they choose among those that are kept.

Shape suffixes: ``_E`` experts, ``_K`` kept experts.

A masked expert has weights of zero, and its row of the router is zero too: a logit of 0, which still has a share of the
softmax and may be among the largest. So a forward hook runs the router's own code again, on the kept rows alone, and
numbers the experts that it chooses as the model does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.models.compiling import forget_compiled
from pruningawaretraining.models.kept_hooks import KeptHooks
from pruningawaretraining.models.surgery import Surgery

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts")
"""Attributes that count experts."""


class KeptExperts:
    """Forward hook of a router: what it gives out without the masked experts.

    Logits (an output alone, or the first beside numbers of experts) are minus infinity for masked experts, so that
    their probability is exactly 0. What else there is one of for each expert is 0.

    Args:
        experts: how many there are.
    """

    saved = False
    behind = 0

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.kept_K = torch.arange(experts)

    def take(self, keep_E: Tensor, device: torch.device) -> None:
        """Take new masks."""
        self.kept_K = torch.nonzero(keep_E).flatten().to(device)

    def known(self) -> Tensor | None:
        """Which experts are kept, on the CPU."""
        keep_E = torch.zeros(self.experts, dtype=torch.bool)
        keep_E[self.kept_K.cpu()] = True
        return keep_E

    def narrow(self, keep_E: Tensor, surgery: Surgery) -> None:
        """Know of these experts alone."""
        known_E = self.known()
        assert known_E is not None
        left_E = known_E[keep_E]
        surgery.set_attribute(self, "experts", len(left_E))
        surgery.set_attribute(self, "kept_K", torch.nonzero(left_E).flatten().to(self.kept_K.device))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output in place of the module's own; nothing reads it where all experts are gone with their block."""
        if len(self.kept_K) in (0, self.experts):
            return output
        weight = next(module.parameters(recurse=False))
        self.kept_K = self.kept_K.to(weight.device)  # copied once after every change
        found = self._small(module).forward(*args, **kwargs)
        if isinstance(found, Tensor):
            return self._widened(found, output, -torch.inf)
        chooses = any(isinstance(one, Tensor) and not one.is_floating_point() for one in found)
        fills = [-torch.inf if chooses else 0.0, *[0.0] * (len(found) - 1)]
        return type(found)(self._widened(*parts) for parts in zip(found, output, fills, strict=True))

    def _widened(self, found: Any, whole: Any, fill: float) -> Any:
        """Numbers of experts as the model counts them; ``fill`` for the masked, where there is an entry for each."""
        if not isinstance(found, Tensor):
            return found
        if not found.is_floating_point():
            return self.kept_K[found]
        if found.shape[-1] == whole.shape[-1]:
            return found
        return found.new_full(whole.shape, fill).index_copy(found.dim() - 1, self.kept_K, found)

    def _small(self, module: nn.Module) -> nn.Module:
        """A router of the same code whose tensors have the kept rows alone; it shares all else."""
        small = type(module).__new__(type(module))
        own = vars(small)
        own.update(vars(module))
        own.update(_parameters={}, _buffers={})
        for name, one in {**module._parameters, **module._buffers}.items():
            own[name] = self._rows(one)
        own.update({name: len(self.kept_K) for name in COUNTS if own.get(name) == self.experts})
        return small

    def _rows(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dim() == 0 or len(tensor) != self.experts:
            return tensor
        return tensor.index_select(0, self.kept_K)

    def __reduce__(self) -> Any:
        """A copy or a pickled model keeps one that does nothing, unless it came with a file."""
        return KeptExperts, (self.experts,), vars(self) if self.saved else None


class RouterHooks(KeptHooks[KeptExperts]):
    """Routers choose among the experts that are kept.

    Args:
        model: the model.
        routers: block -> name of its router.
        kept: masks -> block -> which of its experts are kept.
    """

    def __init__(
        self, model: nn.Module, routers: Mapping[str, str], kept: Callable[[Tensor], Mapping[str, Tensor]]
    ) -> None:
        super().__init__(model, kept)
        self.routers = routers

    def hooked(self, name: str, keep_N: Tensor, device: torch.device) -> tuple[KeptExperts, RemovableHandle]:
        """Give the router of a block its hook."""
        hook = KeptExperts(len(keep_N))
        return hook, self.module_of(name).register_forward_hook(hook, with_kwargs=True)

    def module_of(self, name: str) -> nn.Module:
        """The router of a block."""
        return self.model.get_submodule(self.routers[name])

    def mask(self, keep_G: Tensor, device: torch.device) -> None:
        """Take new masks (on the CPU)."""
        super().mask(keep_G, device)
        if self._hooks:  # compiled for as many rows as were kept before
            forget_compiled(self.model)
