"""Attachments of coupled channels: norms over channels, reductions in code, and attributes that count channels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pruningawaretraining.groups.attachment import Attachment, MaskHooks
from pruningawaretraining.models.kept_hooks import narrow_saved
from pruningawaretraining.models.kept_reductions import ReductionHooks, saved_at
from pruningawaretraining.models.masked_norms import NormHooks, kept_norm_of, set_norm_width
from pruningawaretraining.models.module_widths import set_count
from pruningawaretraining.models.reduction_sites import Site
from pruningawaretraining.models.surgery import Surgery


@dataclass(frozen=True, eq=False)
class Norms(Attachment):
    """Norm layers: those that mix channels take their statistics over the kept ones."""

    def hooks(self, model: nn.Module) -> MaskHooks:
        """See :class:`NormHooks`."""
        return NormHooks(model, self.kept)

    def remove(self, model: nn.Module, keep_G: Tensor, surgery: Surgery) -> tuple[nn.Parameter, ...]:
        """Narrow norms without tensors, which slicing does not reach, and what a file says of masked channels."""
        for name, keep_C in self.kept(keep_G).items():
            module = model.get_submodule(name)
            narrow_saved(module, keep_C, surgery)
            if getattr(module, "weight", None) is None:
                set_norm_width(module, int(keep_C.sum()), surgery)
        return ()

    def graph_problem(self, model: nn.Module) -> str:
        """A norm that mixes channels needs a hook."""
        for name in self.groups:
            module = model.get_submodule(name)
            if kept_norm_of(module) is not None:
                return (
                    f"{name} ({type(module).__name__}) normalises over channels, of which some may be masked, and in "
                    "an exported graph that cannot be told. Allowed: remove the channels before the export, or "
                    "exclude the layers that it normalises"
                )
        return ""


@dataclass(frozen=True, eq=False)
class Reductions(Attachment):
    """Means, norms and other reductions over channels in the code of modules: they run over the kept ones.

    The name of a part says where: see :meth:`pruningawaretraining.models.reduction_sites.Site.within`.
    """

    def hooks(self, model: nn.Module) -> MaskHooks:
        """See :class:`ReductionHooks`."""
        return ReductionHooks(model, self.kept)

    def remove(self, model: nn.Module, keep_G: Tensor, surgery: Surgery) -> tuple[nn.Parameter, ...]:
        """Let the hooks that came with a file know that only these channels are left."""
        for name, keep_N in self.kept(keep_G).items():
            layer, site = Site.of(name)
            for part in saved_at(model.get_submodule(layer), site):
                part.narrow(keep_N, surgery)
        return ()

    def graph_problem(self, model: nn.Module) -> str:
        """A reduction needs the hooks of its module."""
        for name in self.groups:
            layer = Site.of(name)[0]
            return (
                f"the code of {layer or 'the model'} reduces over channels, of which some may be masked, and in an "
                "exported graph that cannot be told. Allowed: remove the channels before the export, or exclude the "
                "layers that make them"
            )
        return ""


@dataclass(frozen=True, eq=False)
class Counts(Attachment):
    """Attributes of modules, by their qualified names, that say how many channels there are."""

    def remove(self, model: nn.Module, keep_G: Tensor, surgery: Surgery) -> tuple[nn.Parameter, ...]:
        """Let them count what is left."""
        for place, keep_C in self.kept(keep_G).items():
            if not bool(keep_C.all()):
                owner, _, attribute = place.rpartition(".")
                set_count(model.get_submodule(owner), attribute, int(keep_C.sum()), surgery)
        return ()
