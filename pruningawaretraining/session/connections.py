"""The part of the facade that connects a pruner with optimizers and exported graphs of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pruningawaretraining.engine.removal import spare
from pruningawaretraining.models.exported_graph import ExportedGraph
from pruningawaretraining.session.arguments import check_own, optimizers_of
from pruningawaretraining.session.bound import Bound


class Connections(Bound):
    """Optimizers and graphs of the model."""

    @property
    def steps(self) -> int:
        """Number of real optimizer steps so far; reading it waits for the device."""
        return self._steps.count

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Make masks and regularisers act in every step of an optimizer, and removals keep its state.

        Raises:
            ConfigError: it is not an optimizer, or belongs to another model.
        """
        for one in optimizers_of(optimizer):
            check_own(one, self._session.model)
            self._steps.attach(one)

    def follow(self, graph: nn.Module) -> None:
        """Prune a graph, too, that was exported from the model and prepared for quantization-aware training.

        The graph is trained and the pruner looks at the model: both have the same parameters. Masks hold in the graph,
        and a removal slices its fake quantizers as well.

        Args:
            graph: what ``torch.export.export(model, inputs).module()`` gives, prepared by a quantizer or not.

        Raises:
            ModelError: it is no such graph, was exported from another model or copied, does not run on the example
                inputs, or has a norm over channels that may be masked.
        """
        graphs = self._session.graphs
        if not any(known.graph is graph for known in graphs):
            one = ExportedGraph(self._session.model, graph)
            if self._session.prunes_coupled:
                spare(self._session.coupled, one)
            graphs.append(one)

    def apply_masks(self) -> None:
        """Apply the masks again after weights have come from elsewhere: set masked weights to 0.

        ``prune``, ``report``, ``save_pruned``, ``export_onnx`` and ``on_train_end`` do it by themselves. Parameters
        that have been exchanged (``load_state_dict(..., assign=True)``, another layer of the same shape) are masked by
        their names.

        Raises:
            ModelError: a masked layer is gone, or has another shape; it is named.
        """
        self._settle()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Optimizer steps inside the block do not count as training steps: some tools take one to create an
        optimizer's state."""
        self._steps.paused = True
        try:
            yield
        finally:
            self._steps.paused = False
