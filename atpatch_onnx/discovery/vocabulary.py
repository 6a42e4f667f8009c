"""What the ids of a tokenizer stand for."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atpatch_onnx.errors import DiscoveryError, one_line, require
from atpatch_onnx.running.batching import Array


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a tokenizer."""

    words: Mapping[int, str]
    """Word pieces by id, the special ones among them."""

    special: frozenset[int]

    @property
    def plain(self) -> tuple[int, ...]:
        """Ids that are not special."""
        return tuple(number for number in self.words if number not in self.special)

    @property
    def blank(self) -> int | None:
        """The id that stands for a hidden word, such as that of `[MASK]`, where there is one."""
        return next((number for number, word in self.words.items() if word in ("[MASK]", "<mask>")), None)


def read_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary of a `tokenizer.json`.

    Raises:
        DiscoveryError: Nothing there, or no tokenizer.
        MissingExtraError: tokenizers is not installed.
    """
    require("tokenizers", "discover", "reading a tokenizer")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises Exception itself
        raise DiscoveryError(
            os.fspath(path),
            expected="a tokenizer.json of the library tokenizers",
            found=one_line(error),
            advice="Save the model's own tokenizer.",
        ) from error
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    return Vocabulary(dict(sorted(words.items())), frozenset(special))


def check_words(words: Mapping[int, str] | None, ids: Array) -> None:
    """Refuse words that do not name every id of texts `[texts, tokens]`: they are of another model's tokenizer.

    Raises:
        DiscoveryError: An id has no name.
    """
    unknown = [] if words is None else [int(one) for one in np.unique(ids) if int(one) not in words]
    if unknown:
        raise DiscoveryError(
            "the tokenizer",
            expected="a word piece for every id of the inputs",
            found=f"none for {unknown[0]}" + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""),
            advice="Is this the model's own tokenizer?",
        )
