"""The places of a model whose activations can be kept, by name."""

from typing import NamedTuple

SITES = {
    "resid_pre": "the residual stream before a layer",
    "resid_mid": "the residual stream between attention and MLP",
    "resid_post": "the residual stream after a layer",
    "attn_out": "what attention adds to the residual stream",
    "attn_z": "the outputs of the attention heads side by side, before they are projected",
    "mlp_in": "what the MLP reads: after the second norm, gain and bias included",
    "mlp_post": "the MLP's hidden units after the activation function (times the gate where there is one)",
    "mlp_out": "what the MLP adds to the residual stream",
}


class Point(NamedTuple):
    """One place in the model: a site of a layer, counted from 0."""

    layer: int
    site: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.site}"
