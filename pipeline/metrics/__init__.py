"""Metrics of a dictionary: one file each, found by being there.

A metric says once what its figures are called, what they mean and which way is better (`figures`, readable without
torch); evaluation, report, comparison and studies show whatever there is. `metric` says how one is written. Most are
streaming accumulators of plain tensors that know no path and no cache: sums are kept in float64, so an answer does not
depend on how the rows were batched (to rounding), and memory does not grow with them. What cannot be said (a ratio to
zero, a count over too few rows) is None, never a made-up number.
"""
