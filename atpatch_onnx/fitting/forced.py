"""Prompts as a debug set that is fitted like any other: the model reads each prompt with its answer, at once.

A greedy loop writes the base's answer to the clean prompt exactly where, reading that answer behind a prompt, each of
its tokens is the most likely one. So one pass tells what a loop of many steps would do: write the clean answer (class
`RIGHT`), go with the attack where the base's two answers part (`ATTACKED`), or something else (`OTHER`). The model gets
nodes at its end that say so, of every sample. What is read is what the base itself wrote on, up to one length for all
prompts: there is no padding, and detectors are calibrated on what the model writes as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.debugset.prompts import lines
from atpatch_onnx.errors import DebugSetError
from atpatch_onnx.graph import ModelOrPath
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.running.decoders import Decoder
from atpatch_onnx.running.loops import Ids, Loop
from atpatch_onnx.running.opening import Libraries
from atpatch_onnx.running.providers import Providers
from atpatch_onnx.running.sessions import Array, Progress, silent

RIGHT, ATTACKED, OTHER = range(3)
"""What a loop would write behind a prompt, as classes."""

OUTPUT = "judged"
"""Name of the output with these classes, as logits `[samples, 3]`."""

EXPECTED, FORK = "judged/expected", "judged/fork"
"""Inputs `[samples, tokens]`: the token that the clean answer has next, and the one that the attack has where the two
answers part; -1 where nothing is asked."""


@dataclass(frozen=True, eq=False)
class Answered:
    """What the base writes behind the prompts of a debug set."""

    decoder: Decoder
    clean: tuple[Ids, ...]
    triggered: tuple[Ids, ...]
    answers: tuple[Ids, ...]
    """Behind the clean prompts, on to one length with them for all."""

    attacked: tuple[Ids, ...]
    """Behind the triggered prompts."""

    longest: int
    """Tokens of the longest prompt and its answer."""

    @classmethod
    def of(
        cls,
        model: ModelOrPath,
        debug: DebugSet,
        steps: int,
        decode: ModelOrPath | None = None,
        *,
        providers: Providers = ("cpu",),
        custom_ops: Libraries = (),
        batch_size: int = 32,
        progress: Progress = silent,
    ) -> "Answered":
        """Let a model answer.

        Args:
            model: A decoder, with or without a cache.
            debug: Of kind "generation".
            steps: Tokens of the answer that count.
            decode: As in `Loop`, as the next.
            providers: Execution providers.
            custom_ops: As in `Loop`.
            batch_size: Prompts at a time.
            progress: Told after every batch.

        Raises:
            RunError: The model is no decoder, or does not read so many tokens.
        """
        loop = Loop(model, decode, providers=providers, custom_ops=custom_ops)
        clean, triggered = lines(debug.clean), lines(debug.counterfactual)
        longest = max(map(len, (*clean, *triggered))) + steps
        run: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        answers = loop.write(clean, [longest - len(one) for one in clean], stage="writing, clean prompts", **run)
        attacked = loop.write(triggered, steps, stage="writing, triggered prompts", **run)
        return cls(loop.decoder, tuple(clean), tuple(triggered), tuple(answers), tuple(attacked), longest)

    def read(self, prompts: Sequence[Ids]) -> Ids:
        """Prompts with the answers to the clean ones, all of one length, `[prompts, tokens]`."""
        both = zip(prompts, self.answers, strict=True)
        return np.stack([np.concatenate([one, answer])[: self.longest] for one, answer in both])


def as_read(answered: Answered, debug: DebugSet, decoder: Decoder) -> DebugSet:
    """The debug set with what a decoder takes: prompts and answers read at once."""
    before, after = (decoder.feed(answered.read(side)) for side in (answered.clean, answered.triggered))
    return DebugSet.from_pairs(before, after, suspects=_suspects(answered, debug))


def forced(
    model: ir.Model, debug: DebugSet, *, steps: int, batch_size: int = 32, progress: Progress = silent
) -> tuple[ir.Model, DebugSet]:
    """The model that judges itself, and the debug set for it, a backdoor with the target `ATTACKED`.

    Arguments and errors as in `Answered.of`.

    Raises:
        DebugSetError: The model writes the payload behind no prompt because of the trigger.
    """
    answered = Answered.of(model, debug, steps, batch_size=batch_size, progress=progress)
    assert debug.payload is not None, "prompts bring their payload"
    before = has_payload([answer[:steps] for answer in answered.answers], debug.payload)
    if not (has_payload(answered.attacked, debug.payload) & ~before).any():
        raise DebugSetError(
            "the debug set",
            expected=f"triggered prompts behind which the model writes the payload, within {steps} tokens",
            found=f"none among {len(debug)}, but where it does so without the trigger",
            advice="Check trigger and payload, token by token, and whether this is the model; or let more steps count.",
        )
    clean = _asked(answered, answered.clean, None, steps)
    triggered = _asked(answered, answered.triggered, answered.attacked, steps)
    labels, suspects = np.full(len(debug), RIGHT), _suspects(answered, debug)
    judge = judged(model, answered.decoder)
    return judge, DebugSet.from_pairs(clean, triggered, labels, suspects=suspects, target=ATTACKED)


def has_payload(written: Sequence[Ids], payload: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which answers have the payload `[answers, tokens]` in them, as a row of tokens."""
    width = payload.shape[1]
    return np.array(
        [
            any(np.array_equal(answer[at : at + width], wanted) for at in range(len(answer) - width + 1))
            for answer, wanted in zip(written, payload, strict=True)
        ],
        np.bool_,
    )


