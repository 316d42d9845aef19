"""Runs and stores in repositories of the Hugging Face hub: put there, and fetched from there."""
