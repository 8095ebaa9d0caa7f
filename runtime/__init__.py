"""Processes, devices, checkpoints, optimizers and logs, the base of every script. Imports no other package of ours."""
