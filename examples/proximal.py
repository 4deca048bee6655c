"""Sparsity by proximal steps: coupled channels go to zero while a small residual network learns to read digits.

Lambda finds its own way to the MAC target; what is 0 then is removed without loss, training goes on, and the run ends
in the same report as any other: runs/proximal/report.html.

    python examples/proximal.py [--epochs 30] [--macs 0.5]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console

from pruningawaretraining import Pruning
from pruningawaretraining.experiment.datasets import load_data
from pruningawaretraining.experiment.display import Display
from pruningawaretraining.experiment.finish import finish
from pruningawaretraining.experiment.optim import build_scheduler
from pruningawaretraining.experiment.record import Recorder
from pruningawaretraining.experiment.run import find_device
from pruningawaretraining.experiment.runner import Runner
from pruningawaretraining.experiment.schema import ExperimentConfig
from pruningawaretraining.experiment.stage import Stage
from pruningawaretraining.experiment.train import Learner, Precision
from pruningawaretraining.proximal import CoupledChannelGrouper, LambdaController, PruneOptimizer

BATCH = 64


def experiment(epochs: int, macs: float, out: str) -> ExperimentConfig:
    """The experiment; its rule removes at the epoch at which lambda arrives."""
    rule = {"criterion": "producer_norm", "start": removal_epoch(epochs), "target": {"macs": macs}}
    return ExperimentConfig.model_validate(
        {
            "name": "proximal",
            "out": out,
            "model": {"name": "pruningawaretraining.experiment.models:digits_resnet"},
            "data": {"name": "digits", "crop": 1},
            "epochs": epochs,
            "batch_size": BATCH,
            "optimizer": {"lr": 0.05, "kwargs": {"momentum": 0.9, "weight_decay": 5e-4}},
            "pruning": {"rules": [rule]},
            "threads": 1,
            "latency": {"batch": 16},
        }
    )


def removal_epoch(epochs: int) -> int:
    """Two thirds of the epochs prune, the others train on what is left."""
    return max(1, 2 * epochs // 3) - 1


class ProximalRunner(Runner):
    """The library's runner, with a proximal optimizer for the pruned model."""

    controller: LambdaController

    def new_stage(self, name: str) -> Stage:
        """The dense model as ever; the pruned one with coupled groups and a controller."""
        if name == "dense":
            return super().new_stage(name)
        config, model = self.config, self.new_model()
        grouper = CoupledChannelGrouper(model, self.images[:1], max_sparsity=0.9, relative=True)
        per_epoch = len(self.data.train) // config.batch_size
        end = per_epoch * (removal_epoch(config.epochs) + 1)
        base = torch.optim.SGD(grouper.param_groups(), lr=config.optimizer.lr, **config.optimizer.kwargs)
        optimizer = PruneOptimizer(base, warmup_steps=per_epoch, healing_start_step=end)
        target = config.pruning.rules[0].target.macs
        assert target is not None
        self.controller = LambdaController.for_macs(optimizer, grouper, target, per_epoch, end, every=per_epoch // 2)
        optimizer.register_step_post_hook(lambda *_: self.controller.step())
        pruner = Pruning(model, config.pruning, example_inputs=self.images[:1], optimizer=optimizer)
        learner = Learner(model, optimizer, Precision.of(config, self.device), pruner=pruner)
        torch.manual_seed(config.seed)
        return Stage(name, learner, build_scheduler(config, optimizer), config.epochs)


def main(epochs: int = 30, macs: float = 0.5, out: str = "runs/proximal") -> dict[str, Any]:
    """Train, prune, report; returns what summary.json holds."""
    display = Display(Console())
    config = experiment(epochs, macs, out)
    torch.set_num_threads(config.threads)
    runner = ProximalRunner(config, load_data(config.data), find_device(config.device), display)
    runner.recorder = Recorder(runner.folder, 0, 0)
    trained = runner.run()
    for point in runner.controller.path:
        print(f"step {point.step:4}: lambda {point.reg_lambda:.4f}, {point.cost:6.1%} of the MACs ({point.budget:.1%})")
    print(trained.pruner.report())
    return finish(trained, display)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--macs", type=float, default=0.5, help="fraction of the MACs to keep")
    parser.add_argument("--out", default="runs/proximal")
    options = parser.parse_args()
    main(options.epochs, options.macs, options.out)
