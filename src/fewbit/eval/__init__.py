"""Floor 6: measuring and verifying."""
