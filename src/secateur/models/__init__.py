"""Where models come from: ``load_model("hf:...")``, ``timm:``, ``torchvision:``, the user's own code, an artifact directory.

One file for each kind; importing it files its loader in `MODELS`.
"""

from secateur.models import artifact, huggingface, python, timm, torchvision
from secateur.models.load import load_model
from secateur.models.loaded import IMAGENET_MEAN, IMAGENET_STD, ImageInput, Loaded, Task
from secateur.models.registry import MODELS

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MODELS",
    "ImageInput",
    "Loaded",
    "Task",
    "artifact",
    "huggingface",
    "load_model",
    "python",
    "timm",
    "torchvision",
]
