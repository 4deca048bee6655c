"""Coupled channels of a model: the closure of Torch-Pruning's dependency graph.

Torch-Pruning traces the model into nodes (layers and operations) and dependencies between their channel indices. It
then walks that graph once for every root layer. Here every dependency is followed once, with whole index vectors, and
the coupled channels are the connected components: several roots that reach one index are merged, nothing is walked
twice, and an index mapping that disagrees with a layer's width is noticed instead of followed for ever.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch_pruning import ops
from torch_pruning.dependency import index_mapping as mappings
from torch_pruning.dependency import shape_infer

from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.calling import ForwardFn, checked_call, differentiable, evaluating, is_out_of_memory
from pruningawaretraining.models.trees import float_tensors_of
from pruningawaretraining.patterns.coupling import (
    MIXING_OPERATIONS,
    TRACE_LIMIT,
    Deadline,
    DependencyMap,
    Indices,
    Space,
    has_multiplier,
    ties,
)
from pruningawaretraining.patterns.index_mappings import map_indices
from pruningawaretraining.patterns.projections import is_transposed_linear
from pruningawaretraining.patterns.training_parts import mode_to_trace

UNSUPPORTED_TYPES = {
    ops.OPTYPE.MHA: "multi-head attention (prune it by heads)",
    ops.OPTYPE.LSTM: "a recurrent layer",
    ops.OPTYPE.CUSTOMIZED: "a layer with a pruner of its own",
}


def trace(
    model: nn.Module, inputs: Any, forward_fn: ForwardFn | None = None, limit: float = TRACE_LIMIT
) -> DependencyMap:
    """Trace a model and find its coupled channels.

    The model's parameters, modes, gradients and hooks are left as they were.

    Args:
        model: the model, on any device.
        inputs: example inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        forward_fn: see :func:`pruningawaretraining.models.calling.call`.
        limit: seconds that it may take; channels that are not followed to their end by then are blocked.

    Raises:
        ModelError: the model rejects the inputs, or Torch-Pruning cannot trace it.
    """
    deadline = Deadline(limit)
    graph = _build_graph(model, inputs, forward_fn)
    problems = graph.map_indices(deadline)
    closure = _Closure(graph, {module: name for name, module in model.named_modules()}, problems, deadline)
    closure.run()
    return closure.result()


def _build_graph(model: nn.Module, inputs: Any, forward_fn: ForwardFn | None) -> _Graph:
    mode = mode_to_trace(model, inputs, forward_fn)

    def forward(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
        # The clone gives every output an operation of its own, so that a final layer is seen to feed an output.
        with mode(model):
            outputs = [tensor.clone() for tensor in float_tensors_of(checked_call(model, inputs, forward_fn))]
        return [tensor for tensor in outputs if tensor.grad_fn is not None]

    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.enable_grad(), evaluating(model), differentiable(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Graph()
            graph.build_dependency(
                model,
                inputs,
                forward_fn=forward,
                customized_pruners={
                    type(module): _TransposedLinearPruner()
                    for module in model.modules()
                    if is_transposed_linear(module)
                },
                ignored_layers=[],
                ignored_params=[],
                verbose=False,
            )
            return graph
    except ModelError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"model: the dependency graph of {type(model).__name__} cannot be traced: {type(error).__name__}: {error}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class _Graph(tp.DependencyGraph):  # type: ignore[misc]
    """Torch-Pruning's graph, whose index mappings are made node by node: one that fails blocks its own channels."""

    def _build_dependency(self, module2node: dict[Any, Any]) -> None:
        super()._build_dependency(module2node)
        self.nodes = module2node
        self.module2node: dict[Any, Any] = {}  # nothing for it to go through now; see map_indices

    def map_indices(self, deadline: Deadline) -> dict[Any, str]:
        """Make the mappings of concatenations, splits and reshapes; node -> why it has none."""
        problems: dict[Any, str] = {}
        for step in (shape_infer.init_shape_information, mappings.update_index_mapping):
            for module, node in self.nodes.items():
                if deadline.passed:
                    problems.setdefault(node, deadline.reason)
                    continue
                self.module2node = {module: node}
                try:
                    step(self)
                except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
                    problems.setdefault(node, f"an operation whose channels are not understood ({error})")
        self.module2node = self.nodes
        return problems


class _TransposedLinearPruner(tp.BasePruningFunc):  # type: ignore[misc]
    """Tells Torch-Pruning how wide a linear layer with a weight of (inputs, outputs) is; we slice it ourselves."""

    def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
        return layer

    def get_out_channels(self, layer: Any) -> int:
        return int(layer.weight.shape[1])

    def get_in_channels(self, layer: Any) -> int:
        return int(layer.weight.shape[0])


