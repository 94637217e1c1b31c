"""Floor 4: deciding, from shapes and facts alone. Pure: no files, no torch."""
