"""What a search for individual discriminatory instances finds."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.discovery.attributes import Table
from atpatch_onnx.errors import DebugSetError
from atpatch_onnx.running.metrics import Rate


@dataclass(frozen=True, eq=False)
class Discrimination:
    """Individual discriminatory instances, each unlike the others in the unprotected attributes or in the protected."""

    clean: Table
    """Instances `[pairs, features]`."""

    counterfactual: Table
    """The same with other protected values, predicted otherwise; those with the largest output gap."""

    origin: NDArray[np.int64]
    """`[pairs]`: the row of the table that the search of each started from; a few moves away, so its label is the best
    guess there is."""

    is_local: NDArray[np.bool_]
    """`[pairs]`: found in the local phase, not in the global one."""

    sensitive: NDArray[np.int64]
    """`[pairs]`: a number for each combination of protected values on the clean side."""

    tried: Mapping[str, int]
    """How many different instances each phase, `global` and `local`, looked at."""

    rate: Rate
    """Individual discrimination rate: share of instances drawn uniformly from the attributes' values that discriminate.
    It is a property of the model alone; most of these instances are like nobody."""

    rate_table: Rate
    """The same share of the table's own rows."""

    def __len__(self) -> int:
        return len(self.clean)

    def debug_set(self, name: str, labels: ArrayLike | None = None) -> DebugSet:
        """The pairs as a debug set of kind "attribute".

        Args:
            name: The model's input that takes the table.
            labels: True labels `[pairs]`. Nobody was asked about a generated instance: take those of the rows that they
                come from, `table_labels[found.origin]`, or none.

        Raises:
            DebugSetError: Nothing was found, or what `DebugSet.from_pairs` refuses.
        """
        if not len(self):
            raise DebugSetError(
                "the search",
                expected="at least one discriminatory instance",
                found="none",
                advice="Search from more seeds or for more iterations; or the attribute does not matter to this model.",
            )
        return DebugSet.from_pairs(
            {name: self.clean}, {name: self.counterfactual}, labels, kind="attribute", sensitive=self.sensitive
        )
