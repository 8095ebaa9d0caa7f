"""Run a training script that does something to itself at a given step:

    torchrun ... tests/helpers/at_step.py PLAN train_distill.py FLAGS

PLAN is START:RANK:STEPS:WHAT, several with commas: at torchrun's START-th start of the processes (0 is the first),
when STEPS steps are done, rank RANK gets the signal WHAT (KILL, TERM, USR1, INT), or raises (RAISE).
"""

import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def follow(plan):
    """Have runtime.run.Run do what ``plan`` says."""
    from runtime.run import Run

    start, rank = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
    due = {int(steps): what for begun, who, steps, what in (entry.split(":") for entry in plan.split(",") if entry)
           if (begun, who) == (start, rank)}
    between_steps = Run.between_steps

    def between(self, error=None):
        what = due.pop(self.steps, None)
        if what == "RAISE":
            raise ZeroDivisionError("this rank's own mistake")
        if what:
            os.kill(os.getpid(), signal.Signals[f"SIG{what}"])
        between_steps(self, error)

    Run.between_steps = between
    return lambda: setattr(Run, "between_steps", between_steps)


if __name__ == "__main__":
    follow(sys.argv[1])
    sys.argv = [str(ROOT / sys.argv[2]), *sys.argv[3:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
