"""SyncBatchNorm is pruned as the batch norm that it was converted from."""

from __future__ import annotations

import torch
from torch import nn

from pruningawaretraining import Pruning, load_pruned, save_pruned
from pruningawaretraining.experiment.models import DigitsResNet

CONFIG = {"rules": [{"target": {"macs": 0.5}}]}


def pruned(converted: bool) -> Pruning:
    torch.manual_seed(0)
    model: nn.Module = DigitsResNet(widths=(8, 16), blocks=1)
    if converted:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert any(isinstance(one, nn.SyncBatchNorm) for one in model.modules())
    pruner = Pruning(model, CONFIG, example_inputs=torch.randn(1, 1, 8, 8))
    pruner.prune(model, 0)
    return pruner


def test_it_is_pruned_as_a_batch_norm(tmp_path):
    plain, synchronised = pruned(False), pruned(True)
    assert synchronised.channel_pruner.removed and plain.macs == synchronised.macs
    for name, keep in plain.masks.items():
        assert torch.equal(keep, synchronised.masks[name])
    save_pruned(synchronised.model, tmp_path / "pruned.safetensors")
    again = load_pruned(DigitsResNet(widths=(8, 16), blocks=1), tmp_path / "pruned.safetensors").eval()
    inputs = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(again(inputs), synchronised.model.eval()(inputs), rtol=0, atol=1e-6)
    for one in synchronised.model.modules():
        if isinstance(one, nn.SyncBatchNorm):
            assert one.num_features == len(one.weight) == len(one.running_mean)
