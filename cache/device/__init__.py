"""What the cache asks of a device that computes: that tensors come and go behind its work."""
