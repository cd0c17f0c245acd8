"""Deep Compression: shared weights, entropy coding of codes and positions, and the file they lie in."""
