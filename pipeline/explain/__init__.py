"""Explanations of latents in words, and how much they foretell of text that they were not made from."""
