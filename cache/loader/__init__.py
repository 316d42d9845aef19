"""Shuffled batches from a store: the order, the reading of chunks, and what is read ahead."""
