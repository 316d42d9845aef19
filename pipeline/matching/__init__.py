"""Dictionaries against each other: which latents of one are those of another, by direction and by when they fire."""
