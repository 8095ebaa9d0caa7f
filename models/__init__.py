"""Backbones, checkpoints of every layout, the frozen teacher, the student with its head, and MoCo v2."""
