"""How a decoder is fed: which of its inputs are tokens, mask, positions and caches, and where caches come out.

A decoder takes tokens `[samples, tokens]` and gives logits `[samples, tokens, vocabulary]`. One with a cache also takes
the keys and values of earlier tokens `[samples, heads, tokens, depth]`, and returns those of all tokens so far.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.errors import RunError
from atpatch_onnx.graph.names import PREFIX
from atpatch_onnx.running.sessions import Array
from atpatch_onnx.running.slots import Slot, slots

_SIDES = re.compile(r"\b(input|output)\.|(?<![a-z])(past|present)(_key_values?)?(?![a-z])")
"""What the names of a cache's input and output differ in."""


@dataclass(frozen=True)
class Cache:
    """Keys or values of one layer."""

    layer: str
    """What its input and its output have in common in their names."""

    past: Slot | None
    """The input of earlier tokens; None where a graph begins with none, as one for prompts alone."""

    present: str
    """The output of all tokens so far."""


@dataclass(frozen=True)
class Decoder:
    """The inputs and outputs of a decoder."""

    tokens: Slot
    mask: Slot | None
    positions: Slot | None
    counts: tuple[Slot, ...]
    """Inputs that say how many tokens there are."""

    caches: tuple[Cache, ...]
    logits: str
    switch: Slot | None = None
    """Of a file of two graphs: the input that says which one is to run."""

    goes_on: bool = True
    """What the switch is where the model goes on from earlier tokens."""

    @property
    def is_cached(self) -> bool:
        """Whether it can go on from earlier tokens."""
        return any(cache.past is not None for cache in self.caches)

    @property
    def is_grouped(self) -> bool:
        """Whether it takes several tokens behind a cache of one sample only."""
        return any(cache.past is not None and cache.past.is_grouped for cache in self.caches)

    @classmethod
    def of(cls, model: ir.Model) -> "Decoder":
        """Find out how a model is fed.

        Raises:
            RunError: It is no decoder with logits for every token, or takes something that is not known.
        """
        taken = slots(model)
        masks = [slot for slot in taken if slot.is_mask]
        positions = [slot for slot in taken if slot.is_position]
        pasts = [slot for slot in taken if slot.is_cache]
        counts = [slot for slot in taken if slot.dtype.kind == "i" and _is_count(slot)]
        tokens = [slot for slot in taken if slot.is_ids and slot not in positions + counts]
        two = graphs.branches(model)
        switches = [slot for slot in taken if two is not None and slot.name == two.switch]
        known = [*masks, *positions, *pasts, *counts, *tokens, *switches]
        others = [slot.name for slot in taken if slot not in known]
        if len(tokens) != 1 or len(masks) > 1 or len(positions) > 1 or others:
            found = f"tokens: {_listed(tokens)}; masks: {_listed(masks)}; positions: {_listed(positions)}"
            raise _no_decoder("the model's inputs", "one of tokens, at most one mask and one of positions, and caches",
                              f"{found}; others: {', '.join(others) or 'none'}")  # fmt: skip
        return cls(
            tokens=tokens[0],
            mask=masks[0] if masks else None,
            positions=positions[0] if positions else None,
            counts=tuple(counts),
            caches=_caches(model, pasts),
            logits=_logits(model),
            switch=switches[0] if switches else None,
            goes_on=two is None or two.goes_on == "then_branch",
        )

    def feed(
        self, ids: Array, past: Mapping[str, Array] | None = None, *, mask: Array | None = None
    ) -> dict[str, Array]:
        """What the model is given to read these tokens.

        Args:
            ids: Tokens `[samples, tokens]`, all real where there is no `mask`.
            past: Caches by the names of their inputs; none at the beginning.
            mask: Which tokens are real, those of the cache included, `[samples, earlier + tokens]`.
        """
        samples, count = ids.shape
        caches = self.empty(samples) if past is None else past
        earlier = next((array.shape[2] for array in caches.values()), 0)
        mask = np.ones((samples, earlier + count), np.int64) if mask is None else mask
        fed: dict[str, Array] = {self.tokens.name: ids.astype(self.tokens.dtype), **caches}
        if self.mask is not None:
            fed[self.mask.name] = mask.astype(self.mask.dtype)
        if self.positions is not None:
            places = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, earlier:]
            fed[self.positions.name] = places.astype(self.positions.dtype)
        for slot in self.counts:
            total = earlier + count
            value = np.array(total - 1 if "seqlens" in slot.name.lower() else total, slot.dtype)
            fed[slot.name] = np.broadcast_to(value, [samples] * len(slot.sizes)).copy()
        if self.switch is not None:
            fed[self.switch.name] = np.full([1] * len(self.switch.sizes), (earlier > 0) == self.goes_on)
        return fed

    def empty(self, samples: int) -> dict[str, Array]:
        """Caches without tokens, by the names of their inputs.

        Raises:
            RunError: The sizes of one are not known.
        """
        return {cache.past.name: _nothing(cache.past, samples) for cache in self.caches if cache.past is not None}

    def check(self, ids: Array) -> None:
        """Refuse tokens that the model has no logits for.

        Raises:
            RunError: It takes another number of tokens.
        """
        size = self.tokens.sizes[1]
        if isinstance(size, int) and size != ids.shape[1]:
            raise _no_decoder(
                f"the input {self.tokens.name!r}", f"any number of tokens, or {ids.shape[1]} as asked for", str(size)
            )

    def check_followed_by(self, other: "Decoder") -> None:
        """Refuse a decoder that does not go on from the caches that this one returns.

        Raises:
            RunError: It has other layers, or takes none.
        """
        ours, theirs = ({cache.layer for cache in one.caches} for one in (self, other))
        if ours != theirs or not other.is_cached:
            raise _no_decoder(
                "the caches of the decode graph",
                f"those that the prompt's graph returns, {', '.join(sorted(ours)) or 'none'}",
                ", ".join(sorted(theirs)) or "none",
            )


