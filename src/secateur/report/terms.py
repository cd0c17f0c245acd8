"""What the words of the report mean."""

from __future__ import annotations

GLOSSARY: tuple[tuple[str, str], ...] = (
    (
        "Sparsity",
        "The fraction of the weights that was removed, 0% to 100%. A removed weight is zero, or is cut out of the model.",
    ),
    ("Parameters", "All trained numbers of the model, biases and normalisation included, zero or not."),
    ("Nonzero parameters", "Those of them that are not zero."),
    (
        "MACs",
        "Multiply-accumulate operations of one forward pass of the example input. Dense counts every weight; the second figure "
        "counts the nonzero weights only: what a kernel that skips zeros would have to do.",
    ),
    ("Size in memory", "Parameters and buffers as they lie in memory. Zeros take as much room as other numbers."),
    ("Size on disk", "The file that holds the weights, in its sparse format where that is smaller. 1 kB = 1000 bytes."),
    (
        "Latency",
        "Time of one forward pass on the machine named under Environment: the median of all runs, in brackets the quartiles, "
        "between which half of the runs lie. Batch size, threads and number type are stated beside it.",
    ),
    ("Points", "The difference of two percentages: from 97.2% to 96.9% is -0.3 points."),
    (
        "Sensitivity",
        "The quality of the model when one layer alone is pruned and nothing is repaired. A layer whose curve falls early "
        "is one to spare.",
    ),
    (
        "Pareto front",
        "The models that no other model beats: for each of them, every other is worse in quality or in the figure on the axis.",
    ),
    (
        "Error",
        "How far a layer's output moved on the calibration data, relative to the output itself: 0.1 is a tenth of its norm.",
    ),
    (
        "Pattern",
        "What is removed as one piece: single elements, rows, channels, blocks, or n of every m neighbours (2:4 keeps 2 of 4).",
    ),
)
