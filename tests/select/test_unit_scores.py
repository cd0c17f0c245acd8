"""Unit scores let go of a layer's statistics: a checkpoint larger than memory has many layers."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

from secateur.layers import find_layers
from secateur.selection import Scores, resolve
from secateur.types import LayerStats


def test_statistics_go_with_their_scores_without_a_garbage_collector():
    (layer,) = find_layers(nn.Linear(4, 3))[0].values()
    stats = LayerStats(layer.name, layer.parameter.detach(), gram=torch.eye(4)[None])
    scores = Scores({layer.name: layer}, {layer.name: stats}, resolve())
    assert scores[layer.name].left == 12
    left, gram = weakref.ref(stats), weakref.ref(stats.gram)
    gc.disable()
    try:
        del scores, stats
        assert left() is None
        assert gram() is None
    finally:
        gc.enable()
