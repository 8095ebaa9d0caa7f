"""Notices a run whose features grow while nothing is learnt: losses that ignore a feature's length do not stop it."""

from __future__ import annotations

from collections.abc import Mapping

GROWTH = 300  # times the norm of the first step; a good run of the demo set reaches 64, a bad one 1,000 to 10^6
IN_A_ROW = 2  # log lines


class GrowthWatch:
    """Called with each line of the log, returns a sentence once in a run, otherwise ''.

    That is when the norm of the student's rows is above :data:`GROWTH` times that of the first call, and their
    cosine to the teacher's rows below ``constant_cosine``, which one vector for all images would reach: the teacher's
    mean. It is part of the checkpoint, so that a resumed run is compared with its start too.
    """

    def __init__(self) -> None:
        self.start, self.lines, self.said = 0.0, 0, False

    def __call__(self, values: Mapping[str, float]) -> str:
        if not {"student_norm", "row_cosine", "constant_cosine"} <= values.keys():
            return ""
        norm, cosine, constant = values["student_norm"], values["row_cosine"], values["constant_cosine"]
        self.start = self.start or norm
        self.lines = self.lines + 1 if norm > GROWTH * self.start and cosine < constant else 0
        if self.said or self.lines < IN_A_ROW:
            return ""
        self.said = True
        return (f"the student's features are {norm / self.start:,.0f} times as long as at the first step and have "
                f"learnt nothing: their cosine to the teacher is {cosine:.2f}, that of one constant vector "
                f"{constant:.2f}; the steps are too large, so start again with a lower --lr or longer --warmup-epochs")

    def state_dict(self) -> dict[str, float | bool]:
        """The first norm, and whether the sentence has been said."""
        return {"start": self.start, "said": self.said}

    def load_state_dict(self, state: Mapping[str, float | bool]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.start, self.said = float(state["start"]), bool(state["said"])
