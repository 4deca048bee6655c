"""Run by test_second_order_ranks.py on several processes: prune on every rank, and return what came out."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from second_order_fixture import batches, cross_entropy, rule, small_net

from pruningawaretraining.criteria.second_order.bank import Bank
from pruningawaretraining.session.one_shot import one_shot


def prune(criteria: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The models of every criterion, and how many blocks this rank keeps."""
    owned: list[int] = []
    collect = Bank.collect

    def counted(self: Bank, calibration: Any) -> Any:
        owned.append(sum(len(span) for span in self.fishers))
        return collect(self, calibration)

    Bank.collect = counted  # type: ignore[method-assign]  # in a process of its own
    out = {}
    for name, criterion in criteria.items():
        mine = batches(8, 4)[dist.get_rank() :: dist.get_world_size()]
        model = one_shot(small_net(), rule("unstructured", criterion), mine, cross_entropy, [0.5, 0.8])
        out[name] = {sparsity: one.state_dict() for sparsity, one in model.items()}
    return {"models": out, "owned": owned}
