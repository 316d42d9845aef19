"""Everything on disk: stores of tokens and activations, run folders, and the reading of them. Nothing about models."""
