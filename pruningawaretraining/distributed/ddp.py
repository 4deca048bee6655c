"""DistributedDataParallel made anew once a model has lost channels, with the options that it had."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining.errors import ModelError

KEPT_OPTIONS: dict[str, Any] = {
    "device_ids": None,
    "output_device": None,
    "dim": 0,
    "broadcast_buffers": True,
    "find_unused_parameters": False,
    "gradient_as_bucket_view": False,
    "static_graph": False,
    "mixed_precision": None,
    "skip_all_reduce_unused_params": False,
}
"""Options of DistributedDataParallel that it keeps under their names, with their defaults."""


def rewrap_in_place(wrapped: nn.Module) -> None:
    """Make an outdated DistributedDataParallel anew where it is, with its options and hooks.

    DistributedDataParallel holds on to the parameters that it was made with. Whoever holds the wrapper, a task or a
    saver, has the new one then: a second wrapper would leave the first with its hooks on the parameters that stay.

    Args:
        wrapped: the wrapper, on every process; anything else, and one that is up to date, stays as it is.

    Raises:
        ModelError: its gradients are delayed.
    """
    inner = wrapped._orig_mod if hasattr(wrapped, "_orig_mod") else wrapped
    if not isinstance(inner, DistributedDataParallel) or not outdated(inner):
        return
    if getattr(inner, "_delay_all_reduce_params", None):
        raise ModelError("model: its gradients are delayed (delay_all_reduce_named_params). Allowed: wrap it by hand")
    options, hooks = _options_of(inner), list(getattr(inner, "_comm_hooks", ()))
    training, synchronises, module = inner.training, inner.require_backward_grad_sync, inner.module
    users = {name: value for name, value in vars(inner).items() if name.endswith("_hooks") and isinstance(value, dict)}
    DistributedDataParallel.__init__(inner, module, **options)
    vars(inner).update(users)
    for hook, state in hooks:
        inner.register_comm_hook(state, hook)
    inner.training, inner.require_backward_grad_sync = training, synchronises


def _options_of(wrapped: DistributedDataParallel) -> dict[str, Any]:
    """The options that a wrapper was made with, as far as this version of PyTorch has them."""
    found = {name: getattr(wrapped, name, default) for name, default in KEPT_OPTIONS.items()}
    options = {name: value for name, value in found.items() if value != KEPT_OPTIONS[name]}
    if getattr(wrapped, "device_mesh", None) is not None:
        options["device_mesh"] = wrapped.device_mesh
    else:
        options["process_group"] = wrapped.process_group
    bytes_cap = getattr(wrapped, "bucket_bytes_cap", None)
    if bytes_cap is not None and not getattr(wrapped, "bucket_bytes_cap_default", False):
        options["bucket_cap_mb"] = bytes_cap / (1024 * 1024)
    return options


def outdated(wrapped: nn.Module) -> bool:
    """Whether a DistributedDataParallel no longer averages the gradients of the parameters that its module has."""
    if hasattr(torch, "_dynamo") and isinstance(wrapped, torch._dynamo.OptimizedModule):
        return outdated(wrapped._orig_mod)
    if not isinstance(wrapped, DistributedDataParallel):
        return False
    known = {id(one) for one in getattr(wrapped, "_module_parameters", ())}
    ignored = set(getattr(wrapped, "parameters_to_ignore", ()))
    now = [one for name, one in wrapped.module.named_parameters() if one.requires_grad and name not in ignored]
    there = {id(one) for one in wrapped.module.parameters()}
    return any(id(one) not in known for one in now) or not known <= there
