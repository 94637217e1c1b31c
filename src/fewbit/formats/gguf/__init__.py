"""GGUF: block types and their codecs, names, recipes, conversion."""
