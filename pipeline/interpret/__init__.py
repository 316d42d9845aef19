"""Latents and what they fire on."""
