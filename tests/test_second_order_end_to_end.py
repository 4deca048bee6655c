"""``one_shot`` against the published formulas, written out on gradients that autograd gives one by one."""

from __future__ import annotations

import pytest
import torch
from second_order_fixture import cross_entropy, rule
from torch import Tensor, nn

from pruningawaretraining.session.one_shot import one_shot

DAMP, COUNT = 1e-4, 40


def setting(seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], Tensor]:
    """A layer of 3 x 4 weights, its data, and its gradients one sample at a time."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    inputs, targets = torch.randn(COUNT, 4).double(), torch.randint(0, 3, (COUNT,))
    weight = model[0].weight
    rows = [
        torch.autograd.grad(cross_entropy(model(x[None]), y[None]), [weight])[0].flatten()
        for x, y in zip(inputs, targets, strict=True)
    ]
    return model, list(zip(inputs.split(8), targets.split(8), strict=True)), torch.stack(rows)


def pruned(criterion: str, sparsity: float, seed: int = 0, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """(the weight before, the weight after, the gradients)."""
    model, data, rows = setting(seed)
    spec = {"type": criterion, "num_grads": COUNT, "micro_batch": 1, **options}
    out = one_shot(model, rule("unstructured", spec), data, cross_entropy, [sparsity])[sparsity]
    return model[0].weight.detach().flatten(), out[0].weight.detach().flatten(), rows


def inverse_of(rows: Tensor, damp: float = DAMP) -> Tensor:
    return torch.linalg.inv(rows.T @ rows / len(rows) + damp * torch.eye(rows.shape[1]).double())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("number", [1, 4, 9])
def test_cap_with_one_block_is_the_published_greedy_trace(number, seed):
    before, after, rows = pruned("cap", number / 12, seed, damp=DAMP, fisher_block_size=12)
    weights, inverse, gone = before.clone(), inverse_of(rows), []
    for _ in range(number):
        scores = weights**2 / inverse.diagonal()
        scores[gone] = torch.inf
        pick = int(scores.argmin())
        column = inverse[:, pick].clone()
        weights = weights - column * weights[pick] / column[pick]
        inverse = inverse - torch.outer(column, column) / column[pick]
        inverse[pick, pick] = 1.0
        gone.append(pick)
        weights[gone] = 0.0
    assert torch.allclose(after, weights, atol=1e-4)
    assert sorted(gone) == torch.nonzero(after == 0).flatten().tolist()


@pytest.mark.parametrize("blocks", [1, 3])
def test_obs_is_the_published_score_and_update_in_every_block(blocks):
    width = 12 // blocks
    before, after, rows = pruned("obs", 0.5, damp=DAMP, fisher_block_size=width)
    parts = [slice(start, start + width) for start in range(0, 12, width)]
    inverses = [inverse_of(rows[:, part]) for part in parts]
    scores = torch.cat([before[part] ** 2 / one.diagonal() for part, one in zip(parts, inverses, strict=True)])
    gone = torch.zeros(12, dtype=torch.bool)
    gone[scores.argsort()[:6]] = True
    expected = before.clone()
    for part, one in zip(parts, inverses, strict=True):
        expected[part] -= one @ (before[part] * gone[part] / one.diagonal())
    assert torch.equal(after == 0, gone)
    assert torch.allclose(after, expected.masked_fill(gone, 0.0), atol=1e-4)


def test_fast_cap_shares_one_fisher_and_sweeps_the_columns():
    before, after, rows = pruned("fast_cap", 0.5, damp=1e-2, fisher_block_size=4)
    blocks = rows.reshape(-1, 4)  # every gradient has three blocks
    shared = 2 / len(blocks) * blocks.T @ blocks
    shared += 1e-2 * shared.diagonal().mean() * torch.eye(4).double()
    matrix = before.reshape(3, 4).clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(shared)).mT
    gone = torch.zeros(12, dtype=torch.bool)
    gone[(matrix / upper.diagonal()).square().flatten().argsort()[:6]] = True
    gone = gone.reshape(3, 4)
    for row in range(3):
        for column in range(4):
            if gone[row, column]:
                inverse = torch.linalg.inv(shared[column:, column:])
                matrix[row, column:] -= matrix[row, column] / inverse[0, 0] * inverse[0]
    assert torch.equal(after.reshape(3, 4) == 0, gone)
    assert torch.allclose(after.reshape(3, 4), matrix.masked_fill(gone, 0.0), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_quadratic_loss_orders_the_criteria(seed):
    """On the quadratic that all of them assume: CAP <= OBS with the joint solve <= OBS's own update, or none."""

    def rise(criterion: str, **options: object) -> float:
        before, after, rows = pruned(criterion, 0.5, seed, damp=DAMP, fisher_block_size=12, **options)
        change = after - before
        return float(change @ torch.linalg.inv(inverse_of(rows)) @ change) / 2

    losses = [
        rise("cap"),
        rise("obs", compensation="joint"),
        rise("obs"),
    ]
    assert losses[0] <= losses[1] * 1.001 and losses[1] <= losses[2] * 1.001
    assert losses[1] <= rise("obs", compensation="none") * 1.001
