"""Where batches come from, what a batch is, and what judges a model by them.

``load_data("npz:...")`` gives batches; `accuracy`, `perplexity` and `loss` make evaluators of them. One file for each kind of
source; importing this package files their loaders in `DATA`.
"""

from secateur.data import folder, npz, python, text
from secateur.data.evaluate import Evaluate, accuracy, default_evaluator, load_evaluator, loss, perplexity
from secateur.data.load import Dataset, load_data
from secateur.data.registry import DATA, Samples
from secateur.data.similarity import similarity

__all__ = [
    "DATA",
    "Dataset",
    "Evaluate",
    "Samples",
    "accuracy",
    "default_evaluator",
    "folder",
    "load_data",
    "load_evaluator",
    "loss",
    "npz",
    "perplexity",
    "python",
    "similarity",
    "text",
]
