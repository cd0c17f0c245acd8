"""Layer skipping: a network trained with LayerDrop, whose blocks each image then uses or passes by."""

import torch
from digits_resnet import accuracy, make, train

import secateur as sc
from secateur.train.layerdrop import layerdrop

model = make()
with layerdrop(model, ["1.0", "1.1", "1.2", "1.3"], p=0.3):
    sc.finetune(model, train, epochs=3, lr=5e-3)
print(f"dense: {accuracy(model):.3f}")
gated = sc.dynamic(model, method="skip", data=[torch.cat([x for x, _ in train])[:512]])
for budget in (1.0, 0.8, 0.6):
    gated.budget = budget
    with gated.recording() as costs:
        found = accuracy(gated)
    print(f"budget {budget:.0%}: accuracy {found:.3f}; {costs}")
