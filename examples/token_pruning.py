"""Token pruning: the pixels of a digit that nobody attends to leave a small vision transformer early."""

import torch
from digits_resnet import accuracy, train
from torch import nn

import secateur as sc


class Vit(nn.Module):
    """A CLS token and 16 tokens of 2 x 2 pixels, through six layers."""

    def __init__(self):
        super().__init__()
        self.patch, self.place = nn.Conv2d(1, 32, 2, 2), nn.Parameter(torch.randn(1, 17, 32) / 5)
        layers = [nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True) for _ in range(6)]
        self.layers, self.head = nn.Sequential(*layers), nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 10))

    def forward(self, x):  # noqa: D102
        tokens = nn.functional.pad(self.patch(x).flatten(2).mT, (0, 0, 1, 0)) + self.place
        return self.head(self.layers(tokens)[:, 0])


torch.manual_seed(0)
vit = Vit()
sc.finetune(vit, train, epochs=8, lr=4e-3)
print(f"dense: {accuracy(vit.eval()):.3f}")
gated = sc.dynamic(vit, method="tokens", data=train)
for budget in (1.0, 0.8, 0.6):
    gated.budget = budget
    with gated.recording() as costs:
        found = accuracy(gated)
    print(f"budget {budget:.0%}: accuracy {found:.3f}; {costs}")
