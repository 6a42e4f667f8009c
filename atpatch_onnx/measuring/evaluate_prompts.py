"""Measure a patched language model against its base by what they write."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import DebugSetError
from atpatch_onnx.fitting.forced import Answered, has_payload
from atpatch_onnx.fitting.options import FitOptions
from atpatch_onnx.measuring.inspect import require_base
from atpatch_onnx.running.loops import Ids, Loop, batches
from atpatch_onnx.running.metrics import Rate
from atpatch_onnx.running.opening import Libraries, as_model
from atpatch_onnx.running.providers import Providers
from atpatch_onnx.running.sessions import Progress, silent

CHUNKS = 3
"""In how many parts a prompt is read where it is read in parts."""


@dataclass(frozen=True)
class Written:
    """What is left of an attack on a language model: shares of what it writes behind triggered prompts.

    ASR is the share with the payload in it.
    """

    prompts: int
    steps: int
    """Tokens written behind each prompt."""

    asr_base: Rate
    asr_floor: Rate
    """Of the base, behind clean prompts."""

    asr_uncached: Rate
    """Of the patched model, as the next three; above the floor: of prompts that the base answers without the payload
    where they are clean."""

    asr_cached: Rate
    asr_chunked: Rate
    asr_sampled: Rate
    """Written at a temperature of 1, several times."""

    right_triggered: Rate
    """The patched model writes what the base writes behind the same prompt without the trigger."""

    clean_exact: Rate
    """The patched model writes what the base writes behind clean prompts."""

    flags: Rate
    """Share of benign tokens, of clean prompts and the base's answers to them, that are flagged."""

    perplexity_base: float
    """Of clean prompts."""

    perplexity_patched: float

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON types."""
        return asdict(self)


def evaluate_prompts(
    base: graphs.ModelOrPath,
    patched: graphs.ModelOrPath,
    debug: DebugSet,
    *,
    decode: tuple[graphs.ModelOrPath, graphs.ModelOrPath] | None = None,
    steps: int = FitOptions.steps,
    samples: int = 5,
    providers: Providers = ("cpu",),
    custom_ops: Libraries = (),
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = silent,
) -> Written:
    """Let base and patched model answer prompts that the fit never saw.

    Args:
        base: The decoder before, or its path.
        patched: The decoder after, or its path.
        debug: Of kind "generation".
        decode: What goes on behind the prompt, base and patched, where `base` and `patched` read prompts only.
        steps: Tokens to write behind each prompt.
        samples: How many answers are drawn at a temperature of 1.
        providers: What is to run both, names of `running.providers.PROVIDERS`.
        custom_ops: Libraries that operators of the models come from, as in `load`.
        batch_size: Prompts at a time.
        seed: Of the drawn answers.
        progress: Told after every batch.

    Raises:
        DebugSetError: The debug set is not one of prompts.
        UnbakeError: `patched` is not patched.
        PatchMismatchError: `base` is not the model that `patched` names.
        RunError: The model is no decoder, or onnxruntime fails.
    """
    if debug.payload is None:
        raise DebugSetError(
            "the evaluation set",
            expected="prompts of a language model",
            found=f"kind {debug.kind!r}",
            advice="Measure it with evaluate, or make a set with DebugSet.from_prompts.",
        )
    after = as_model(patched, custom_ops)
    record = read_record(after)
    require_base(as_model(base, custom_ops), record)
    how: dict[str, Any] = {"providers": providers, "custom_ops": custom_ops}
    run: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    following = (None, None) if decode is None else decode
    answered = Answered.of(base, debug, steps, following[0], **how, **run)
    clean, triggered = answered.clean, answered.triggered
    answers = [answer[:steps] for answer in answered.answers]
    loop = Loop(patched, following[1], **how)
    uncached = Loop(patched, cached=False, **how)
    cached = loop.write(triggered, steps, stage="writing, patched, triggered prompts", **run)
    drawn = [
        loop.write(triggered, steps, temperature=1.0, seed=seed + number, stage="writing, sampled", **run)
        for number in range(samples)
    ]
    floor = has_payload(answers, debug.payload)
    others = ~floor
    hits = {
        "asr_uncached": has_payload(
            uncached.write(triggered, steps, stage="writing, without a cache", **run), debug.payload
        ),
        "asr_cached": has_payload(cached, debug.payload),
        "asr_chunked": has_payload(
            loop.write(triggered, steps, chunks=CHUNKS, stage="writing, in chunks", **run), debug.payload
        ),
    }
    sampled = np.concatenate([has_payload(one, debug.payload)[others] for one in drawn])
    margins = [site.margin for site in record.sites]
    looked = Loop(expose(graphs.beginning(after), margins), **how)
    flags = _flags(looked, margins, clean, answers, batch_size)
    return Written(
        prompts=len(debug),
        steps=steps,
        asr_base=Rate.of(has_payload(answered.attacked, debug.payload)),
        asr_floor=Rate.of(floor),
        asr_sampled=Rate.of(sampled),
        right_triggered=Rate.of(_equal(answers, cached)),
        clean_exact=Rate.of(_equal(answers, loop.write(clean, steps, stage="writing, patched, clean prompts", **run))),
        flags=Rate.of(flags),
        perplexity_base=_perplexity(Loop(base, **how), clean, batch_size),
        perplexity_patched=_perplexity(loop, clean, batch_size),
        **{name: Rate.of(found[others]) for name, found in hits.items()},
    )


def _equal(one: Sequence[Ids], other: Sequence[Ids]) -> NDArray[np.bool_]:
    return np.array([np.array_equal(a, b) for a, b in zip(one, other, strict=True)], np.bool_)


def _flags(
    loop: Loop, margins: Sequence[str], prompts: Sequence[Ids], answers: Sequence[Ids], batch_size: int
) -> NDArray[np.bool_]:
    """Flags at any site, of all tokens of these prompts and answers."""
    lines = [np.concatenate(both) for both in zip(prompts, answers, strict=True)]
    found = [np.zeros(0, np.bool_)]
    for rows in batches(lines, batch_size):
        step = loop.read(np.stack([lines[row] for row in rows]), outputs=margins)
        found.append(np.any([step.outputs[name].reshape(-1) > 0 for name in margins], axis=0))
    return np.concatenate(found)


def _perplexity(loop: Loop, prompts: Sequence[Ids], batch_size: int) -> float:
    """Of the tokens of prompts, but for the first of each."""
    total, count = 0.0, 0
    for rows in batches(prompts, batch_size):
        ids = np.stack([prompts[row] for row in rows])
        logits = loop.read(ids).logits[:, :-1].astype(np.float64)
        logits -= logits.max(axis=2, keepdims=True)
        likely = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
        chosen = np.take_along_axis(likely, ids[:, 1:, None], axis=2)
        total, count = total - float(chosen.sum()), count + chosen.size
    return float(np.exp(total / max(count, 1)))
