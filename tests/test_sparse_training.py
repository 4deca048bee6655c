"""The example of gradual pruning by a recipe: alone, and on two processes that agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pruningawaretraining import load_pruned
from pruningawaretraining.config.recipe import load_recipe

TESTS = Path(__file__).parent
RECIPE = """modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 4}
  - !LearningRateFunctionModifier
    {start_epoch: 0, end_epoch: 4, lr_func: cyclic_linear, init_lr: 0.2, final_lr: 0.02, cycle_epochs: 1}
  - !CAPruningModifier
    {params: ["re:conv.*weight", linear.weight], final_sparsity: 0.75, start_epoch: 0, end_epoch: 2,
     update_frequency: 1, num_grads: 64, damp: 1.0e-4, fisher_block_size: 16, grad_sampler_kwargs: {batch_size: 1}}
"""


def run(folder: Path, processes: int) -> str:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    script = [str(TESTS / "sparse_training_ranks.py"), str(folder), "--recipe", str(folder / "recipe.yaml")]
    command = [sys.executable, *several, *script, "--sparsities", "0.5", "0.75"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    shown = run(folder / "alone", 1), run(folder / "two", 2)
    alone = torch.load(folder / "alone" / "rankalone.pt", weights_only=True)
    ranks = [torch.load(folder / "two" / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return folder, shown, alone, ranks


def sparsity(model):
    weights = [value for value in model.values() if value.dim() > 1]
    return sum(int((value == 0).sum()) for value in weights) / sum(value.numel() for value in weights)


@pytest.mark.slow
def test_two_processes_agree_on_every_mask_and_weight(results):
    first, second = results[3]
    assert all(torch.equal(mask, second["masks"][name]) for name, mask in first["masks"].items())
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())
    assert sparsity(first["model"]) == pytest.approx(0.75, abs=1e-3)


@pytest.mark.slow
def test_two_processes_do_what_one_does(results):
    """The same batches and gradients, added in another order, which three events and 80 steps amplify."""
    alone, (first, _) = results[2], results[3]
    assert sparsity(alone["model"]) == pytest.approx(0.75, abs=1e-3)
    same = [alone["masks"][name] == mask for name, mask in first["masks"].items()]
    assert float(torch.cat([one.flatten() for one in same]).float().mean()) > 0.9


@pytest.mark.slow
def test_it_learns_and_saves_a_model_at_each_milestone(results):
    folder, shown, alone, _ = results
    sys.path.insert(0, str(TESTS))
    from sparse_training_ranks import PlainNet

    for text, name in zip(shown, ("alone", "two"), strict=True):
        lines = [line.split() for line in text.splitlines() if line.startswith("epoch")]
        assert [float(line[3]) for line in lines] == pytest.approx([0.528, 0.722, 0.75, 0.75], abs=2e-3)
        assert float(lines[-1][5]) > 0.7
        for level, reached in ((0.5, 0.528), (0.75, 0.75)):
            model = load_pruned(PlainNet(), folder / name / f"sparse_{level}.safetensors")
            assert sparsity(model.state_dict()) == pytest.approx(reached, abs=2e-3)


@pytest.mark.parametrize(
    "path", sorted((TESTS.parent / "examples" / "recipes").glob("*.yaml")), ids=lambda one: one.stem
)
def test_shipped_recipes_load(path):
    recipe = load_recipe(path)
    assert recipe.pruning.rules and recipe.rates.modifiers and recipe.epochs > recipe.pruning.rules[0].start
