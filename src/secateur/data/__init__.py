"""Where batches come from, and what a batch is: ``load_data("npz:...")``, and the evaluators made from batches.

One file for each kind of source; importing `load_data` files their loaders in `DATA`.
"""

from secateur.data import folder, npz, python, text
from secateur.data.load import Dataset, load_data
from secateur.data.registry import DATA, Samples

__all__ = ["DATA", "Dataset", "Samples", "folder", "load_data", "npz", "python", "text"]
