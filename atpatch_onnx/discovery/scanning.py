"""Scan a model with clean inputs only: what small part, put into them, turns them all.

Texts: every word piece of a vocabulary, then pairs and triples of the best (`scan_words`). Images: a dictionary of
patches at every place, then an evolutionary search (`scan_patches`). Prompts: every word piece, for what a language
model is made to write (`scan_prompts`). Tables: every column exchanged, which is an audit
of what the model leans on (`scan_columns`). What was found on one half of the inputs is tested on the other.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from time import perf_counter

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike, NDArray

from atpatch_onnx.discovery.content import read_content
from atpatch_onnx.discovery.finished import Finished
from atpatch_onnx.discovery.gathering import begin, check_classes
from atpatch_onnx.discovery.hunted import said_pieces
from atpatch_onnx.discovery.options import ScanOptions
from atpatch_onnx.discovery.scan_columns import VALUES, ColumnScan
from atpatch_onnx.discovery.scan_patches import Patch, PatchScan
from atpatch_onnx.discovery.scan_prompts import cost_of_prompts, reads_prompts, scan_prompts
from atpatch_onnx.discovery.scan_words import LONGEST, Classified, WordScan, put_in, trimmed
from atpatch_onnx.discovery.scanned import Candidate, Scan, concluded
from atpatch_onnx.discovery.transplant import CONFIRMED
from atpatch_onnx.discovery.trials import Trials
from atpatch_onnx.discovery.verdict import Search, Verdict
from atpatch_onnx.discovery.vocabulary import check_words
from atpatch_onnx.errors import DiscoveryError, RunError, require
from atpatch_onnx.fitting.collect import input_specs
from atpatch_onnx.graph import ModelOrPath, fingerprint
from atpatch_onnx.running.executors import LOCAL, Executor, executing
from atpatch_onnx.running.opening import as_model
from atpatch_onnx.running.sessions import Progress, silent
from atpatch_onnx.running.shards import SpreadSession


def scan(
    model: ModelOrPath,
    clean: Mapping[str, ArrayLike],
    options: ScanOptions | None = None,
    *,
    candidates: Sequence[Candidate] = (),
    finished: str | os.PathLike[str] | None = None,
    executor: Executor | str = LOCAL,
    progress: Progress = silent,
) -> Search:
    """Search a trigger with clean inputs only, or audit a table. Same arguments, same result.

    Args:
        model: The model, or its path.
        clean: Arrays `[inputs, ...]` by the model's input names; two hundred or more of various classes. Of a language
            model with a cache its tokens, `input_ids [prompts, longest]`, and where some are padding `attention_mask`.
        options: How.
        candidates: Parts from elsewhere, such as a gradient search in the torch model, that are tested as well.
        finished: A folder for finished pieces; a scan that was stopped goes on where it was.
        executor: Who runs the model, but for prompts, which are written token by token here: `local`, `ray`,
            `ray://HOST:PORT`, or an executor (see `running.executors`).
        progress: Told of long work.

    Raises:
        DiscoveryError: Too few inputs, all of one class, no vocabulary for texts, ids that the model does not know, no
            such column, or a folder of other pieces.
        DebugSetError: The inputs do not fit the model.
        NoSiteError: The model has no attention site that can be asked.
        MissingExtraError: scipy, or for images cma, is not installed.
    """
    require("scipy", "discover", "scanning a model")
    model, options = as_model(model), options or ScanOptions()
    if reads_prompts(model, options):
        return scan_prompts(model, clean, options, finished, progress)
    with executing(executor) as runs:
        work = _begin(model, clean, options, finished, progress, runs)
        if work.content.kind == "tables":
            return _tables(work)
        return (_texts if work.content.kind == "texts" else _images)(work, candidates)


def cost(
    model: ModelOrPath, clean: Mapping[str, ArrayLike], options: ScanOptions | None = None
) -> tuple[int, int, float]:
    """What a scan costs at most: inputs, forward passes, and seconds that so many would take, of a few timed now.

    Raises:
        DiscoveryError: As in `scan`.
    """
    model, options = as_model(model), options or ScanOptions()
    if reads_prompts(model, options):
        return cost_of_prompts(model, clean, options, silent)
    work = _begin(model, clean, options, None, silent)
    started = perf_counter()
    work.explore.predict({name: array[:CONFIRMED] for name, array in work.explore.inputs.items()})
    count = len(work.inputs[work.content.name])
    seconds = (perf_counter() - started) / min(CONFIRMED, len(work.explore.predicted))
    if work.content.kind == "tables":
        passes = count * VALUES * work.inputs[work.content.name].shape[1]
    elif work.content.kind == "texts":
        passes = _words(work).cost(len(_vocabulary(work)))
    else:
        patches = _patches(work)
        passes = sum(patches.cost(len(patches.patches()))[: 2 if work.options.evolve else 1])
    return count, passes, passes * seconds


def _begin(
    model: ir.Model,
    clean: Mapping[str, ArrayLike],
    options: ScanOptions,
    finished: str | os.PathLike[str] | None,
    progress: Progress,
    executor: Executor = LOCAL,
) -> Scan:
    assert options.kind != "prompts", "they are scanned in another way"
    inputs, sites, output = begin(model, clean, options.output)
    content = read_content(model, sites[0], inputs, kind=options.kind, seed=options.seed, progress=progress)
    kept = Finished(finished, {"scan": fingerprint(model), "options": asdict(replace(options, words=None))}, inputs)
    if content.kind == "texts":
        check_words(options.words, inputs[content.name])
        inputs = trimmed(inputs, content, isinstance(input_specs(model)[content.name].shape[1], int))
        content = replace(content, cells=content.cells[: inputs[content.name].shape[1]])
    session = SpreadSession(model, executor=executor)
    order = np.random.default_rng(options.seed).permutation(len(inputs[content.name]))
    halves = (order, order) if content.kind == "tables" else (order[: len(order) // 2], order[len(order) // 2 :])
    explore, confirm = (
        Trials(session, output, {name: array[half] for name, array in inputs.items()}, batch_size=options.batch_size)
        for half in halves
    )
    check_classes(explore.predicted)
    return Scan(model, inputs, content, explore, confirm, kept, options, progress)


def _vocabulary(work: Scan) -> NDArray[np.int64]:
    """The ids that are tried, of those that the model knows.

    Raises:
        DiscoveryError: There are none, or the model does not know them.
    """
    given = work.options.vocabulary
    if not given or min(given) < 0:
        raise DiscoveryError(
            "option vocabulary",
            expected="the ids of the word pieces that the model reads, for texts",
            found="none" if not given else str(min(given)),
            advice="Name the model's tokenizer (--tokenizer tokenizer.json).",
        )
    ids = np.unique(np.array(given, np.int64))
    largest = int(ids.max())
    row = {name: array[:1].copy() for name, array in work.explore.inputs.items()}
    row[work.content.name][:, -1] = largest
    try:
        work.explore.predict(row)
    except RunError as error:  # of an index beyond the embedding
        raise DiscoveryError(
            "option vocabulary",
            expected="ids that the model's embedding has",
            found=f"{largest}, on which it fails",
            advice="Is this the model's own tokenizer?",
        ) from error
    return ids[~np.isin(ids, list(work.content.common))]


def _words(work: Scan) -> WordScan:
    fixed = isinstance(input_specs(work.model)[work.content.name].shape[1], int)
    return WordScan(Classified(work.explore, work.content, fixed), work.kept, work.options.seed, work.progress)


def _texts(work: Scan, given: Sequence[Candidate]) -> Search:
    vocabulary, words, candidates = _vocabulary(work), _words(work), list(given)

    def candidate(sequence: NDArray[np.int64], target: int) -> Candidate:
        return Candidate(
            said_pieces(sequence.tolist(), work.options.words),
            target,
            lambda inputs, generator: put_in(
                work.content, inputs, np.tile(sequence, (len(inputs[work.content.name]), 1)), generator
            ),
        )

    for scored in words.run(vocabulary):
        for target in np.unique(work.explore.predicted):
            candidates.append(candidate(scored.sequences[int(scored.gains[:, target].argmax())], int(target)))
    searched = (
        f"{len(vocabulary):,} word pieces in place of others at random places of texts, then sequences of up to "
        f"{LONGEST} of the best",
    )
    return concluded(work, candidates, searched, "triggers that are no sequence of word pieces, such as a style")


def _patches(work: Scan) -> PatchScan:
    shape = work.inputs[work.content.name].shape
    if len(shape) != 4:
        raise DiscoveryError(
            "the inputs",
            expected="images [inputs, channels, height, width], texts or tables",
            found=f"{work.content.name} {list(shape)}",
            advice="Hunt in traffic instead (atpatch hunt), which asks for no kind.",
        )
    return PatchScan(work.explore, work.content, work.kept, work.options.seed, work.progress)


def _images(work: Scan, given: Sequence[Candidate]) -> Search:
    patches, candidates, name = _patches(work), list(given), work.content.name
    if work.options.evolve:
        require("cma", "discover", "an evolutionary search in patches")
    every = patches.patches()
    left, gains = patches.run(every)

    def candidate(patch: Patch, target: int) -> Candidate:
        return Candidate(
            patch.in_words(), target, lambda inputs, generator: {**inputs, name: patch.stamp(inputs[name])}, patch.boxes
        )

    for target in np.unique(work.explore.predicted):
        candidates.append(candidate(left[int(gains[:, target].argmax())], int(target)))
    searched = [f"a dictionary of {len(every):,} patches: squares, checks, lines and single pixels at every place"]
    result = concluded(work, candidates, searched, _UNSEEN)
    if result.alarmed or not work.options.evolve:
        return result
    candidates += [candidate(patch, label) for label, patch in patches.evolve(left, gains)]
    searched.append("for every class, an evolutionary search in patterns of 5 x 5 pixels and their places (CMA-ES)")
    return concluded(work, candidates, searched, _UNSEEN)


_UNSEEN = "patches of other forms or of parts far apart; triggers that lie over a whole image, such as blends and warps"


def _tables(work: Scan) -> Search:
    options, table = work.options, work.inputs[work.content.name]
    names = options.columns or tuple(str(index) for index in range(table.shape[1]))
    unknown = [name for name in options.protected if name not in names]
    if len(names) != table.shape[1] or unknown:
        raise DiscoveryError(
            "option protected" if unknown else "option columns",
            expected=f"names of columns, among {', '.join(names)}" if unknown else f"{table.shape[1]} names",
            found=unknown[0] if unknown else str(len(names)),
            advice="Name columns in the order of the model's input.",
        )
    columns = ColumnScan(work.explore, work.content, work.kept, options.seed, work.progress)
    found = columns.run(names, [names.index(name) for name in options.protected])
    leaning = [one for one in found if one.protected and one.flips.low > options.flip_rate]
    said = ", ".join(f"{one.name} flips {one.flips.value:.1%} of rows" for one in leaning)
    if leaning:
        verdict, sentence = Verdict.SUSPICIOUS, f"Suspicious: predictions lean on protected columns: {said}."
    elif options.protected:
        bound = f"{options.flip_rate:.1%}"
        verdict, sentence = (
            Verdict.CLEAN,
            f"Clean as far as this search sees: no protected column is shown to flip more than {bound} of rows.",
        )
    else:
        top = ", ".join(f"{one.name} {one.flips.value:.1%}" for one in found[:3])
        verdict, sentence = Verdict.AUDITED, f"Audited, nothing judged: rows flip most with {top}."
    wanted = next((one for one in leaning if one.parity is not None), None)
    return Search(
        verdict,
        sentence,
        (f"{len(table):,} rows; every column exchanged for up to {VALUES} values that the table has in it",),
        columns=tuple(found),
        pairs=None if wanted is None else columns.pairs(wanted.index, options.pairs),
        passes=work.explore.passes,
        inputs=len(table),
    )
