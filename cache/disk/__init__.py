"""The disk as the cache needs it: durable writes, locks, checksums, strict parsing, removal, room."""
