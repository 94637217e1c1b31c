"""Floor 6: telling. Pure functions from plain data to text and pages."""
