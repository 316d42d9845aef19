"""Several processes: torch ranks, dask workers, a pool for text."""
