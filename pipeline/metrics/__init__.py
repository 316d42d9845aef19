"""What the stages measure, as streaming accumulators of plain tensors. Nothing here knows a model, a cache or a path.

Each class is fed batches with `update` and answers with `result`: sums are kept in float64, so the answer does not
depend on how the rows were batched (to rounding), and memory does not grow with them. What cannot be said (a ratio
to zero, a count over too few rows) is None, never a made-up number.
"""

from pipeline.metrics.downstream import Downstream, DownstreamScores, Estimate
from pipeline.metrics.reconstruction import Reconstruction, ReconstructionScores
from pipeline.metrics.sparsity import Sparsity, SparsityScores

__all__ = [
    "Downstream",
    "DownstreamScores",
    "Estimate",
    "Reconstruction",
    "ReconstructionScores",
    "Sparsity",
    "SparsityScores",
]