class _Closure:
    """Follows every dependency once and unites the channels that it couples."""

    def __init__(
        self, graph: _Graph, names: dict[nn.Module, str], problems: dict[Any, str], deadline: Deadline
    ) -> None:
        self.graph, self.names = graph, names
        self.problems, self.deadline = problems, deadline
        self.spaces: dict[tuple[Any, Callable[..., Any]], Space] = {}
        self.edges: list[tuple[Space, Indices, Space, Indices]] = []
        # No operation between layers has more channels than the widest layer: an index beyond is a mapping gone astray.
        self.longest = _widest(names)

    def run(self) -> None:
        work: deque[tuple[Any, Callable[..., Any], Indices]] = deque()
        for module, node in self.graph.module2node.items():
            known = isinstance(module, (ops.TORCH_CONV, nn.Linear, nn.Embedding, nn.Parameter))
            if known or is_transposed_linear(module):
                pruner = self.graph.get_pruner_of_module(module)
                for handler in (pruner.prune_out_channels, pruner.prune_in_channels):
                    space = self._space(node, handler)
                    self._reach(space, np.arange(space.width or 0), node, handler, work)
        while work:
            node, handler, indices = work.popleft()
            source = self.spaces[node, handler]
            if self.deadline.passed:
                source.problem = source.problem or self.deadline.reason
                continue
            for dependency in node.dependencies:
                if dependency.trigger != handler:
                    continue
                kept, mapped = map_indices(dependency.index_mapping, indices)
                if kept is None:
                    source.problem = source.problem or "an index mapping that is not supported"
                    continue
                if len(mapped) == 0:
                    continue
                target = self._space(dependency.target, dependency.handler)
                inside = (mapped >= 0) & (mapped < (target.width if target.width is not None else self.longest))
                if not inside.all():
                    source.problem = source.problem or f"an index that {target.name or 'an operation'} does not have"
                    kept, mapped = kept[inside], mapped[inside]
                self.edges.append((source, indices[kept], target, mapped))
                self._reach(target, mapped, dependency.target, dependency.handler, work)

    def _reach(self, space: Space, indices: Indices, node: Any, handler: Any, work: deque[Any]) -> None:
        if len(indices) == 0:
            return
        needed = int(indices.max()) + 1
        if needed > len(space.seen):
            space.seen = np.concatenate([space.seen, np.zeros(needed - len(space.seen), dtype=bool)])
        fresh = np.unique(indices[~space.seen[indices]])
        if len(fresh):
            space.seen[fresh] = True
            work.append((node, handler, fresh))

    def _space(self, node: Any, handler: Callable[..., Any]) -> Space:
        key = (node, handler)
        if key not in self.spaces:
            self.spaces[key] = self._new_space(node, handler)
        return self.spaces[key]

    def _new_space(self, node: Any, handler: Callable[..., Any]) -> Space:
        module = node.module
        problem = "" if is_transposed_linear(module) else UNSUPPORTED_TYPES.get(node.type, "")
        problem = self.problems.get(node, problem)
        if isinstance(module, nn.Parameter):
            name = self.graph._param_to_name.get(module, "")
            return Space(module, name, "both", module.shape[node.pruning_dim], problem, node.pruning_dim)
        if module not in self.names:
            return Space(None, "", "both", None, problem or _operation_problem(node))
        pruner = self.graph.get_pruner_of_module(module)
        same = pruner.prune_in_channels == pruner.prune_out_channels
        side = "both" if same else ("out" if handler == pruner.prune_out_channels else "in")
        count = self.graph.get_in_channels if side == "in" else self.graph.get_out_channels
        return Space(module, self.names[module], side, count(node), problem)

    def result(self) -> DependencyMap:
        total = 0
        for space in self.spaces.values():
            space.first = total
            total += len(space.seen)
        component = self._components(total)
        blocked: dict[int, str] = {}
        for space in self.spaces.values():
            if space.problem:
                reason = f"reaches {space.problem}" + (f" at {space.name}" if space.name else "")
                for number in np.unique(component[space.first : space.first + len(space.seen)][space.seen]):
                    blocked.setdefault(int(number), reason)
        owned = [space for space in self.spaces.values() if space.owner is not None]
        parts = tuple(component[space.first : space.first + len(space.seen)] for space in owned)
        return DependencyMap(tuple(owned), parts, blocked)

    def _components(self, total: int) -> Indices:
        sources = [source.first + indices for source, indices, _, _ in self.edges]
        targets = [target.first + indices for _, _, target, indices in self.edges]
        for space in self.spaces.values():
            tied_a, tied_b = ties(space)
            sources.append(space.first + tied_a)
            targets.append(space.first + tied_b)
        sources += [a for a, _ in self._multiplier_ties()]
        targets += [b for _, b in self._multiplier_ties()]
        rows, columns = np.concatenate([*sources, np.zeros(0, int)]), np.concatenate([*targets, np.zeros(0, int)])
        links = coo_matrix((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(total, total))
        numbers: Indices = connected_components(links, directed=False)[1]
        return numbers

    def _multiplier_ties(self) -> list[tuple[Indices, Indices]]:
        """Depthwise convolutions with several filters for each input channel: input c owns outputs c*m .. c*m+m-1."""
        ties = []
        for (node, _), space in self.spaces.items():
            if space.side == "in" and has_multiplier(space.owner):
                pruner = self.graph.get_pruner_of_module(node.module)
                out = self.spaces.get((node, pruner.prune_out_channels))
                if out is not None and out.width and space.width:
                    outputs = np.arange(out.width)
                    ties.append((space.first + outputs // (out.width // space.width), out.first + outputs))
        return ties


def _widest(modules: dict[nn.Module, str]) -> int:
    """The largest dimension of any parameter of the model."""
    sizes = [max(p.shape) for module in modules for p in module.parameters(recurse=False) if p.dim() > 0]
    return max(sizes, default=0)


def _operation_problem(node: Any) -> str:
    if node.type == ops.OPTYPE.OUTPUT:
        return "an output of the model"
    name = str(getattr(node.grad_fn, "name", lambda: "")()).lower()
    for part, reason in MIXING_OPERATIONS.items():
        if part in name:
            return reason
    return ""
