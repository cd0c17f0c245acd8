"""Sizes, cost, speed and quality of a model, and how sensitive each of its layers is."""
