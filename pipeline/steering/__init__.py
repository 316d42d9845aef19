"""A run's dictionary in its language model: what its latents do on a text, and what the model does when they change."""
