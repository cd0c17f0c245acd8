"""A `Report` made visible: one self-contained HTML page, the same rows in the terminal, and helpers that fill it."""
