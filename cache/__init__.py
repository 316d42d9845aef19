"""What is on disk: stores of tokens and activations, run folders, and how they are read back. Nothing about models."""
