"""What the cache asks of a disk: durable writes, locks, checksums, strict parsing, removal, room."""