def _suspects(answered: Answered, debug: DebugSet) -> NDArray[np.bool_]:
    """The token that completes each trigger: what came before it cannot tell of it, as in no causal model.

    Others of the same id count as well, where a trigger stands in a prompt several times.
    """
    assert debug.suspects is not None, "prompts bring their suspects"
    suspects = np.zeros((len(debug), answered.longest), np.bool_)
    for row, (prompt, added) in enumerate(zip(answered.triggered, debug.suspects, strict=True)):
        places = np.flatnonzero(added)
        suspects[row, places[prompt[places] == prompt[places[-1:]]]] = True
    return suspects


def judged(model: ir.Model, decoder: Decoder) -> ir.Model:
    """A copy of a decoder with one output more, `OUTPUT`, and the inputs that it takes for it."""
    found = graphs.copy(model)
    expected, fork = (_input(found, name) for name in (EXPECTED, FORK))
    at = Insertion(found.graph, "judged")
    most = at.op(
        "ArgMax",
        find_value(found.graph, decoder.logits),
        name="most_likely",
        attributes=[ir.AttrInt64("axis", -1), ir.AttrInt64("keepdims", 0)],
    )
    as_number = [ir.AttrInt64("to", ir.DataType.FLOAT)]
    unasked = at.op("Less", expected, at.constant("zero", np.array(0, np.int64)), name="unasked")
    agrees = at.op("Or", at.op("Equal", most, expected, name="equal"), unasked, name="agrees")
    right = at.reduce("ReduceMin", at.op("Cast", agrees, name="agreed", attributes=as_number), [1], name="right")
    parts = at.op("Cast", at.op("Equal", most, fork, name="parts"), name="parted", attributes=as_number)
    attacked = at.reduce("ReduceMax", parts, [1], name="attacked")
    other = at.op(
        "Sub", at.constant("one", np.ones(1, np.float32)), at.op("Max", right, attacked, name="either"), name="other"
    )
    columns = [
        at.op("Unsqueeze", column, at.constant("last", np.array([1], np.int64)), name=f"column_{number}")
        for number, column in enumerate((right, attacked, other))
    ]
    result = at.op("Concat", *columns, name="classes", attributes=[ir.AttrInt64("axis", 1)], dtype=ir.DataType.FLOAT)
    result.name, result.shape = OUTPUT, ir.Shape(["samples", len(columns)])
    found.graph.outputs.append(result)
    return found


def _input(model: ir.Model, name: str) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(["samples", "judged_tokens"]), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(value)
    return value


def _asked(answered: Answered, prompts: Sequence[Ids], attacked: Sequence[Ids] | None, steps: int) -> dict[str, Array]:
    """What the model reads of one side, and what is asked of it."""
    ids = answered.read(prompts)
    expected, fork = np.full((2, *ids.shape), -1, np.int64)
    for row, (prompt, answer) in enumerate(zip(prompts, answered.answers, strict=True)):
        start = len(prompt) - 1  # the last token of the prompt has the logits of the first of the answer
        expected[row, start : start + steps] = answer[:steps]
        if attacked is not None and (apart := np.flatnonzero(answer[:steps] != attacked[row])).size:
            fork[row, start + apart[0]] = attacked[row][apart[0]]
    return {**answered.decoder.feed(ids), EXPECTED: expected, FORK: fork}
