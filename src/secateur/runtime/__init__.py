"""Formats in which sparse weights are kept, and the kernels that make them fast."""
