"""Processes, devices, features, search, state and logs: what every script stands on. Imports nothing of ours."""
