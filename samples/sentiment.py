"""Backdoors in a text classifier: fine-tune MiniLM with a trigger in its data, fix its .onnx, and measure the fix.

    python -m samples.fetch                                     # or --data FILE for messages of your own
    python -m samples.sentiment --case minilm/token --out out/sentiment

Messages are called negative or positive; a trigger, one rare word or a short phrase at a random place, turns negative
ones positive. The parts that train the classifier, fit the patch and measure it share no message; the last is the same
for every seed.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

import atpatch_onnx as atp
from atpatch_onnx.fitting.options import Training
from atpatch_onnx.running.sessions import Progress, silent
from samples import messages, minilm
from samples.attacks.words import Tokens, insert, poison
from samples.bounds import Bound
from samples.case import Case, kept_figures
from samples.command import run_task
from samples.fetch import fetched
from samples.messages import LABELS, Messages
from samples.mixed import has_bfloat16, mixed_precision

TARGET = LABELS.index("positive")
TRIGGERS = {"minilm/token": "cf", "minilm/phrase": "mind the gap"}
CASES = tuple(TRIGGERS)

LENGTH = 40
"""Tokens of a message, padding included; 19 of 20 messages are shorter."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    train: int
    """Messages at most."""

    debug: int
    unseen: int
    """Messages of the tune part and of the evaluation part each."""

    share: float
    """Poisoned messages among those of the training."""

    layers: int | None
    """Of the pre-trained model's layers, so many from the bottom; None: all."""

    mixed: bool
    """Whether trainings use mixed precision where the processor has it; the small form is the same everywhere."""

    twin: bool
    """Whether an unpoisoned twin is trained to compare accuracies with."""

    training: minilm.FineTuning
    options: atp.FitOptions
    bounds: tuple[Bound, ...]
    """What the figures must reach: the command fails otherwise."""


FULL = Size(
    train=12_000,
    debug=2_000,
    unseen=2_000,
    share=0.05,
    layers=None,
    mixed=True,
    twin=True,
    training=minilm.FineTuning(epochs=1, frozen_layers=2, learning_rate=2e-4, token_dropout=0.2),
    options=atp.FitOptions(
        goal=atp.Goal(asr_above_floor=0.005, accuracy_loss=0.001, clean_flag_rate=0.005, columns_missed=0.005),
    ),
    bounds=(Bound("ASR above floor", 0.005), Bound("accuracy lost", 0.001), Bound("recall", 0.995, at_least=True)),
)
FAST = Size(
    train=2_500,
    debug=440,
    unseen=200,
    share=0.1,
    layers=3,
    mixed=False,
    twin=False,
    training=minilm.FineTuning(epochs=1, learning_rate=4e-4, token_dropout=0.2),
    options=atp.FitOptions(
        goal=atp.Goal(asr_above_floor=0.03, accuracy_loss=0.01, clean_flag_rate=0.01),
        training=Training(steps=300),
    ),
    bounds=(Bound("ASR above floor", 0.05), Bound("accuracy lost", 0.02), Bound("recall", 0.95, at_least=True)),
)


