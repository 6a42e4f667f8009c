"""How far every site of a patched model is from the numpy reference."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.baking.emission import Emission
from atpatch_onnx.baking.metadata import PatchRecord
from atpatch_onnx.baking.reference import attend
from atpatch_onnx.measuring.inspect import SiteValues, site_values
from atpatch_onnx.measuring.rehearse_base import Inside, Level, same_bits
from atpatch_onnx.measuring.rehearse_result import SiteNumbers
from atpatch_onnx.measuring.verify import TOLERANCE
from atpatch_onnx.running.sessions import Array


def site_numbers(
    patched: ir.Model,
    record: PatchRecord,
    inner: dict[str, Array],
    emission: Emission,
    level: Level,
    own: Inside,
) -> Iterator[SiteNumbers]:
    """The numbers of every site, in their order.

    Args:
        patched: The patched model.
        record: Its own record of its sites.
        inner: What it computed at them, `inspection.value_names` of each.
        emission: How the patch is written.
        level: The base, at the level of optimization that this was run at.
        own: What the base computes at the sites.
    """
    fired = False
    for site in record.sites:
        values = site_values(patched, site, inner)
        untouched = None
        if not fired:
            untouched = same_bits(inner[site.map], own.maps[site.site])
            untouched &= same_bits(inner[site.values], own.values[site.site])
        fired |= bool(values.flags.any())
        difference, product, largest = _differences(values)
        yield SiteNumbers(
            site=site.site,
            emission=emission.value,
            optimized=level.optimize,
            columns=values.flags.size,
            flagged=int(values.flags.sum()),
            difference=difference,
            product=product,
            allowed=TOLERANCE[_dtype(inner[site.output])] * max(1.0, largest),
            untouched=untouched,
        )


def _differences(values: SiteValues) -> tuple[float, float, float]:
    """From the reference, of `P V` from Y, and the largest value; infinite where only one of two is finite."""
    reference = values.reference()
    largest = max(_largest(reference), _largest(values.Y))
    return _distance(values.corrected, reference), _distance(values.Y, attend(values.P, values.V)), largest


def _largest(array: NDArray[np.float64]) -> float:
    return float(np.abs(array[np.isfinite(array)]).max(initial=0.0))


def _distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Largest absolute difference; what is NaN or infinite in one must be so in the other."""
    finite = np.isfinite(one)
    if one.shape != other.shape or not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return float("inf")
    return float(np.abs(one[finite] - other[finite]).max(initial=0.0))


def _dtype(array: Array) -> str:
    return "FLOAT16" if array.dtype == np.float16 else "FLOAT"
