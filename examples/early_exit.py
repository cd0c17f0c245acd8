"""Early exit: heads behind some of the blocks of a trained network, and images that are easy leave there."""

from digits_resnet import accuracy, make, train

import secateur as sc

model = make()
print(f"dense: {accuracy(model):.3f}")
gated = sc.dynamic(model, method="early_exit", data=train, exits=2, steps=200)
for budget in (1.0, 0.8, 0.6):
    gated.budget = budget
    with gated.recording() as costs:
        found = accuracy(gated)
    print(f"budget {budget:.0%}: accuracy {found:.3f}; {costs}")
