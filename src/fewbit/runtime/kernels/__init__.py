"""Products of activations with low-bit weights; each file's rows stand in `runtime.layouts`."""
