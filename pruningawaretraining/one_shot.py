"""One-shot pruning for users: :func:`one_shot`, ``AfterPruning`` and ``accuracy``, imported when first used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from pruningawaretraining.config.schema import Rule
    from pruningawaretraining.criteria.second_order.gradients import LossFn
    from pruningawaretraining.session.one_shot import AfterPruning, accuracy

__all__ = ["AfterPruning", "accuracy", "one_shot"]


def one_shot(
    model: nn.Module,
    rule: Rule | Mapping[str, Any],
    dataloader: Iterable[Any],
    loss_fn: LossFn,
    sparsities: Sequence[float] | None = None,
    *,
    after: AfterPruning | None = None,
) -> dict[float, nn.Module]:
    """Prune a trained model at once, to one sparsity or to several, all from one collection of gradients.

    Args:
        model: the model; it is unchanged.
        rule: what to prune: pattern, layers, criterion, scope and bounds of a rule; its schedule is not used. Criteria
            that listen to training (snip, taylor, wanda, variance ...) listen to 64 micro-batches.
        dataloader: batches ``(inputs, targets)``, or mappings of keyword inputs with "labels".
        loss_fn: ``(outputs, targets) -> loss``.
        sparsities: fractions to remove; None for the rule's target. Where that is of MACs, parameters, memory or
            latency, channels go by the rule's ``allocation`` until it is met.
        after: what follows the pruning; without a compensation of its own the rule's.

    Returns:
        A pruned copy of the model for each sparsity (the one that came out, where the target is of a cost). Pruned
        weights are exactly 0; channels are removed.

    Raises:
        ConfigError, ModelError, TargetError: an option, layer, batch or sparsity that cannot be used; it is named.
    """
    from pruningawaretraining.session import one_shot as session

    return session.one_shot(model, rule, dataloader, loss_fn, sparsities, after=after or session.AfterPruning())


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pruningawaretraining.session import one_shot as session

    return getattr(session, name)
