"""Say which entries of layers match nothing in a model, where they may."""

from __future__ import annotations

import logging

from torch import nn

from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.patterns.selection import OPTIONAL, select

logger = logging.getLogger(__name__)


def tell_of_unmatched(model: nn.Module, config: PruningConfig) -> None:
    """Warn of entries with a ``?`` in front that match nothing, as the file has them.

    Args:
        model: the model.
        config: its rules.
    """
    for number, rule in enumerate(config.rules):
        if not rule.enabled:
            continue
        key = rule.name or f"rules[{number}]"
        for field, entries in (("layers", rule.layers or ()), ("exclude", rule.exclude)):
            for entry in entries:
                if not entry.startswith(OPTIONAL):
                    continue
                try:
                    select(model, [entry.removeprefix(OPTIONAL)], (), f"{key}.{field}")
                except ConfigError as error:
                    logger.warning("%s: it may match nothing, and does", config.origin.told(str(error)))
