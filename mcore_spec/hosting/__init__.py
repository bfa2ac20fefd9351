"""How a transformers model carries a draft: its batches, its forward, its record in the configuration."""
