"""Tokenizers, and whether two of them are the same."""
