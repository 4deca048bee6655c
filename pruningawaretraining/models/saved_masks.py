"""Masks of a model that was saved while it was masked: hooks that go on telling its modules what is kept.

Shape suffixes: ``_N`` entries of one module: channels of a norm, experts of a router.

Zeros in the weights are not all that a mask does: norms over channels take their statistics over the kept ones, and
routers choose among the kept experts. A file says which these are, and the loaded model has the same hooks, for good.
A pruner that goes on with the model adds its own masks to them, and a removal narrows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.models.kept_hooks import known_of, saved_hooks
from pruningawaretraining.models.kept_reductions import drop_saved, put_saved, reductions_of
from pruningawaretraining.models.masked_norms import kept_norm_of
from pruningawaretraining.models.masked_routers import KeptExperts
from pruningawaretraining.models.reduction_sites import Site
from pruningawaretraining.models.surgery import Surgery

CHANNELS, EXPERTS, REDUCED = "channels", "experts", "reductions"


def masked_modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Plain data of the modules that have to know which of their entries are masked, where any is.

    Returns:
        Name of a module, or of reductions in its code -> ``of``, what its entries are; ``size``, how many there are;
        ``kept``, the numbers of those that are kept; ``behind``, how many dimensions come after them.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        known = [(hook, keep_N) for hook in module._forward_hooks.values() if (keep_N := known_of(hook)) is not None]
        if not known:
            continue
        keep_N = torch.stack([one for _, one in known]).all(0)
        if not bool(keep_N.all()):
            hooks = [hook for hook, _ in known]
            found[name] = {
                "of": EXPERTS if isinstance(hooks[-1], KeptExperts) else CHANNELS,
                "size": len(keep_N),
                "kept": torch.nonzero(keep_N).flatten().tolist(),
                "behind": max(one.behind for one in hooks),
            }
    return {**found, **_reduced(model)}


def _reduced(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The same of reductions in the code of modules."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        for site in {site for hook in reductions_of(module) for site in hook.parts}:
            parts = [hook.parts[site] for hook in reductions_of(module) if site in hook.parts]
            known = [keep_N for one in parts if (keep_N := one.known()) is not None]
            keep_N = torch.stack(known).all(0) if known else torch.ones(1, dtype=torch.bool)
            if not bool(keep_N.all()):
                kept = torch.nonzero(keep_N).flatten().tolist()
                of = {"of": REDUCED, "size": len(keep_N), "kept": kept, "behind": parts[0].behind}
                found[site.within(name)] = of
    return found


def put_masks(model: nn.Module, masked: Mapping[str, Mapping[str, Any]], surgery: Surgery) -> None:
    """Give modules the hooks that a file says they had, and take out those of a file that was loaded before.

    Args:
        model: with the tensors of the file.
        masked: see :func:`masked_modules`.
        surgery: remembers the changes.

    Raises:
        CheckpointError: a module that the model does not have, or that mixes no channels.
    """
    modules = dict(model.named_modules())
    for module in modules.values():
        for key, _ in saved_hooks(module):
            surgery.drop_key(module._forward_hooks, key)
        drop_saved(module, surgery)
    for part, one in masked.items():
        name, site = Site.of(part) if one["of"] == REDUCED else (part, None)
        make = kept_norm_of(modules[name]) if name in modules else None
        if name not in modules or (one["of"] == CHANNELS and make is None):
            raise CheckpointError(f"model: {name!r} has no {one['of']} that could be masked; the file says it has")
        module = modules[name]
        tensors = (*module.parameters(), *module.buffers())
        device = tensors[0].device if tensors else torch.device("cpu")
        keep_N = torch.zeros(one["size"], dtype=torch.bool)
        keep_N[torch.tensor(one["kept"])] = True
        if site is not None:
            put_saved(module, site, keep_N, device, surgery)
            continue
        hook: Any = KeptExperts(one["size"]) if make is None or one["of"] == EXPERTS else make(module, device)
        hook.take(keep_N.reshape(-1, *[1] * one["behind"]), device)
        hook.saved = True
        handle = module.register_forward_hook(hook, with_kwargs=isinstance(hook, KeptExperts))
        surgery.when_undone(handle.remove)
