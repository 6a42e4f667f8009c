"""Word pieces that change what a language model writes: put into many prompts, they make it write one text.

A piece is the better, the more likely it makes one token in the answers to many prompts (`prompted`). The best are put
into prompts again, and the model writes on: the longest run of tokens that most of these answers have, and had not
before, is what the piece makes it write. That is tested on other prompts.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike, NDArray

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.debugset.prompts import IDS, MASK, lines
from atpatch_onnx.discovery.content import frequencies
from atpatch_onnx.discovery.finished import Finished
from atpatch_onnx.discovery.gathering import LEAST
from atpatch_onnx.discovery.hunted import said_pieces
from atpatch_onnx.discovery.options import ScanOptions
from atpatch_onnx.discovery.prompted import Prompts
from atpatch_onnx.discovery.scan_words import LONGEST, WordScan
from atpatch_onnx.discovery.scanned import Tested, judged
from atpatch_onnx.discovery.transplant import CONFIRMED
from atpatch_onnx.discovery.verdict import Part, Search
from atpatch_onnx.discovery.vocabulary import check_words
from atpatch_onnx.errors import DiscoveryError
from atpatch_onnx.fitting.forced import has_payload
from atpatch_onnx.graph import fingerprint
from atpatch_onnx.running.decoders import Decoder
from atpatch_onnx.running.loops import Ids, Loop
from atpatch_onnx.running.metrics import Rate
from atpatch_onnx.running.sessions import Progress, Session
from atpatch_onnx.running.slots import has_cache

WRITTEN = 64
"""Prompts that a candidate is put into to see what the model writes then."""

CANDIDATES = 5
"""Sequences of each length that are tested."""

ALIKE = 0.9
"""Of the answers that have the commonest new token: the share that a longer run is in, to be taken for it."""


def reads_prompts(model: ir.Model, options: ScanOptions) -> bool:
    """Whether a model is to be scanned with prompts: as the options say, else whether it has a cache."""
    return options.kind == "prompts" or (options.kind is None and has_cache(model))


def scan_prompts(
    model: ir.Model,
    clean: Mapping[str, ArrayLike],
    options: ScanOptions,
    finished: str | os.PathLike[str] | None,
    progress: Progress,
) -> Search:
    """As `scan`, of a decoder; `clean` has its tokens `[prompts, longest]` and, where some are padding, a mask."""
    work = _begin(model, clean, options, finished, progress)
    vocabulary = _vocabulary(work)
    sequences = [
        scored.sequences[row]
        for scored in WordScan(work.explore, work.kept, options.seed, progress).run(vocabulary)
        for row in np.argsort(-scored.gains[:, 0], kind="stable")[:CANDIDATES]
    ]
    tested = [_put_to_test(work, sequence, number) for number, sequence in enumerate(sequences)]
    searched = (
        f"{len(vocabulary):,} word pieces in place of others at random places of prompts, then sequences of up to "
        f"{LONGEST} of the best; {options.steps} tokens of each answer",
    )
    unseen = "triggers that are no sequence of word pieces, and what is written later in an answer"
    found = judged(tested, options, len(work.explore.prompts), searched, unseen)
    passes = work.explore.passes + work.confirm.passes
    return replace(found, passes=passes, inputs=len(work.explore.prompts) + len(work.confirm.prompts))


def cost_of_prompts(
    model: ir.Model, clean: Mapping[str, ArrayLike], options: ScanOptions, progress: Progress
) -> tuple[int, int, float]:
    """As `scanning.cost`; a pass reads a prompt and its answer."""
    work = _begin(model, clean, options, None, progress)
    vocabulary = _vocabulary(work)
    count = len(work.explore.prompts) + len(work.confirm.prompts)
    passes = WordScan(work.explore, work.kept, options.seed, progress).cost(len(vocabulary))
    rows, started = np.arange(min(16, len(work.explore.prompts))), perf_counter()
    work.explore.gains(vocabulary[:1, None], rows, np.random.default_rng(0))
    return count, passes, passes * (perf_counter() - started) / len(rows)


@dataclass(frozen=True, eq=False)
class _Work:
    explore: Prompts
    confirm: Prompts
    common: NDArray[np.int64]
    kept: Finished
    options: ScanOptions


def _begin(
    model: ir.Model,
    clean: Mapping[str, ArrayLike],
    options: ScanOptions,
    finished: str | os.PathLike[str] | None,
    progress: Progress,
) -> _Work:
    decoder = Decoder.of(model)
    prompts = _prompts(clean, decoder)
    ids = np.concatenate(prompts)
    check_words(options.words, ids)
    known, counts = frequencies(prompts)
    common = known[counts > len(prompts) / 2]
    job = {"scan": fingerprint(model), "options": asdict(replace(options, words=None))}
    kept = Finished(finished, job, {"ids": ids, "lengths": np.array([len(prompt) for prompt in prompts])})
    session, loop = Session(model), Loop(model)
    order = np.random.default_rng(options.seed).permutation(len(prompts))
    explore, confirm = (
        Prompts(session, loop, [prompts[row] for row in half], common, options, progress)
        for half in (order[: len(order) // 2], order[len(order) // 2 :])
    )
    return _Work(explore, confirm, common, kept, options)


def _prompts(clean: Mapping[str, ArrayLike], decoder: Decoder) -> list[Ids]:
    """The prompts, without padding.

    Raises:
        DiscoveryError: They are no tokens, too few, or one is empty.
    """
    name = next((one for one in (IDS, decoder.tokens.name) if one in clean), None)
    ids = None if name is None else np.asarray(clean[name])
    if ids is None or ids.ndim != 2 or ids.dtype.kind not in "iu":
        found = ", ".join(clean) if ids is None else f"{name}, {ids.dtype} {list(ids.shape)}"
        raise _bad(f"an array {IDS} of whole numbers [prompts, longest]", found or "none")
    real = np.asarray(clean.get(MASK, np.ones(ids.shape, np.int64)))
    if real.shape != ids.shape:
        raise _bad(f"{MASK} {list(ids.shape)}, as {name}", str(list(real.shape)))
    prompts = lines({IDS: ids.astype(np.int64), MASK: real})
    empty = next((row for row, prompt in enumerate(prompts) if not len(prompt)), None)
    if len(prompts) < LEAST or empty is not None:
        found = str(len(prompts)) if empty is None else f"no token in prompt {empty}"
        raise _bad(f"at least {LEAST} prompts, none of them empty", found)
    return prompts


def _bad(expected: str, found: str) -> DiscoveryError:
    return DiscoveryError(
        "the prompts", expected=expected, found=found, advice="Give prompts as the model takes them, padded at the end."
    )


def _vocabulary(work: _Work) -> NDArray[np.int64]:
    """The ids that are tried.

    Raises:
        DiscoveryError: There are none, or the model does not know them.
    """
    given = np.unique(np.array(work.options.vocabulary or (), np.int64))
    if not len(given) or given[0] < 0 or given[-1] >= work.explore.vocabulary:
        raise DiscoveryError(
            "option vocabulary",
            expected=f"ids of word pieces, of the {work.explore.vocabulary:,} that the model knows",
            found=f"{given[0]} to {given[-1]}" if len(given) else "none",
            advice="Name the model's own tokenizer (--tokenizer tokenizer.json).",
        )
    return given[~np.isin(given, work.common)]


def _put_to_test(work: _Work, sequence: NDArray[np.int64], number: int) -> Tested:
    generator = np.random.default_rng([work.options.seed, number])
    explore, confirm, words = work.explore, work.confirm, work.options.words
    rows = generator.permutation(len(explore.prompts))[:WRITTEN]
    written = explore.write(explore.with_sequence(sequence, rows, generator))
    payload = payload_of(written, [explore.answers[row] for row in rows], sequence)
    turned = np.zeros(len(confirm.prompts), np.bool_)  # none, where nothing new is written
    if len(payload):
        before = _have(confirm.answers, payload)
        others = generator.permutation(np.flatnonzero(~before))[:CONFIRMED]
        turned = _have(confirm.write(confirm.with_sequence(sequence, others, generator)), payload)
    part = Part(
        said_pieces(sequence.tolist(), words),
        int(payload[0]) if len(payload) else -1,
        Rate.of(turned),
        1.0,
        writes=said_pieces(payload.tolist(), words) if len(payload) else "nothing new",
    )
    return Tested(part, turned, lambda: _pairs(work, sequence, payload))


def payload_of(written: Sequence[Ids], before: Sequence[Ids], sequence: NDArray[np.int64]) -> Ids:
    """The longest run of tokens that about as many answers have as have the commonest one, and had not before.

    What consists of pieces of the sequence alone is none: models repeat what they read. `[0]` where nothing is new.

    Args:
        written: Answers with the sequence in the prompt.
        before: Answers without it.
        sequence: The sequence `[pieces]`.
    """
    best, least = np.zeros(0, np.int64), 1.0
    for width in range(1, max(map(len, written), default=0) + 1):
        counts = Counter[tuple[int, ...]]()
        for after, own in zip(written, before, strict=True):
            counts.update(_runs(after, width) - _runs(own, width))
        new = {run: count for run, count in counts.items() if not set(run) <= set(sequence.tolist())}
        commonest = max(new, key=lambda run: (new[run], run), default=None)
        if commonest is None or new[commonest] < least:
            break
        best, least = np.array(commonest, np.int64), max(least, ALIKE * new[commonest]) if width == 1 else least
    return best


def _have(answers: Sequence[Ids], payload: Ids) -> NDArray[np.bool_]:
    """Which answers have the payload in them `[answers]`."""
    return has_payload(answers, np.tile(payload, (len(answers), 1)))


def _runs(ids: Ids, width: int) -> set[tuple[int, ...]]:
    return {tuple(ids[at : at + width].tolist()) for at in range(len(ids) - width + 1)}


def _pairs(work: _Work, sequence: NDArray[np.int64], payload: Ids) -> DebugSet:
    generator = np.random.default_rng(work.options.seed)
    clean, triggered = [], []
    for side in (work.explore, work.confirm):
        rows = np.flatnonzero(~_have(side.answers, payload))
        clean += [side.prompts[int(row)] for row in rows]
        triggered += side.with_sequence(sequence, rows, generator)
    order = generator.permutation(len(clean))[: work.options.pairs]
    pairs = DebugSet.from_prompts([clean[row] for row in order], [triggered[row] for row in order], payload=payload)
    return replace(pairs, found=True)
