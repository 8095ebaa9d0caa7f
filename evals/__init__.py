"""Evaluations of frozen encoders. They are handed models as objects and never build one."""
