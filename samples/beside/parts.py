"""The parts of the page, in its order."""

from samples.beside import fairness
from samples.beside.part import Part

PARTS: tuple[Part, ...] = (fairness.PART,)
