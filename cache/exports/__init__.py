"""Plain files of rows for tools that know nothing of the cache: one file a format, found by being there."""
