"""The fixtures of the small experiment and of every method, for the files here."""

from helpers.experiment import distil_flags, neighbours, run, teacher, teacher_run, tree, work  # noqa: F401
from helpers.methods import method_files  # noqa: F401
