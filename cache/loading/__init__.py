"""What `cache.loader` is made of: which rows come when, chunks that are open, threads that read ahead."""
