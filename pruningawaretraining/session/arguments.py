"""Validate the arguments of users before anything is done with them."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pruningawaretraining.distributed.fsdp import any_sharded, check_plan
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.models.calling import ForwardFn
from pruningawaretraining.models.exported_graph import is_exported
from pruningawaretraining.models.optimizer_state import latest
from pruningawaretraining.models.trees import tensors_of
from pruningawaretraining.session.averages import module_in


def optimizers_of(given: Any) -> list[torch.optim.Optimizer]:
    """None, an optimizer or a list of them, as a list of those whose steps can be hooked: for wrappers what is inside.

    Raises:
        ConfigError: it is something else.
    """
    if given is None:
        return []
    several = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    found = [(one, _hookable(one)) for one in several]
    for one, inner in found:
        if inner is None:
            raise ConfigError(
                f"optimizer: {one!r} is a {type(one).__name__}. Allowed: a torch.optim.Optimizer, a wrapper of one, or "
                "several"
            )
    return [inner for _, inner in found if inner is not None]


def _hookable(one: Any, depth: int = 3) -> torch.optim.Optimizer | None:
    """The optimizer whose step can be hooked: this one, or the one inside a wrapper."""
    held = getattr(one, "__dict__", {})
    if "_optimizer_step_pre_hooks" in held:
        inner: torch.optim.Optimizer = one
        return inner
    if depth == 0:
        return None
    found = (_hookable(value, depth - 1) for value in held.values() if hasattr(value, "step"))
    return next((one for one in found if one is not None), None)


def check_own(optimizer: Any, model: nn.Module) -> None:
    """Refuse an optimizer that holds no parameter of the model, or of what the model was before a removal.

    Raises:
        ConfigError: it trains another model, or copies of the parameters.
    """
    held = [one for group in getattr(optimizer, "param_groups", ()) for one in group["params"]]
    mine = {id(one) for one in model.parameters()}
    if held and not any(id(latest(one)) in mine for one in held):
        raise ConfigError(
            f"optimizer: {type(optimizer).__name__} holds no parameter of the {type(model).__name__}: it trains "
            "another model, or copies. Allowed: an optimizer of model.parameters()"
        )


def nothing() -> None:
    """Do nothing; what before_removal and after_removal are until the user gives functions."""


def nothing_of(one: object) -> None:
    """Do nothing; what on_member is until the user gives a function."""


def check_found_by_parameter(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, told: bool) -> None:
    """Refuse a removal whose new parameters the user's own hooks would not find.

    Args:
        optimizers: those of the model.
        model: hooks on its parameters may step an optimizer each, in the backward pass.
        told: whether the user has given a function that is called after the removal.

    Raises:
        ModelError: there is one optimizer for each parameter, and nobody is told of the new ones.
    """
    sizes = [sum(len(group["params"]) for group in one.param_groups) for one in optimizers]
    if told or len(sizes) < 2 or max(sizes) > 1:
        return
    for parameter in model.parameters():
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        if any(not isinstance(getattr(one, "__self__", None), Masks) for one in hooks.values()):
            raise ModelError(
                "removal: hooks step one optimizer for each parameter, and find it by the parameter, which a removal "
                "exchanges. Allowed: pruner.after_removal = a function that makes that dict again, from "
                "optimizer.param_groups[0]['params'][0]"
            )


def followers_of(given: Any) -> list[nn.Module]:
    """The modules of None, a moving average of the model or a list of them; an object is looked through for its module.

    Raises:
        ConfigError: it is something else.
    """
    modules = []
    for one in given_averages(given):
        module = module_in(one)
        if module is None:
            raise ConfigError(
                f"ema: {one!r} is a {type(one).__name__}. Allowed: a torch.nn.Module, such as AveragedModel, or "
                "several. An average in lists or dicts of tensors cannot follow: make it anew in pruner.after_removal"
            )
        modules.append(module)
    return modules


def given_averages(given: Any) -> list[Any]:
    """None, an average or a list of them, as a list; not looked through."""
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def epoch_of(given: Any) -> int:
    """An epoch or step as an int; numbers of NumPy and PyTorch are welcome.

    Raises:
        ConfigError: it is no whole number of 0 or more.
    """
    try:
        epoch = None if isinstance(given, bool) else operator.index(given)
    except TypeError:
        whole = isinstance(given, float) and given.is_integer()
        epoch = int(given) if whole else None
    if epoch is None or epoch < 0:
        raise ConfigError(f"epoch: {given!r} is not allowed. Allowed: a whole number, 0 or more: epochs count from 0")
    return epoch


def check_inputs(given: Any) -> None:
    """Refuse example inputs in which there is no tensor, or one that shows nothing.

    Raises:
        ModelError: there is no tensor (a shape is said to be one), or a tensor is empty, or not finite.
    """
    tensors = [] if given is None else list(tensors_of(given))
    for tensor in tensors:
        if tensor.numel() == 0:
            raise ModelError(f"example_inputs: a tensor of shape {tuple(tensor.shape)} is empty. Allowed: one example")
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise ModelError("example_inputs: a tensor holds NaN or infinity, with which no removal can be checked")
    if given is None or tensors:
        return
    sizes = isinstance(given, (list, tuple)) and len(given) > 0 and all(isinstance(one, int) for one in given)
    meant = f": for a shape, torch.randn{tuple(given)}" if sizes else ""
    raise ModelError(
        f"example_inputs: {given!r} holds no tensor. Allowed: a tensor, a tuple of positional inputs or a dict of "
        f"keyword inputs{meant}"
    )


def check_model(given: Any, key: str = "model") -> None:
    """Refuse anything but a module.

    Raises:
        ModelError: it is no ``nn.Module``.
    """
    if not isinstance(given, nn.Module):
        raise ModelError(f"{key}: {given!r} is a {type(given).__name__}. Allowed: a torch.nn.Module")


def check_given(model: Any, teacher: Any, example_inputs: Any) -> None:
    """Check the arguments of a new pruner.

    Raises:
        ModelError: a model or teacher is not a module, or example inputs without a tensor.
    """
    if model is not None:
        check_model(model)
    if teacher is not None:
        check_model(teacher, "teacher")
    check_inputs(example_inputs)


def check_prunable(model: Any) -> None:
    """Refuse models in which nothing can be traced.

    Raises:
        ModelError: it is no module, an exported graph, or sharded already.
    """
    check_model(model)
    if is_exported(model):
        raise ModelError(
            f"model: {type(model).__name__} is a graph that torch.export made; its layers are gone. Give the model "
            "that it was exported from, and then the graph: pruner.follow(graph)"
        )
    if any_sharded(model):
        check_plan(model)
        raise ModelError(
            f"model: fully_shard has spread the {type(model).__name__} already, and its channels cannot be traced. "
            "Allowed: make the Pruning first, then fully_shard(model), then the optimizer"
        )


@dataclass(frozen=True)
class Given:
    """Arguments of a pruner beside its model and config.

    Args:
        forward_fn: how to run the model, if not as ``model(*inputs)``.
        inputs: example inputs, or None until the model shows some.
        averages: moving averages, as they were given.
        teacher: for distillation.
        before_removal: called when the model is masked as it will be removed.
        after_removal: called when channels have gone.
        changed: called after every event.
        member_done: called when a family's member is finished.
    """

    forward_fn: ForwardFn | None
    inputs: Any
    averages: list[Any]
    teacher: nn.Module | None
    before_removal: Callable[[], None]
    after_removal: Callable[[], None]
    changed: Callable[[], None]
    member_done: Callable[[], None]


def weak_call(owner: Any, name: str) -> Callable[[], Any]:
    """A function of nothing that calls a method of an object while it is there, and does not keep it alive."""
    this = weakref.ref(owner)

    def call() -> Any:
        owner = this()
        return None if owner is None else getattr(owner, name)()

    return call
