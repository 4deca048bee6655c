"""Masks: the groups that are switched off while training goes on.

Shape suffixes: ``_G`` groups, ``_C`` channels of a norm layer, ``_W`` any weight.

A masked group is 0 in every member, the input columns of its consumers included, so an activation with f(0) != 0 does
no harm. Norms that mix channels (LayerNorm, GroupNorm) compute their statistics over the kept channels, through a
forward hook, so that the masked model equals the removed one; and a whole block that is masked hands on its input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.distributed.fsdp import is_sharded, part_of
from pruningawaretraining.groups import kernels as fused
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.masks.mask_factors import MaskFactors
from pruningawaretraining.models.compiling import forget_compiled
from pruningawaretraining.models.masked_norms import KeptNorm, kept_norm_of
from pruningawaretraining.models.optimizer_state import mask_state
from pruningawaretraining.models.skipped_blocks import Block, Bypass


class Masks:
    """Holds and applies the masks of one grouping.

    Args:
        model: the model.
        grouping: its groups; buffers are never masked, so that a norm's statistics survive.
        norms: norm layer -> group of each channel (``grouping.size`` for none), for norms that mix channels.
        spared: tensors that are not masked: what an exported graph divides by.
        blocks: residual blocks that are groups; a masked one hands on its input.
    """

    def __init__(
        self,
        model: nn.Module,
        grouping: Grouping,
        norms: Mapping[str, Tensor] | None = None,
        spared: frozenset[str] = frozenset(),
        blocks: Mapping[str, Block] | None = None,
    ) -> None:
        self.grouping = grouping.without_role("buffer").without_tensors(spared)
        self.model = model
        self.norms = dict(norms or {})
        self.blocks = dict(blocks or {})
        self.keep_G = torch.ones(grouping.size, dtype=torch.bool)
        self._handles: list[RemovableHandle] = []
        self._gradient_handles: list[RemovableHandle] = []
        self._norm_hooks: dict[str, KeptNorm] = {}
        self._block_handles: dict[str, RemovableHandle] = {}
        self._factors = MaskFactors()
        self._cleared: list[_Cleared] = []
        self._keep_on: dict[torch.device, Tensor] = {}

    @property
    def active(self) -> bool:
        """Whether anything is masked."""
        return bool(self._factors)

    def keep_on(self, device: torch.device) -> Tensor:
        """``keep_G`` on a device, copied there once after every change."""
        if device not in self._keep_on:
            self._keep_on[device] = self.keep_G.to(device)
        return self._keep_on[device]

    def set(self, keep_G: Tensor) -> None:
        """Take new masks (True = keep) and zero what they switch off."""
        self.keep_G = keep_G.detach().cpu().bool().clone()
        self._keep_on = {}
        self._build_factors()
        self._hook_gradients()
        self._hook_norms()
        self._hook_blocks()
        self.apply()

    def clear(self) -> None:
        """Forget the masks and take the hooks out; the weights stay as they are."""
        self.keep_G = torch.ones_like(self.keep_G)
        self._keep_on, self._factors, self._cleared = {}, MaskFactors(), []
        self._hook_gradients()
        self._hook_blocks()
        self._unhook()

    def _build_factors(self) -> None:
        self._factors, self._cleared = MaskFactors(), []
        if bool(self.keep_G.all()):
            return
        parameters, factors = [], []
        for member, keep_W in self.grouping.expand(self.keep_G.float(), outside=1.0):
            if bool((keep_W == 0).any()):
                parameters.append(member.parameter)
                factors.append(_for_multiplication(member, keep_W))
        self._factors = MaskFactors(parameters, factors)
        on_the_cpu = all(one.device.type == "cpu" and not is_sharded(one) for one in parameters)
        if on_the_cpu and fused.kernels() is not None:
            self._cleared = _cleared(parameters, factors)

    @torch.no_grad()
    def apply(self) -> None:
        """Set masked weights to exactly 0."""
        if not self._factors:
            return
        kernels = fused.kernels()
        if kernels is not None and self._cleared and all(fused.fits(one.parameter) for one in self._cleared):
            for one in self._cleared:
                kernels.clear(fused.as_matrix(one.parameter.detach()), one.cleared_O, one.columns)
                torch.autograd.graph.increment_version(one.parameter)
            return
        self._factors.multiply()

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Set the gradients of masked weights to 0, so that they enter no norm and no moving average."""
        self._factors.multiply_gradients()

    @torch.no_grad()
    def apply_to_state(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Set the optimizers' state of masked weights (momenta, averages) to 0."""
        mask_state(optimizers, self._factors.parameters, self._factors.factors)

    def _hook_gradients(self) -> None:
        """Mask gradients as they are accumulated, so that a norm taken between backward and step has none of them.

        Only parameters with masked entries are hooked, and only while they have some.
        """
        for handle in self._gradient_handles:
            handle.remove()
        self._gradient_handles = []
        for parameter in {id(one): one for one in self._factors.parameters}.values():
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(self._mask_gradient)  # type: ignore[no-untyped-call]
                self._gradient_handles.append(handle)

    @torch.no_grad()
    def _mask_gradient(self, parameter: Tensor) -> None:
        self._factors.accumulated(parameter)

    def settle(self) -> None:
        """Gradients are about to be used: mask those of which that has been left for later."""
        self._factors.settle()

    def _hook_norms(self) -> None:
        """Let norms over channels know which are kept: all of them, once one has to.

        A hook that is there is only told, so that nothing has to be compiled anew.
        """
        keep_G1 = torch.cat([self.keep_G, torch.ones(1, dtype=torch.bool)])
        modules = dict(self.model.named_modules())
        keep_of = {name: keep_G1[groups_C] for name, groups_C in self.norms.items() if kept_norm_of(modules[name])}
        if not self._norm_hooks and not all(bool(keep_C.all()) for keep_C in keep_of.values()):
            device = next((one.device for one in self._factors.parameters), torch.device("cpu"))
            for name in keep_of:
                make = kept_norm_of(modules[name])
                assert make is not None
                self._norm_hooks[name] = hook = make(modules[name], device)
                self._handles.append(modules[name].register_forward_hook(hook))
            forget_compiled()
        for name, hook in self._norm_hooks.items():
            hook.keep_C.copy_(keep_of[name])

    def _hook_blocks(self) -> None:
        """Let masked blocks hand on their input, and no others."""
        masked = {name for name, one in self.blocks.items() if not bool(self.keep_G[one.group])}
        if masked == self._block_handles.keys():
            return
        for name in self._block_handles.keys() - masked:
            self._block_handles.pop(name).remove()
        modules = dict(self.model.named_modules())
        for name in masked - self._block_handles.keys():
            hook = Bypass(self.blocks[name].outputs)
            self._block_handles[name] = modules[name].register_forward_hook(hook, with_kwargs=True)
        forget_compiled()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._norm_hooks = [], {}


@dataclass(frozen=True, eq=False)
class _Cleared:
    """The rows and columns of a parameter that are masked, as numpy arrays."""

    parameter: Tensor
    cleared_O: Any
    columns: Any


def _cleared(parameters: list[Tensor], factors: list[Tensor]) -> list[_Cleared]:
    """What to set to 0, one entry for each parameter; nothing if some mask is not one of rows or columns."""
    found: dict[int, tuple[Tensor, Tensor, list[Tensor]]] = {}
    for parameter, factor in zip(parameters, factors, strict=True):
        rows, columns = torch.zeros(len(parameter), dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
        masked = (factor == 0).cpu()
        if masked.numel() == len(parameter) == len(masked):
            rows = masked.reshape(-1)
        elif len(masked) == 1 and masked.numel() * len(parameter) == parameter.numel():
            columns = torch.nonzero(masked.reshape(-1)).flatten()
        else:
            return []
        _, known_rows, known_columns = found.setdefault(id(parameter), (parameter, torch.zeros_like(rows), []))
        known_rows |= rows
        known_columns.append(columns)
    return [_Cleared(one, rows.numpy(), torch.cat(columns).numpy()) for one, rows, columns in found.values()]


def _for_multiplication(member: Member, keep_W: Tensor) -> Tensor:
    """The mask in the weight's dtype, shaped so that the multiplication's inner loops are long."""
    shape = list(keep_W.shape)
    if len(shape) > 2 and shape[0] == 1:  # input columns of a convolution: spell out the kernel
        shape[2:] = member.parameter.shape[2:]
    keep_W = keep_W.to(member.parameter.device, member.parameter.dtype).expand(shape)
    return part_of(member.parameter, keep_W).contiguous()
