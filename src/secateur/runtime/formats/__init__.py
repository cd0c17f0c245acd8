"""Exact conversions between dense tensors and sparse formats. Nothing here rounds, and nothing here is fast arithmetic."""
