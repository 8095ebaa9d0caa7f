"""The sub-commands of evaluate.py, one module each: HELP, add_flags(parser), run(args, process) -> the record.

They stand beside the root scripts: they read the command line, open networks and images, and hand them as objects to
evals/, which computes. A new one is a module here and a line in evaluate.py.
"""
