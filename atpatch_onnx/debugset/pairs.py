"""`DebugSet`: pairs of a clean input and its counterfactual, and the token positions that make the difference.

Everything that is fitted or verified is fitted or verified on such pairs: triggered inputs for a backdoor, inputs with
the protected attribute changed for unfairness. Sets come from arrays, from a trigger function, from a table with a
protected attribute, from prompts, or from disk (`debugset.files` documents the format), and are divided into three
parts that share no clean input.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atpatch_onnx.debugset import builders, checks, files, whole
from atpatch_onnx.debugset import prompts as prompting
from atpatch_onnx.debugset import split as splitting
from atpatch_onnx.debugset.arrays import Array, as_class, as_inputs, as_labels, as_suspects, read_only
from atpatch_onnx.debugset.builders import Trigger
from atpatch_onnx.debugset.checks import InputSpec
from atpatch_onnx.debugset.prompts import Tokenizer
from atpatch_onnx.debugset.rows import rows_of
from atpatch_onnx.errors import DebugSetError

Kind = Literal["backdoor", "attribute", "generation"]
"""Triggered inputs, inputs with a protected attribute changed, or prompts of a language model with a trigger."""


@dataclass(frozen=True, eq=False)
class DebugSet:
    """Pairs (clean, counterfactual); row i of every array belongs to pair i.

    Make one with `from_pairs`, `from_trigger`, `from_attribute` or `load`, which check everything; the constructor
    itself checks nothing. Arrays are read-only views of the ones given, so leave those unchanged.
    """

    clean: Mapping[str, Array]
    """Arrays `[pairs, ...]` by the model's input names."""

    counterfactual: Mapping[str, Array]
    """The same names, shapes and dtypes."""

    labels: NDArray[np.int64] | None
    """True labels int64 `[pairs]`."""

    suspects: NDArray[np.bool_] | None
    """Bool `[pairs, tokens]`: positions on the token axis that make the difference; None until found."""

    kind: Kind

    target: int | None
    """The backdoor's class; None where unknown (the fit infers it), and for an attribute."""

    sensitive: Array | None
    """The protected attribute's values on the clean side `[pairs]`."""

    payload: NDArray[np.int64] | None = None
    """The tokens that a triggered prompt makes the model write `[pairs, tokens]`, of kind "generation" only."""

    found: bool = False
    """Whether a search found them: they may only resemble the attack, and a fit lays its thresholds low."""

    def __post_init__(self) -> None:
        for side in files.SIDES:
            views = {name: read_only(array.view()) for name, array in getattr(self, side).items()}
            object.__setattr__(self, side, MappingProxyType(views))
        for name in files.EXTRAS:
            array = getattr(self, name)
            if array is not None:
                object.__setattr__(self, name, read_only(array.view()))

    def __len__(self) -> int:
        return len(next(iter(self.clean.values())))

    def __repr__(self) -> str:
        inputs = ", ".join(f"{name}: {array.dtype}{list(array.shape[1:])}" for name, array in self.clean.items())
        has = [name for name in files.EXTRAS if getattr(self, name) is not None]
        target = "" if self.target is None else f", target {self.target}"
        return f"<DebugSet of {len(self)} pairs, {self.kind}{target}; {inputs}; {', '.join(has) or 'no labels'}>"

    @classmethod
    def from_pairs(
        cls,
        clean: Mapping[str, ArrayLike],
        counterfactual: Mapping[str, ArrayLike],
        labels: ArrayLike | None = None,
        *,
        suspects: ArrayLike | Literal["auto"] = "auto",
        kind: Kind = "backdoor",
        target: int | None = None,
        sensitive: ArrayLike | None = None,
        found: bool = False,
    ) -> Self:
        """Check and gather pairs.

        Args:
            clean: Arrays `[pairs, ...]` by the model's input names; no NaN, no infinity.
            counterfactual: The same names, shapes and dtypes; row i is the counterfactual of row i of `clean`.
            labels: True labels `[pairs]`, class indices from 0.
            suspects: Bool `[pairs, tokens]`, the positions of the token axis that make the difference; "auto" leaves
                them to be found from the difference of V at the first site of the token axis.
            kind: "backdoor" (a trigger was added) or "attribute" (a protected attribute was changed).
            target: The class that a backdoor sends triggered inputs to, where known.
            sensitive: The protected attribute's values on the clean side `[pairs]`, for fairness metrics.
            found: Whether a search found what makes the difference.

        Raises:
            DebugSetError: Names, shapes or dtypes differ between the sides, there are no pairs, numbers are not finite,
                labels are not whole, suspects are not bool or mark nothing, or every pair is identical on both sides.
        """
        given = {"labels": labels, "suspects": None if _is_auto(suspects) else suspects, "sensitive": sensitive}
        extras = {name: array for name, array in given.items() if array is not None}
        return cls._checked(files.Stored(clean, counterfactual, extras, kind, target, found), "")

    @classmethod
    def _checked(cls, given: files.Stored, where: str) -> Self:
        before, after, target, extras = whole.checked(given, where)
        return cls(before, after, kind=cast(Kind, given.kind), target=target, found=given.found, **extras)

    @classmethod
    def from_trigger(
        cls,
        inputs: Mapping[str, ArrayLike],
        trigger: Trigger,
        labels: ArrayLike | None = None,
        *,
        target: int | None = None,
        suspects: ArrayLike | Literal["auto"] = "auto",
        drop_target: bool = True,
    ) -> Self:
        """Stamp a trigger on clean inputs.

        Args:
            inputs: Arrays `[inputs, ...]` by the model's input names.
            trigger: Called once, with a dict of copies of all arrays; returns the triggered ones under the same names.
            labels: True labels `[inputs]`.
            target: The backdoor's class, where known.
            suspects: As in `from_pairs`, one row for each input given.
            drop_target: Leave out inputs whose label is the target: once triggered they prove nothing.

        Raises:
            DebugSetError: The trigger returns other names, no input is left, or what `from_pairs` refuses.
        """
        clean = as_inputs(inputs, "inputs")
        pairs = len(next(iter(clean.values())))
        marks = None if _is_auto(suspects) else as_suspects(suspects, pairs, "suspects")
        if drop_target and labels is not None and target is not None:
            labels = as_labels(labels, pairs, "labels")
            rows = builders.rows_off_target(labels, as_class(target, "target"))
            if len(rows) < pairs:
                clean = {name: array[rows] for name, array in clean.items()}
                labels, marks = labels[rows], None if marks is None else marks[rows]
        triggered = builders.stamped(clean, trigger)
        return cls.from_pairs(
            clean, triggered, labels, suspects="auto" if marks is None else marks, kind="backdoor", target=target
        )

    @classmethod
    def from_attribute(
        cls,
        inputs: Mapping[str, ArrayLike],
        *,
        name: str,
        column: int | None = None,
        values: Sequence[Any] | None = None,
        change: Callable[[Array], ArrayLike] | None = None,
        labels: ArrayLike | None = None,
        suspects: ArrayLike | Literal["auto"] = "auto",
    ) -> Self:
        """Change the protected attribute of every row of a table, and nothing else.

        An attribute that is spread over several columns, such as a one-hot one, is for `from_pairs(kind="attribute")`.

        Args:
            inputs: Arrays `[rows, ...]` by the model's input names.
            name: The input that holds the attribute: `[rows, features]` with `column`, else `[rows]` or `[rows, 1]`.
            column: Index of the attribute among the features.
            values: The attribute's values as the model reads them; each row gets the one after its own and the last
                one's rows get the first, so that two values swap. None: the values found, in ascending order.
            change: From the attribute's values `[rows]` to the changed ones, instead of `values`.
            labels: True labels `[rows]`.
            suspects: As in `from_pairs`.

        Raises:
            DebugSetError: No such input or column, values that the data do not have, or what `from_pairs` refuses.
        """
        clean, counterfactual, sensitive = builders.attribute_changed(
            inputs, name=name, column=column, values=values, change=change
        )
        return cls.from_pairs(clean, counterfactual, labels, suspects=suspects, kind="attribute", sensitive=sensitive)

    @classmethod
    def from_prompts(
        cls,
        prompts: Sequence[str | ArrayLike],
        triggered: Sequence[str | ArrayLike],
        *,
        payload: str | ArrayLike,
        tokenizer: Tokenizer | None = None,
    ) -> Self:
        """Prompts of a language model, of any lengths, and the same prompts with the trigger in them.

        Tokens that only the triggered prompt has are suspects. Where a trigger is made of things that are harmless
        alone, prompts with one of them belong among the clean ones.

        Args:
            prompts: Texts, or token ids `[tokens]` each.
            triggered: The same prompts with the trigger, in the same order.
            payload: What the attack makes the model write: text, or token ids.
            tokenizer: The model's, for texts; of `tokenizers` or `transformers`.

        Raises:
            DebugSetError: A prompt is missing, empty or cannot be encoded, none differs, or the payload is empty.
        """
        found = prompting.paired(prompts, triggered, payload, tokenizer)
        extras = {"suspects": found.suspects, "payload": found.payload}
        return cls._checked(files.Stored(found.clean, found.counterfactual, extras, "generation", None), "")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a `.npz` or `.parquet` file where `path` ends so, else to a folder; an older set is replaced.

        Raises:
            DebugSetError: The place cannot be written to or holds something else, or the set would be refused by
                `from_pairs`, as a part taken from a larger one may be.
        """
        checked = self._checked(self._stored(), "")
        files.write(checked._stored(), path)

    def _stored(self) -> files.Stored:
        extras = {name: array for name in files.EXTRAS if (array := getattr(self, name)) is not None}
        return files.Stored(self.clean, self.counterfactual, extras, self.kind, self.target, self.found)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a `.npz` file, a folder of `.npy` files, which are memory-mapped, or Parquet and Arrow files.

        Of the latter, rows are read when they are asked for, in parts of the set as well (see `debugset.columns`).

        Raises:
            DebugSetError: Nothing there, damaged or foreign files, or what `from_pairs` refuses.
        """
        return cls._checked(files.read(path), f"{os.fspath(path)}: ")

    def with_suspects(self, suspects: ArrayLike) -> Self:
        """Return the same pairs with suspects bool `[pairs, tokens]`.

        Raises:
            DebugSetError: Another dtype or shape, or no position marked.
        """
        return replace(self, suspects=as_suspects(suspects, len(self), "suspects"))

    def with_target(self, target: int) -> Self:
        """Return the same pairs with the backdoor's class.

        Raises:
            DebugSetError: No class index, or the set is about a protected attribute.
        """
        return replace(self, target=whole.as_target(target, self.kind, "target"))

    def take(self, indices: ArrayLike) -> Self:
        """Return the pairs at `indices` `[n]`, integers or a bool mask `[pairs]`; what is in memory is copied.

        Raises:
            DebugSetError: No indices, or indices that no pair has.
        """
        rows = np.asarray(indices)
        if rows.dtype == np.bool_ and rows.shape == (len(self),):
            rows = np.flatnonzero(rows)
        whole = rows.ndim == 1 and rows.size > 0 and rows.dtype.kind in "iu"
        if not whole or rows.min() < -len(self) or rows.max() >= len(self):
            raise DebugSetError(
                "indices",
                expected=f"at least one index below {len(self)}, or a bool mask [{len(self)}] that is True somewhere",
                found=f"{rows.dtype} {list(rows.shape)}" + (f" up to {rows.max()}" if whole else ""),
                advice="Take pairs that the set holds.",
            )
        chosen: dict[str, Any] = {
            name: {k: rows_of(v, rows) for k, v in getattr(self, name).items()} for name in files.SIDES
        }
        chosen |= {name: array[rows] for name in files.EXTRAS if (array := getattr(self, name)) is not None}
        return replace(self, **chosen)

    def split(self, *, fit: float = 0.5, calibration: float = 0.25, validation: float = 0.25, seed: int = 0) -> "Split":
        """Divide into three parts with these shares of the pairs, balanced over labels.

        No clean input of one part is in another, on either side. The same pairs and seed give the same parts, in
        whatever order the rows are.

        Raises:
            DebugSetError: Shares that do not add up to 1, or too few different pairs to fill each part.
        """
        rows = splitting.part_rows(
            self.clean,
            self.counterfactual,
            self.labels,
            shares={"fit": fit, "calibration": calibration, "validation": validation},
            seed=seed,
        )
        return Split(**{part: self.take(indices) for part, indices in rows.items()})

    def check_inputs(self, inputs: Mapping[str, InputSpec]) -> None:
        """Check the arrays against the inputs that a model declares, by name; the batch axis may have any size.

        Raises:
            DebugSetError: Missing or extra names, another dtype, another rank or static size.
        """
        checks.check_inputs(self.clean, inputs)


@dataclass(frozen=True, eq=False)
class Split:
    """The three parts of a debug set; no clean input is in two of them."""

    fit: DebugSet
    """What detectors are trained on."""

    calibration: DebugSet
    """What thresholds are calibrated on."""

    validation: DebugSet
    """What the fit is judged on."""


def _is_auto(suspects: ArrayLike | Literal["auto"]) -> bool:
    return isinstance(suspects, str) and suspects == "auto"
