"""Run by test_second_order_ranks.py under torch.distributed.run: prune on every rank, and save what came out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from second_order_fixture import batches, cross_entropy, rule, small_net

from pruningawaretraining.criteria.second_order.bank import Bank
from pruningawaretraining.session.one_shot import one_shot


def main() -> None:
    folder, criteria = Path(sys.argv[1]), json.loads(sys.argv[2])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    owned: list[int] = []
    collect = Bank.collect

    def counted(self, calibration):  # how many blocks this rank keeps
        owned.append(sum(len(span) for span in self.fishers))
        return collect(self, calibration)

    Bank.collect = counted
    out = {}
    for name, criterion in criteria.items():
        mine = batches(8, 4)[rank::world]
        model = one_shot(small_net(), rule("unstructured", criterion), mine, cross_entropy, [0.5, 0.8])
        out[name] = {sparsity: one.state_dict() for sparsity, one in model.items()}
    torch.save({"models": out, "owned": owned}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
