"""Floor 3: on-disk conventions. Each format is a few pure functions and one row in `table.py`."""