def _is_count(slot: Slot) -> bool:
    name = slot.name.lower()
    return "seqlens" in name or ("total" in name and len(slot.sizes) < 2)


def _nothing(slot: Slot, samples: int) -> Array:
    heads, tokens, depth = slot.sizes[1], slot.sizes[2], slot.depth
    if not isinstance(heads, int) or depth is None or isinstance(tokens, int):
        raise _no_decoder(
            f"the cache {slot.name!r}",
            "known heads and depth, and any number of tokens",
            f"the shape {list(slot.sizes)}",
        )
    return np.zeros((samples, heads, 0, depth), slot.dtype)


def _caches(model: ir.Model, pasts: Sequence[Slot]) -> tuple[Cache, ...]:
    outputs = [value for value in model.graph.outputs if value.shape is not None and len(value.shape) == 4]
    presents = {_key(str(value.name)): str(value.name) for value in outputs if not _is_ours(value)}
    if not pasts:
        return tuple(Cache(key, None, name) for key, name in presents.items() if "key" in key or "value" in key)
    missing = [slot.name for slot in pasts if _key(slot.name) not in presents]
    if missing:
        raise _no_decoder(
            f"the cache {missing[0]!r}", "an output of the same layer", ", ".join(presents.values()) or "none"
        )
    return tuple(Cache(_key(slot.name), slot, presents[_key(slot.name)]) for slot in pasts)


def _key(name: str) -> str:
    """What the input and the output of a cache have in common."""
    return _SIDES.sub("", name).strip("._").replace("keys", "key").replace("values", "value")


def _logits(model: ir.Model) -> str:
    found = [
        value
        for value in model.graph.outputs
        if value.shape is not None and len(value.shape) == 3 and not _is_ours(value)
        and value.dtype is not None and value.dtype.is_floating_point()
    ]  # fmt: skip
    if not found:
        names = ", ".join(str(value.name) for value in model.graph.outputs)
        raise _no_decoder("the model's outputs", "logits [samples, tokens, vocabulary]", names or "none")
    return str(found[0].name)


def _is_ours(value: ir.Value) -> bool:
    return str(value.name).startswith(PREFIX)


def _listed(found: Sequence[Slot]) -> str:
    return ", ".join(slot.name for slot in found) or "none"


def _no_decoder(where: str, expected: str, found: str) -> RunError:
    return RunError(
        where,
        expected=expected,
        found=found,
        advice="Generation needs a decoder that gives logits for every token; export it so.",
    )
