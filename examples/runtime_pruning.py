"""Runtime Neural Pruning: how many channel groups an image needs is decided while it passes through the network."""

from digits_resnet import accuracy, make, test, train

import secateur as sc

model = make()
print(f"dense: {accuracy(model):.3f}")
gated = sc.dynamic(model, method="rnp", data=train, epochs=3, lr=0.02, episodes=512, steps=160, hidden=8)
for budget in (1.0, 0.8, 0.6, 0.4):
    gated.budget = budget
    with gated.recording() as costs:
        found = accuracy(gated)
    low, _, _, _, high = costs.quantiles()
    print(f"budget {budget:.0%}: accuracy {found:.3f}, computed {costs.mean:.0%}, image by image {low:.0%} to {high:.0%}")
print(gated(test[0][:1]).argmax().item(), "is a", test[1][0].item())
