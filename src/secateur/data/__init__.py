"""Where batches come from, and what a batch is."""
