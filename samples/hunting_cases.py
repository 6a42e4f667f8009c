"""What hunts and scans are measured on, and how much of it."""

TRAFFIC = 2_000
SHARES = (0.02, 0.005)
"""Of the traffic that is triggered. What is found of the first one is fitted."""

TWINS = 5
RESAMPLED = 20
"""Traffics that each twin is hunted in."""

POOL = 6_000
"""Inputs at most that these are drawn from."""

CLEAN = 1_000
"""Clean inputs that a model is scanned with."""

SHORT = 5_000
"""Short inputs whose hunt is timed."""

HUNTED = ("vit/badnets-fixed", "vit/badnets-random", "vit/badnets-apart", "minilm/token", "minilm/phrase")
ESCAPING = ("vit/blended",)
"""Triggers that lie over a whole input: nothing is expected to be found."""

TABLES = ("adult/sex", "german/sex", "compas/sex")
"""One case a table: all share its base, and a scan exchanges every column."""

CASES = (*HUNTED, *ESCAPING, *TABLES)
ONE_A_TWIN = ("vit/badnets-fixed", "minilm/token")
"""The cases that stand for their twins."""
