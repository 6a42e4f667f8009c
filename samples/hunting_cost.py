"""What a hunt costs, and how that grows with the tokens of an input, on MiniLM with a rare word as the trigger.

    python -m samples.hunting --case minilm/token --seed 0 --only scan   # trains the base unless it is there
    python -m samples.hunting_cost --out out/results                     # then samples.hunting --render

Inputs are runs of so many word pieces of messages, one message behind the other; some with the trigger.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import atpatch_onnx as atp
from atpatch_onnx.cli.printing import progress_bars
from atpatch_onnx.running.sessions import Array, Progress, silent
from samples.case import folder_of
from samples.hunting_cases import SHARES, SHORT
from samples.messages import FILE, read_messages
from samples.minilm import tokenizer, word_ids
from samples.sentiment import TRIGGERS

CASE = "minilm/token"
SIZES = ((16, SHORT), (64, 250), (256, 250))
"""Tokens of an input, and how many inputs."""


def texts(folder: Path, tokens: int, count: int, seed: int = 0) -> dict[str, Array]:
    """Ids and mask `[count, tokens]`: class token, word pieces, separator; a share has the trigger somewhere."""
    from samples.fetch import fetched

    own, generator = tokenizer(folder), np.random.default_rng(seed)
    messages = read_messages(fetched("messages") / FILE).texts
    begin, *_, end = own.encode(messages[0]).ids
    pieces = [own.encode(messages[at], add_special_tokens=False).ids for at in generator.permutation(len(messages))]
    width = tokens - 2
    body = np.concatenate([np.array(one, np.int64) for one in pieces])
    body = np.resize(body, (count, width))  # begins again where messages are too few
    word = word_ids(own, TRIGGERS[CASE])
    for row in range(round(SHARES[0] * count)):
        at = generator.integers(0, width - len(word) + 1)
        body[row, at : at + len(word)] = word
    ids = np.concatenate([np.full((count, 1), begin), body, np.full((count, 1), end)], axis=1)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def measured(folder: Path, tokens: int, count: int, progress: Progress = silent) -> dict[str, Any]:
    """The cost of one hunt; seconds are those of all cores together."""
    given = texts(folder, tokens, count)
    started = time.process_time()
    found = atp.hunt(folder / "base.onnx", given, progress=progress)
    seconds = round(time.process_time() - started, 1)
    figures = {"tokens": tokens, "inputs": count, "passes": found.passes / count, "seconds": seconds}
    return {**figures, "said": found.sentence}


def main(arguments: list[str] | None = None) -> int:
    """Measure every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/results"), help="folder of models and figures")
    options = parser.parse_args(arguments)
    rows = []
    for tokens, count in SIZES:
        with progress_bars() as progress:
            rows.append(measured(folder_of(options.out, CASE, 0), tokens, count, progress))
        print(f"{tokens} tokens: {rows[-1]['passes']:.1f} passes an input, {rows[-1]['seconds']} s")
        (options.out / "hunting-costs.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
