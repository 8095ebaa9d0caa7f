"""What the root scripts share: command lines, opening networks, methods, and evaluate.py's sub-commands."""
