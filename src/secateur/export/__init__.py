"""Models on disk: the artifact directory, masks, and what any checkpoint really holds."""
