"""Sparse dictionaries of language models: cached activations, training, evaluation."""
