"""Vision-language models: modalities pruned apart, heads ranked by what they see, late layers without visual tokens."""
