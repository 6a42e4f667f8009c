"""The parts of the page, in its order."""

from samples.beside.part import Part

PARTS: tuple[Part, ...] = ()
