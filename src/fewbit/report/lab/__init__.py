"""The number lab's pages: built once from its results, shown as text or as one self-contained HTML file."""
