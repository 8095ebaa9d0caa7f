"""Data sets that only an evaluation knows."""
