"""Second-order pruning of whole channels: scores of gates, and what the layers that read a channel do without it.

Shape suffixes: ``_G`` groups, ``_S`` groups of one set, ``_M`` gradients, ``_C`` input channels of a layer, ``_O`` its
outputs, ``_D`` its inputs (channels by kernel positions), ``_X`` those and a constant 1.

A gate is a factor on a channel where its readers take it in, so it scales their input columns. Removing the channel is
setting the gate from 1 to 0, and the Fisher block of a set's gates says what that costs once the others adapt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruningawaretraining.criteria.second_order.fisher import decoupled_, factor, workplace
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.criteria.second_order.layer_inputs import InputHessians
from pruningawaretraining.distributed.collectives import gathered_rows, world_size
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.registry import lookup, register

logger = logging.getLogger(__name__)

GATE_DAMP = 1e-2
LEAST_SQUARES_DAMP = 1e-3
LARGEST_SCALE = 8.0
MAKE_UP_BATCHES = 16
"""Batches behind the compensation of an event in training, and behind the norms that are measured anew after it."""


def readers(grouping: Grouping) -> Grouping:
    """The groups over the weights that read them; over all weights if none does."""
    reading = grouping.of_role("in", "read")
    return reading if reading.members else grouping.without_role("buffer")


def gate_gradients(grouping: Grouping, calibration: Calibration, count: int) -> Tensor:
    """Gradients of the loss by every group's gate: ``sum w g`` over the weights that read it, (gradients, groups).

    Several processes share the gradients out and collect their rows.
    """
    reading = readers(grouping)
    unique = {id(member.parameter): member.parameter for member in reading.members}
    places = {key: number for number, key in enumerate(unique)}
    rows: list[Tensor] = []

    def add(gradients: list[Tensor]) -> None:
        values = [
            member.parameter.detach().float() * gradients[places[id(member.parameter)]].float()
            for member in reading.members
        ]
        rows.append(reading.reduce(values))

    calibration.each_gradient(list(unique.values()), -(-count // world_size()), add)
    return gathered_rows(torch.stack(rows))


def gate_scores(gradients_MG: Tensor, grouping: Grouping, damp: float = 0.0) -> Tensor:
    """OBS on gates: ``1 / (2 (F_S^-1)_gg)`` with F_S the Fisher block of the gates of a set.

    Args:
        gradients_MG: from :func:`gate_gradients`.
        grouping: the groups and their sets.
        damp: added to the diagonal, beside a hundredth of its mean.
    """
    gradients_MG = gradients_MG.to(workplace(gradients_MG.device))
    scores_G = torch.zeros(grouping.size, dtype=torch.float64, device=gradients_MG.device)
    for one in grouping.sets:
        rows_MS = gradients_MG[:, one.start : one.stop].double()
        square_SS = rows_MS.mT @ rows_MS / max(len(rows_MS), 1)
        least = max(damp, 1e-30)
        square_SS.diagonal().add_((GATE_DAMP * square_SS.diagonal().mean()).clamp(min=least))
        inverse_SS = torch.cholesky_inverse(factor(square_SS[None], damp))[0]
        scores_G[one.start : one.stop] = 0.5 / inverse_SS.diagonal()
    return scores_G


@dataclass(frozen=True, eq=False)
class LosingReader:
    """A layer that loses input channels.

    Args:
        name: of the layer.
        module: the layer.
        lost_C: True for the input channels that go (of one group of a grouped convolution).
    """

    name: str
    module: nn.Module
    lost_C: Tensor


def losing_readers(model: nn.Module, grouping: Grouping, keep_G: Tensor) -> Iterator[LosingReader]:
    """Linear layers and ungrouped 1d and 2d convolutions that read a removed channel."""
    modules = dict(model.named_modules())
    keep_G1 = torch.cat([keep_G.cpu(), torch.ones(1, dtype=torch.bool)])
    for member in grouping.of_role("in").members:
        module = modules.get(member.name.rpartition(".")[0])
        plain = isinstance(module, nn.Linear) or (isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == 1)
        if plain and module is not None and member.slots is not None:
            lost_C = ~keep_G1[member.slots.cpu()]
            if bool(lost_C.any()):
                yield LosingReader(member.name.rpartition(".")[0], module, lost_C)


Compensate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(weight_OD, moments_XX, lost_D) -> (weight_OD, what the bias gains), with moments ``E[x x']``, 1 the last input."""


@register("channel_compensation", "none")
def leave(weight_OD: Tensor, moments_XX: Tensor, lost_D: Tensor) -> tuple[Tensor, Tensor]:
    """No compensation."""
    return weight_OD, weight_OD.new_zeros(weight_OD.shape[0])


@register("channel_compensation", "bias")
def shift_bias(weight_OD: Tensor, moments_XX: Tensor, lost_D: Tensor) -> tuple[Tensor, Tensor]:
    """``b += sum over removed of W[:, c] mu_c``: the mean of the removed inputs."""
    means_D = moments_XX[-1, :-1]
    return weight_OD, (weight_OD * lost_D) @ means_D


