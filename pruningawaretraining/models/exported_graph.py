"""Graphs of torch.export that follow removals of their model.

Quantizers for exported graphs (``prepare_qat_pt2e``) train a graph of plain operations whose parameters are the model's
own. So masks of the model hold in the graph, and groups, costs and criteria are those of the model. What a removal has
to do in the graph besides: put the new parameters in, slice the scales of its fake quantizers, and correct the few
widths that are written into operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.calling import ForwardFn, beside, call, is_out_of_memory, same_generators
from pruningawaretraining.models.fake_quant import follow_weight, is_observing
from pruningawaretraining.models.surgery import Keep, Surgery, slice_tensor
from pruningawaretraining.models.trees import float_tensors_of

aten = torch.ops.aten
TRAINING = ("training", "train")


def is_exported(model: nn.Module) -> bool:
    """Whether a module is a graph of plain operations, as torch.export makes it: its layers are gone."""
    if not isinstance(model, fx.GraphModule):
        return False
    operations = [node for node in model.graph.nodes if isinstance(node.target, OpOverload)]
    return bool(operations)


class ExportedGraph:
    """A graph of a model, made by torch.export and perhaps prepared by a quantizer.

    Args:
        model: the model that was exported.
        graph: the graph; its parameters are the model's.

    Raises:
        ModelError: not an exported graph, or of another model.
    """

    def __init__(self, model: nn.Module, graph: nn.Module) -> None:
        if not is_exported(graph):
            raise ModelError(
                f"graph: {type(graph).__name__} is not an exported graph. Allowed: "
                "torch.export.export(model, inputs).module(), prepared or not"
            )
        assert isinstance(graph, fx.GraphModule)
        self.graph = graph
        theirs = dict(graph.named_parameters())
        for name, parameter in model.named_parameters():
            if theirs.get(name, parameter) is not parameter:
                raise ModelError(
                    f"graph: its {name!r} is not the model's own parameter. Allowed: a graph that was exported from "
                    "this very model (no copy of it), and that has not been copied since"
                )
        buffers = dict(graph.named_buffers())
        self._shared = {name for name, buffer in model.named_buffers() if buffers.get(name) is buffer}
        if not theirs.keys() & dict(model.named_parameters()).keys():
            raise ModelError(f"graph: it has none of the parameters of {type(model).__name__}")

    def divisors(self) -> frozenset[str]:
        """Parameters that the graph divides by: weights of batch norms that a quantizer has folded into layers."""
        found = set()
        for node in self.graph.graph.nodes:
            if node.target is aten.div.Tensor and isinstance(node.args[1], fx.Node):
                found.add(_source(node.args[1]))
        return frozenset(found & {name for name, _ in self.graph.named_parameters()})

    def slice(self, model: nn.Module, kept: Mapping[str, Keep], surgery: Surgery) -> None:
        """Slice the graph after a removal.

        Args:
            model: with its channels removed already.
            kept: name of a tensor -> dimension -> indices that stay.
            surgery: remembers how to undo it.
        """
        surgery.when_undone(self.graph.recompile)
        modules, layers = dict(self.graph.named_modules()), dict(model.named_modules())
        for name, keep in kept.items():
            owner, _, attribute = name.rpartition(".")
            old = getattr(modules.get(owner), attribute, None)
            if isinstance(old, Tensor):  # unused tensors are not in the graph
                shared = isinstance(old, nn.Parameter) or name in self._shared
                new = getattr(layers[owner], attribute) if shared else slice_tensor(old, keep)
                surgery.set_attribute(modules[owner], attribute, new)
        for node in self.graph.graph.nodes:
            if node.op == "call_module" and is_observing(modules[node.target]):
                follow_weight(modules[node.target], kept.get(_source(node), {}), surgery)
            elif isinstance(node.target, OpOverload):
                self._correct_groups(node, layers, surgery)
        self.graph.recompile()

    def _correct_groups(self, node: fx.Node, layers: Mapping[str, nn.Module], surgery: Surgery) -> None:
        """Depthwise convolutions have as many groups as channels, and the number is written into the operation."""
        place = _place(node, ("groups",))
        weight = node.args[1] if len(node.args) > 1 else None
        if place is None or place >= len(node.args) or not isinstance(weight, fx.Node):
            return
        layer = layers.get(_source(weight).rpartition(".")[0])
        groups = getattr(layer, "groups", node.args[place])
        if groups != node.args[place]:
            surgery.set_attribute(node, "args", (*node.args[:place], groups, *node.args[place + 1 :]))

    def outputs(self, inputs: Any, forward_fn: ForwardFn | None = None) -> list[Tensor]:
        """Outputs of the graph in eval mode without quantization; the graph is unchanged.

        Raises:
            ModelError: it cannot be run on these inputs.
        """
        bound = getattr(forward_fn, "__self__", None) is not None
        try:
            with torch.no_grad(), same_generators(self.graph):
                torch.manual_seed(0)
                return float_tensors_of(
                    call(_Quiet(self.graph), beside(self.graph, inputs), None if bound else forward_fn)
                )
        except (RuntimeError, TypeError, ValueError, LookupError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"graph: it does not run on the pruner's example inputs: {reason}") from error


class _Quiet(nn.Module):
    """Runs a graph in eval mode, without quantization and without changing it."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self._run = [_Interpreter(graph)]  # in a list, so that the graph is not a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        interpreter = self._run[0]
        names = [node.name for node in interpreter.graph.nodes if node.op == "placeholder"]
        values = dict(zip(names, pytree.tree_leaves(args), strict=False))
        values.update({name: kwargs[name] for name in names if name in kwargs})
        return interpreter.run(*(values[name] for name in names), enable_io_processing=False)


class _Interpreter(fx.Interpreter):
    """Runs operation by operation, skipping guards, observers and the counters of batch norms."""

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if is_observing(module):
            return args[0]
        return None if type(module).__name__ == "GuardsFn" else super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten.add_.Tensor and not args[0].is_floating_point():
            return args[0]
        if isinstance(target, OpOverload):
            args = _evaluating(target, args)
        return super().call_function(target, args, kwargs)


def _evaluating(operation: OpOverload, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an operation with ``training`` switched off."""
    names = [argument.name for argument in operation._schema.arguments]
    return tuple(
        False if name in TRAINING and value is True else value for name, value in zip(names, args, strict=False)
    )


def _place(node: fx.Node, names: tuple[str, ...]) -> int | None:
    """Where in the arguments of a node's operation the one with one of these names stands."""
    assert isinstance(node.target, OpOverload)
    found = [index for index, argument in enumerate(node.target._schema.arguments) if argument.name in names]
    return found[0] if found else None


def _source(node: fx.Node) -> str:
    """The name of the tensor that a node's value is made from: first arguments are followed; "" for an input's."""
    while node.op in ("call_function", "call_module") and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return str(node.target) if node.op == "get_attr" else ""
