"""Weights that a layer computes of other tensors: by a parametrization, or by the hooks of older releases.

Their own tensors are no weights: a channel of zeros in the direction of ``weight_norm`` is divided by its norm, which
is 0, and a whole layer of zeros by that of ``spectral_norm``: NaN in the next forward pass.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, spectral_norm, weight_norm

PARAMETRIZED = "torch.nn.utils.parametrize.remove_parametrizations"
NORMALISING = nn.utils.parametrizations.__name__
COMPUTED = "is computed in every forward pass"
_HOOKS = {
    weight_norm.__module__: "torch.nn.utils.remove_weight_norm",
    spectral_norm.__module__: "torch.nn.utils.remove_spectral_norm",
    prune.__name__: "torch.nn.utils.prune.remove",
}
"""Where the classes of such hooks are -> what takes one out."""


def why_computed(module: nn.Module, name: str = "weight") -> str:
    """Why a tensor of a layer is not a weight that can be pruned, and what makes it one; "" if it is one.

    Args:
        module: the layer.
        name: of its tensor.
    """
    if parametrize.is_parametrized(module, name):
        return f"its {name} is parametrized; {PARAMETRIZED} first makes it prunable"
    for hook in module._forward_pre_hooks.values():
        way = _HOOKS.get(_home(hook))
        if way is not None and name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            return f"its {name} is parametrized; {way} first makes it prunable"
    own = {**module._parameters, **module._buffers}
    if name not in own and isinstance(getattr(module, name, None), Tensor):
        return f"its {name} {COMPUTED}"
    return ""


def why_normalised(model: nn.Module, name: str) -> str:
    """Why zeros in a parameter may become NaN: it is normalised before it is used; "" if it is not.

    Args:
        model: the model.
        name: of the parameter.
    """
    owner, marker, rest = f".{name}".partition(".parametrizations.")
    if marker:
        key = rest.rpartition(".")[0]
        layer = model.get_submodule(owner.removeprefix("."))
        kinds = getattr(layer.parametrizations, key, ())
        return why_computed(layer, key) if any(_home(one) == NORMALISING for one in kinds) else ""
    owner, _, own = name.rpartition(".")
    layer, (key, _, ending) = model.get_submodule(owner), own.rpartition("_")
    if ending not in ("g", "v", "orig"):
        return ""
    found = why_computed(layer, key)
    return "" if _HOOKS[prune.__name__] in found or "_norm" not in found else found


def _home(one: object) -> str:
    """The module in which an object's class is defined, or one that it inherits from within torch."""
    homes = [kind.__module__ for kind in type(one).__mro__]
    return next((home for home in homes if home in (*_HOOKS, NORMALISING)), homes[0])
