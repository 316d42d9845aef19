"""Recordings: multivariate time series in files, read step by step; how they are scaled, filtered and held out."""
