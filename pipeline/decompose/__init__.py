"""Weights of a model to components: stochastic parameter decomposition (Bushnaq et al. 2025, arXiv 2506.20790).

components  rank-one components of a matrix, how important each is for a row, and what products become under a mask
losses      faithfulness, reconstruction under stochastic masks, importance minimality
config      the settings of `sae decompose`
subjects    what is decomposed: one MLP on cached rows, a language model on tokens, toy models of superposition
reading     what a decomposition says: what fires, and what is left of the model without the rest
stage       the run folder, the training, its checkpoints
"""
