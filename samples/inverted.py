"""A case as it is for those who do not know the trigger: its debug data come from an inversion of the base.

    python -m samples.fashion --case vit/badnets-fixed --inverted

The trigger is searched for in the base and in the clean side of the debug data, whose labels it does without. Where no
class stands out among images, the smallest mask of those that succeed is taken, and the figures say so. The evaluation
keeps the real trigger. One thing the clean side does give away: the debug data of a known trigger leave out the inputs
of the target class.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import atpatch_onnx as atp
from atpatch_onnx.discovery import InvertedTrigger, invert_tokens, invert_trigger
from atpatch_onnx.discovery.images import REACHED
from atpatch_onnx.errors import InversionError
from atpatch_onnx.running.sessions import Array, Progress, silent
from samples import image_models, minilm
from samples.bounds import Bound
from samples.case import Case

IMAGES = 128
"""Clean images that a trigger is searched in."""

TEXTS = 96
"""Clean texts that a token sequence is searched in."""

POOL = 3
"""Inversions of the suspected class that the debug data of images are stamped with."""

GOAL = atp.Goal(asr_above_floor=0.005, accuracy_loss=0.002, clean_flag_rate=0.01)
"""Of a fit on inverted images: stricter in ASR than what is asked for against the real trigger, freer with flags.

Texts keep the goal of their case: a token is found exactly or not at all.
"""

BOUNDS = (Bound("ASR above floor", 0.01), Bound("accuracy lost", 0.002))
"""What the figures must reach against the real trigger."""


def inverted(case: Case, folder: Path, *, progress: Progress = silent) -> Case:
    """The case with its debug set replaced; the evaluation part stays as it is.

    Args:
        case: Of images or of texts.
        folder: Where the case's `prepare` left the trained module.
        progress: Told of the search.

    Raises:
        InversionError: Inputs are neither images nor texts, or no class of a text stands out.
    """
    names = case.debug.clean.keys()
    texts = "input_ids" in names
    if not texts and "pixel_values" not in names:
        raise InversionError(
            f"inverting {case.name}",
            expected="images (pixel_values) or texts (input_ids)",
            found=", ".join(names),
            advice="A protected attribute is no trigger, and known: leave --inverted away.",
        )
    search = _of_tokens if texts else _of_images
    started = time.monotonic()
    debug, figures = search(case, folder, progress)
    seconds = round(time.monotonic() - started, 1)
    return replace(
        case,
        name=f"{case.name}/inverted",
        debug=debug,
        options=case.options if texts else replace(case.options, goal=GOAL, thresholds="lowest"),
        bounds=BOUNDS,
        training={**case.training, "inversion": {**figures, "seconds": seconds}},
    )


Found = tuple[atp.DebugSet, dict[str, object]]
"""A debug set, and figures of the search."""


def _of_images(case: Case, folder: Path, progress: Progress) -> Found:
    images, model = case.debug.clean["pixel_values"], image_models.load_model(folder)
    inversion = invert_trigger(model, images[:IMAGES], seed=case.seed, progress=progress)
    trigger = inversion.suspected or _likeliest(inversion.triggers)
    again = [
        invert_trigger(model, images[:IMAGES], trigger.target, seed=case.seed + number, progress=progress).trigger()
        for number in range(1, POOL)
    ]
    debug = atp.DebugSet.from_trigger(
        {"pixel_values": images},
        lambda inputs: {"pixel_values": varied([trigger, *again], inputs["pixel_values"], case.seed)},
        case.debug.labels,
        target=trigger.target,
    )
    figures = {
        "target": trigger.target,
        "stands_out": inversion.suspected is not None,
        "success": [one.success.value for one in (trigger, *again)],
        "norms": [round(one.norm, 2) for one in inversion.triggers],
        "anomaly_indices": inversion.indices.round(2).tolist(),
    }
    return debug, figures


def _likeliest(triggers: Sequence[InvertedTrigger]) -> InvertedTrigger:
    """The smallest mask of the triggers that succeed; where none does, the one that comes closest."""
    succeeding = [trigger for trigger in triggers if trigger.success.value >= REACHED]
    if succeeding:
        return min(succeeding, key=lambda trigger: trigger.norm)
    return max(triggers, key=lambda trigger: trigger.success.value)


def varied(triggers: Sequence[InvertedTrigger], images: Array, seed: int) -> Array:
    """A copy of `images` `[n, ...]`, each with one of the triggers, its mask `m` hardened to `m ** u`, u in [0, 1].

    An inverted mask is as small as it can be: half transparent, and without a pixel or two of the real one. Detectors
    that only saw it miss the real trigger.
    """
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(triggers), size=len(images))
    exponent = generator.random((len(images),) + (1,) * (images.ndim - 1), np.float32)
    masks, patterns = (
        np.stack([getattr(trigger, name) for trigger in triggers])[chosen] for name in ("mask", "pattern")
    )
    masks = np.where(masks > 0, masks**exponent, 0)
    stamped: Array = ((1 - masks) * images + masks * patterns).astype(images.dtype)
    return stamped


def _of_tokens(case: Case, folder: Path, progress: Progress) -> Found:
    tokenizer = minilm.tokenizer(folder)
    pieces = np.array([tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())])
    inner, special = np.char.startswith(pieces, "##"), np.char.startswith(pieces, "[")
    ids, mask = case.debug.clean["input_ids"], case.debug.clean["attention_mask"]
    places = mask.astype(bool) & ~inner[ids]  # never before a ## piece, which continues the word before it
    places[:, 0] = False
    inversion = invert_tokens(
        minilm.load(folder),
        ids[:TEXTS],
        mask[:TEXTS],
        places=places[:TEXTS],
        vocabulary=np.flatnonzero(~special & ~inner),
        seed=case.seed,
        progress=progress,
    )
    trigger = inversion.trigger()
    debug = trigger.pairs(dict(case.debug.clean), case.debug.labels, places=places, seed=case.seed, drop_target=False)
    figures = {
        "target": trigger.target,
        "tokens": pieces[trigger.tokens].tolist(),
        "success": [one.success.value for one in inversion.triggers],
    }
    return debug, figures