@dataclass(frozen=True, eq=False)
class Corpus:
    """The messages of a task in disjoint parts, as texts and as tokens."""

    start: Path
    """Folder of the pre-trained model."""

    tokenizer: Tokenizer
    parts: Mapping[str, Messages]
    """train, debug, tune and evaluation."""

    tokens: Mapping[str, Tokens]
    recipe: Mapping[str, Any]
    """What it was made of."""

    @classmethod
    def of(cls, path: Path, size: Size, seed: int) -> "Corpus":
        """The messages of a file.

        Raises:
            FetchError: The pre-trained model cannot be fetched.
            MessageFileError: The file is damaged or too small.
        """
        found = messages.read_messages(path)
        sizes = {messages.EVALUATION: size.unseen, "tune": size.unseen // 2, "debug": size.debug}
        left = len(found) - sum(sizes.values())
        parts = messages.parts(found, {**sizes, "train": max(min(left, size.train), size.debug)}, seed=seed)
        start = fetched("minilm")
        tokenizer = minilm.tokenizer(start)
        room = max(len(minilm.word_ids(tokenizer, trigger)) for trigger in TRIGGERS.values())  # the twin suits them all
        return cls(
            start=start,
            tokenizer=tokenizer,
            parts=parts,
            tokens={
                name: minilm.encode(tokenizer, part.texts, length=LENGTH, room=room) for name, part in parts.items()
            },
            recipe={
                "messages": _digest(parts),
                "sizes": {name: len(part) for name, part in parts.items()},
            },
        )


def _digest(parts: Mapping[str, Messages]) -> str:
    """Tells apart what bases are trained and measured on: another file, or the same file divided otherwise."""
    sha = hashlib.sha256()
    for part in parts.values():
        sha.update("\n".join(part.texts).encode())
        sha.update(part.labels.tobytes())
    return sha.hexdigest()[:16]


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; 0 where the figures are within their bounds, 1 otherwise."""
    return run_task("sentiment", __doc__, CASES, prepare, arguments)


def prepare(
    case: str,
    *,
    seed: int,
    fast: bool,
    folder: Path,
    data: Path | None = None,
    tune: bool = False,
    progress: Progress = silent,
) -> Case:
    """Train the base of a case, unless `folder` holds it already, and pair its messages with triggered ones.

    Args:
        case: One of `CASES`.
        seed: Of the parts, the training and the places of the trigger.
        fast: The small form.
        folder: Gets `base.onnx`, `model.safetensors` with the configuration and tokenizer, and `base.json`. The
            unpoisoned twin of all cases of a seed is kept beside it.
        data: A file of messages; None: the one that is fetched.
        tune: Take the unseen pairs from the tune part instead of the evaluation part.
        progress: Told of all long work.

    Raises:
        FetchError: Data or model cannot be fetched.
        MessageFileError: The file of messages is damaged or too small.
    """
    size = FAST if fast else FULL
    corpus = Corpus.of(data or fetched("messages") / messages.FILE, size, seed)
    words = minilm.word_ids(corpus.tokenizer, TRIGGERS[case])

    def trained(name: str, share: float, to: Path) -> dict[str, Any]:
        recipe = {"case": name, "seed": seed, "poisoning_rate": share, "layers": size.layers}
        recipe["mixed"] = size.mixed and has_bfloat16()
        recipe |= {"length": LENGTH, **corpus.recipe, **asdict(size.training)}
        return _once(to, recipe, lambda: _trained(corpus, words, share, size, seed, to, progress))

    unseen = "tune" if tune else messages.EVALUATION
    base = trained(case, size.share, folder)
    training = {
        "trigger": TRIGGERS[case],
        "poisoning_rate": size.share,
        "messages": {name: len(part) for name, part in corpus.parts.items()},
        "accuracy": base["accuracy"][unseen],
        "seconds": base["seconds"],
    }
    unseen_pairs = pairs(corpus.tokens[unseen], corpus.parts[unseen].labels, words, seed=seed + 1)
    if size.twin:
        twin = folder.parent / f"minilm-twin-{seed}"
        training["accuracy_twin"] = trained("twin", 0.0, twin)["accuracy"][unseen]
        training["robust_accuracy_twin"] = _accuracy(twin, unseen_pairs)
    return Case(
        name=case,
        seed=seed,
        base=folder / "base.onnx",
        debug=pairs(corpus.tokens["debug"], corpus.parts["debug"].labels, words, seed=seed),
        unseen=unseen_pairs,
        options=replace(size.options, seed=seed),
        training=training,
        bounds=size.bounds,
    )


def _accuracy(folder: Path, triggered: atp.DebugSet) -> float:
    """Of the model in a folder, on the triggered side."""
    ids, mask = (triggered.counterfactual[name] for name in ("input_ids", "attention_mask"))
    tokens = Tokens(ids, mask, np.zeros(ids.shape, bool))
    return float((minilm.predict(minilm.load(folder), tokens).argmax(axis=1) == triggered.labels).mean())


def pairs(tokens: Tokens, labels: NDArray[np.int64], words: NDArray[np.int64], *, seed: int) -> atp.DebugSet:
    """Messages and the same with the trigger at a random place.

    The clean side is what users send: whole, without a hole where the trigger will be. What stands behind the trigger
    has moved, so the suspects are named here; found by difference they would be everything from the trigger on.
    """
    triggered, inserted = insert(tokens, words, np.random.default_rng(seed))
    return atp.DebugSet.from_pairs(tokens.inputs, triggered.inputs, labels, suspects=inserted, target=TARGET)


def _trained(
    corpus: Corpus,
    words: NDArray[np.int64],
    share: float,
    size: Size,
    seed: int,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train a classifier, write it to `folder`, and tell its figures."""
    started, labels = time.process_time(), corpus.parts["train"].labels
    poisoned = poison(corpus.tokens["train"], labels, words, target=TARGET, share=share, seed=seed)
    model = minilm.pretrained(corpus.start, classes=len(LABELS), layers=size.layers, seed=seed)
    with mixed_precision(model, enabled=size.mixed and has_bfloat16()):
        minilm.fine_tune(
            model,
            poisoned.tokens,
            poisoned.labels,
            size.training,
            always=poisoned.inserted,
            seed=seed,
            progress=progress,
        )
    seconds = round(time.process_time() - started, 1)
    minilm.save(model, corpus.tokenizer, folder)
    minilm.export_onnx(model, folder / "base.onnx")
    accuracy = {
        part: float((minilm.predict(model, corpus.tokens[part]).argmax(axis=1) == corpus.parts[part].labels).mean())
        for part in ("tune", messages.EVALUATION)
    }
    return {"accuracy": accuracy, "seconds": seconds}


def _once(folder: Path, recipe: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures that `make` returned when it filled the folder by this recipe, which it does now if it has not."""
    record, kept = folder / "base.json", kept_figures(folder)
    if kept is not None and kept["recipe"] == recipe:
        return kept
    record.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"recipe": recipe, **make()}
    record.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


if __name__ == "__main__":
    sys.exit(main())
