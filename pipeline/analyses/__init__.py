"""Analyses of one dictionary: a file each, found by being there; `analysis` says how one is written.

Where evaluation gives figures to compare dictionaries by, an analysis looks at one from a side: figures, numbers of
every latent, and a plot.
"""
