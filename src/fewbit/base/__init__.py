"""Floor 0: errors, names, manifests, records. Imports nothing of ours."""
