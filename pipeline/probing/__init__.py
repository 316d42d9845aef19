"""How much of what texts are labelled with a few latents tell: k-sparse probing."""
