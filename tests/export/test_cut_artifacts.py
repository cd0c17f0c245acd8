"""The artifact of a cut model, loaded in a fresh process: the same outputs bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import secateur as sc
from secateur.models.torchvision_shim import prepare_torchvision

MODELS = """
import torch
import torch.nn.functional as F
from torch import nn


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=2), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )


class GroupedQueries(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.kv, self.size = 8, 4, 6
        self.q, self.k, self.v = nn.Linear(16, 48), nn.Linear(16, 24), nn.Linear(16, 24)
        self.out, self.norm = nn.Linear(48, 16), nn.LayerNorm(16)
        self.up, self.down, self.last = nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 3)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.size).transpose(1, 2)
        k, v = (m(x).view(b, n, self.kv, self.size).transpose(1, 2) for m in (self.k, self.v))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        x = self.norm(x + self.out(y.transpose(1, 2).reshape(b, n, -1)))
        return self.last(x + self.down(F.gelu(self.up(x))))


def transformer():
    return GroupedQueries()


def encoder():
    return nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), nn.Linear(16, 3))


def llama():
    from secateur.models.torchvision_shim import prepare_torchvision

    prepare_torchvision()
    import transformers

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48,
    ))
"""

LOADER = """
import sys
import numpy as np
import torch
import secateur as sc

folder = sys.argv[1]
torch.set_num_threads(int(sys.argv[2]))
for name in sys.argv[3:]:
    model = sc.load(f"{folder}/{name}").eval()
    given = torch.from_numpy(np.load(f"{folder}/{name}.npz")["given"])
    with torch.no_grad():
        output = model(given)
        if name == "llama":
            import transformers

            other = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{name}").eval()
            assert other.config.num_key_value_heads == 1, other.config
            assert torch.equal(other(given).logits, output.logits), "from_pretrained"
            output = output.logits
    wanted = torch.from_numpy(np.load(f"{folder}/{name}.npz")["wanted"])
    assert torch.equal(output, wanted), (name, (output - wanted).abs().max())
print("all the same")
"""

INPUTS = {
    "convolutional": lambda: torch.randn(2, 3, 12, 12),
    "transformer": lambda: torch.randn(2, 5, 16),
    "encoder": lambda: torch.randn(2, 5, 6),
    "llama": lambda: torch.randint(3, 99, (2, 7)),
}


def test_a_fresh_process_gets_the_same_bits(tmp_path: Path):
    prepare_torchvision()
    pytest.importorskip("transformers")
    (tmp_path / "architectures.py").write_text(MODELS)
    for name, make in INPUTS.items():
        torch.manual_seed(0)
        source = f"{tmp_path / 'architectures.py'}:{name}"
        model = sc.load_model(source).model.eval()
        given = make()
        example = {"input_ids": given} if name == "llama" else given
        for pattern in ("channel",) if name == "convolutional" else ("head",):
            result = sc.prune(model, pattern=pattern, sparsity=0.5, example=example, out=tmp_path / name, source=source)
        assert result.plan.cuts
        with torch.no_grad():
            output = result.model.eval()(given)
        wanted = output.logits if name == "llama" else output
        np.savez(tmp_path / f"{name}.npz", given=given.numpy(), wanted=wanted.numpy())
        if name == "llama":
            assert any("from_pretrained" in note for note in result.report.notes)
            assert (tmp_path / name / "config.json").is_file()
    source_dir = Path(sc.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path), str(torch.get_num_threads()), *INPUTS],  # bits depend on the threads
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(source_dir)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all the same" in done.stdout


def test_a_model_that_no_configuration_builds_says_so_and_loads_with_its_plan(tmp_path: Path):
    prepare_torchvision()
    transformers = pytest.importorskip("transformers")
    (tmp_path / "architectures.py").write_text(MODELS)
    source = f"{tmp_path / 'architectures.py'}:llama"
    model = sc.load_model(source).model.eval()
    with torch.no_grad():  # the first layer's neurons count for less, so that more of them go
        for projection in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj):
            projection.weight.mul_(0.01)
    given = torch.randint(3, 99, (2, 7))
    result = sc.prune(
        model,
        pattern="channel",
        allocation="global",
        sparsity=0.4,
        example={"input_ids": given},
        out=tmp_path / "a",
        source=source,
    )
    assert any("no configuration" in note for note in result.report.notes)
    assert not (tmp_path / "a" / "config.json").exists()
    loaded = sc.load(tmp_path / "a").eval()
    assert isinstance(loaded, transformers.LlamaForCausalLM)
    with torch.no_grad():
        assert torch.equal(loaded(given).logits, result.model.eval()(given).logits)


def test_a_class_that_asks_for_more_than_a_configuration_is_built_from_none():
    transformers = pytest.importorskip("transformers")
    from secateur.export.pretrained import config_of

    class Own(transformers.PreTrainedModel):
        config_class = transformers.BertConfig

        def __init__(self, config, width):
            super().__init__(config)
            self.linear = torch.nn.Linear(width, width)

    assert config_of(Own(transformers.BertConfig(), 4)) is None
