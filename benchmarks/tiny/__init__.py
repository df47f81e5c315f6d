"""A tiny vision-language model that sees, trained on drawn scenes, to measure pruning with."""
