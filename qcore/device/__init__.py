"""What runs on a device: standard library, tuf and zstandard only."""
