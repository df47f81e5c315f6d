"""A published language model that was taught to see drawn scenes, to measure pruning with."""
