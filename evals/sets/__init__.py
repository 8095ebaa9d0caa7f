"""Data sets that only evaluations use."""
