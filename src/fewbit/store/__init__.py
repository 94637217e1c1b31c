"""Floor 4: bytes. The only package that reads and writes files: checkpoints in, shards out."""
