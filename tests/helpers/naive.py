"""Loops over Python floats for the methods' formulas; nothing of ours is used here."""

import math


def unit(row):
    length = math.sqrt(math.fsum(x * x for x in row))
    return [x / length for x in row]


def units(rows):
    return [unit(row) for row in rows]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def log_softmax(scores):
    top = max(scores)
    total = top + math.log(math.fsum(math.exp(x - top) for x in scores))
    return [x - total for x in scores]


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def info_nce(rows, positives, queue, temperature):
    """Cross-entropy with the positive first, the mean over rows."""
    return mean(-log_softmax([dot(z, p) / temperature, *(dot(z, n) / temperature for n in queue)])[0]
                for z, p in zip(rows, positives, strict=True))


def squared_distance(a, b):
    return math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True))


class Ring:
    """A list in which the oldest entry is overwritten, one at a time."""

    def __init__(self, rows):
        self.rows, self.next, self.puts = [list(row) for row in rows], 0, 0

    def put(self, rows):
        for row in rows:
            self.rows[self.next] = list(row)
            self.next = (self.next + 1) % len(self.rows)
            self.puts += 1

    def filled(self):
        return [self.rows[i] for i in range(min(self.puts, len(self.rows)))]