@register("channel_compensation", "bias_variance")
def shift_and_scale(weight_OD: Tensor, moments_XX: Tensor, lost_D: Tensor) -> tuple[Tensor, Tensor]:
    """As "bias", and rows scaled by ``clamp(sqrt(Var_full / Var_kept), 1, 8)`` about the mean of the output."""
    means_D = moments_XX[-1, :-1]
    covariance_DD = moments_XX[:-1, :-1] - torch.outer(means_D, means_D)
    kept_OD = weight_OD * ~lost_D
    full_O = ((weight_OD @ covariance_DD) * weight_OD).sum(1).clamp(min=0)
    kept_O = ((kept_OD @ covariance_DD) * kept_OD).sum(1).clamp(min=1e-30)
    scale_O = (full_O / kept_O).sqrt().clamp(1.0, LARGEST_SCALE)
    scaled_OD = kept_OD * scale_O[:, None]
    return scaled_OD, (weight_OD - scaled_OD) @ means_D


@register("channel_compensation", "least_squares", "joint")
def least_squares(weight_OD: Tensor, moments_XX: Tensor, lost_D: Tensor) -> tuple[Tensor, Tensor]:
    """The weights and bias that change the layer's outputs least in the mean square (structured OBS, layer by layer).

    ``W_K + W_P M_PK M_KK^-1`` with M the moments of the inputs, the constant among those that are kept.
    """
    square = moments_XX.clone()
    square.diagonal()[:-1].add_(LEAST_SQUARES_DAMP * square.diagonal()[:-1].mean().clamp(min=1e-12))
    kept_X = torch.cat([~lost_D, lost_D.new_ones(1)])
    right_OX = (weight_OD * lost_D) @ square[:-1] * kept_X
    lower = factor(decoupled_(square[None].clone(), kept_X[None]), 1e-12)[0]
    change_OX = torch.cholesky_solve(right_OX.mT, lower).mT
    return weight_OD * ~lost_D + change_OX[:, :-1], change_OX[:, -1]


@torch.no_grad()
def compensate_readers(found: list[LosingReader], hooks: InputHessians, compensate: Compensate) -> None:
    """Update, in place, the layers that read removed channels; their removed columns become 0.

    A layer without a bias keeps none: a norm behind it is recalibrated, or the shift is lost.
    """
    unseen = [reader.name for reader in found if reader.name not in hooks.sums]
    if unseen:
        logger.warning(
            "compensation: skipped for %s, which nn.MultiheadAttention does not call as a module", ", ".join(unseen)
        )
    for reader in found:
        if reader.name in unseen:
            continue
        weight = reader.module.weight
        assert isinstance(weight, Tensor)
        kernel = weight[0, 0].numel()
        device = workplace(weight.device)
        lost_D = reader.lost_C.repeat_interleave(kernel).to(device)
        moments_XX = hooks.hessian(reader.name)[0].to(device) / 2
        bias = getattr(reader.module, "bias", None)
        if bias is None:
            moments_XX = _without_constant(moments_XX)
        changed_OD, shift_O = compensate(weight.detach().flatten(1).to(device, torch.float64), moments_XX, lost_D)
        weight.copy_((changed_OD * ~lost_D).reshape(weight.shape))
        if bias is not None:
            bias.add_(shift_O.to(bias))


def _without_constant(moments_XX: Tensor) -> Tensor:
    """Moments about the mean, for layers whose outputs may be shifted freely: they carry no bias."""
    means_X = moments_XX[-1].clone()
    about_XX = moments_XX - torch.outer(means_X, means_X)
    about_XX[-1] = about_XX[:, -1] = 0.0
    about_XX[-1, -1] = 1.0
    return about_XX


def measure(readers_found: list[LosingReader], calibration: Calibration, count: int) -> InputHessians:
    """Moments of the inputs of layers, a constant 1 included, on the model as it is.

    Several processes each run their own batches, and know the moments of all afterwards.
    """
    layers = [(reader.name, reader.module) for reader in readers_found]
    hooks = InputHessians(layers, bias=True)
    try:
        calibration.run(count)
    finally:
        hooks.remove()
    hooks.agree(layers)
    return hooks


def compensate(model: nn.Module, grouping: Grouping, keep_G: Tensor, calibration: Calibration, how: str) -> None:
    """Compensate, in place and before the removal, the layers that read removed channels.

    Args:
        model, grouping: the channels, those that are masked already included.
        keep_G: what stays.
        calibration: data; ``MAKE_UP_BATCHES`` batches are run.
        how: a registered compensation.
    """
    lost = list(losing_readers(model, grouping, keep_G))
    compensate: Compensate = lookup("channel_compensation", how)
    compensate_readers(lost, measure(lost, calibration, MAKE_UP_BATCHES), compensate)


def recalibrate_norms(model: nn.Module, calibration: Calibration, batches: int = 100) -> int:
    """Measure the running statistics of every batch norm again, as plain averages over micro-batches.

    Weights, modes, momenta and random states stay as they are.

    Returns:
        How many norms were measured (0: nothing was run).
    """
    norms = [
        one
        for one in model.modules()
        if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.running_mean is not None
    ]
    if not norms:
        return 0
    for one, (mean, variance, seen) in zip(norms, calibration.normalise_anew(norms, batches), strict=True):
        if int(seen) and one.running_mean is not None and one.running_var is not None:
            one.running_mean.copy_(mean)
            one.running_var.copy_(variance)
    return len(norms)
