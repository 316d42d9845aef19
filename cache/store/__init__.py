"""A store: recipe, manifest and Zarr arrays in one folder, written window by window."""
