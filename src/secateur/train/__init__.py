"""Training with masks: masks that hold under any optimizer, gradual pruning, and a small fine-tuning loop."""
