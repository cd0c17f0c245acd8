"""Two processes that calibrate on a half of the data each end where one that sees all of it does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import secateur as sc
from secateur.data.batches import Batches
from secateur.layers import find_layers
from secateur.stats import collect
from secateur.types import Need

CODE = """
import sys
import torch
import torch.distributed as dist
import secateur as sc
from secateur.data.batches import Batches
from secateur.layers import find_layers
from secateur.stats import collect
from secateur.types import Need
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[2])
from test_parallel import batches, network
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
model, mine = network(), batches()[rank::2]
stats = collect(model, find_layers(model)[0], {Need.GRAM, Need.INPUT_NORM}, batches=Batches(mine)).layers
found = {f"gram.{n}": s.gram.clone() for n, s in stats.items()}
found |= {f"norm.{n}": s.input_norm.contiguous() for n, s in stats.items()}
result = sc.prune(model, data=mine, sparsity=0.5, criterion="wanda", solver="sparsegpt")
found |= {f"weight.{n}": p.detach().contiguous() for n, p in result.model.named_parameters()}
save_file(found, f"{sys.argv[1]}/{rank}.safetensors")
dist.destroy_process_group()
"""


class Branches(torch.nn.Module):
    """Which layers share an input depends on the batch, so that two processes differ in it."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = torch.nn.Linear(6, 8), torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)

    def forward(self, x):
        hidden = self.stem(x).relu()
        return self.left(hidden) + self.right(hidden) if len(x) > 12 else self.left(hidden) + self.right(hidden + 0)


def network():
    torch.manual_seed(1)
    return Branches()


def batches():
    return [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (10, 14, 11, 16)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_two_processes_give_the_result_of_one(tmp_path):
    from safetensors.torch import load_file

    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "job.py").write_text(CODE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    here = os.path.dirname(__file__)
    done = subprocess.run(
        [*line, str(tmp_path / "job.py"), str(tmp_path), here], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one), "both processes end with the same bits"
    model = network()
    stats = collect(model, find_layers(model)[0], {Need.GRAM, Need.INPUT_NORM}, batches=Batches(batches())).layers
    for name, known in stats.items():
        torch.testing.assert_close(one[f"gram.{name}"], known.gram, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(one[f"norm.{name}"], known.input_norm, rtol=1e-5, atol=1e-5)
    result = sc.prune(model, data=batches(), sparsity=0.5, criterion="wanda", solver="sparsegpt")
    for name, parameter in result.model.named_parameters():
        assert torch.equal(one[f"weight.{name}"] == 0, parameter == 0)
        torch.testing.assert_close(one[f"weight.{name}"], parameter.detach(), rtol=1e-4, atol=1e-5)
