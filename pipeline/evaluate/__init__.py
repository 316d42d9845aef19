"""Run folders to figures on held-out data."""
