"""The text on which latents fire, and their effect on a language model."""
