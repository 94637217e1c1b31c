"""Floor 5: doing. Streaming, resuming, distributing; the only floor with state."""
