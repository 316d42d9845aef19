"""Worlds whose truth is known: what their rows are made of, for whoever makes them and whoever judges by them."""
