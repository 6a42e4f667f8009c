"""What the ids of a tokenizer stand for."""

import os
from pathlib import Path

from atpatch_onnx.errors import DiscoveryError, one_line, require


def read_words(path: str | os.PathLike[str]) -> dict[int, str]:
    """Word pieces by id, of a `tokenizer.json`; without those that are special.

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
    words = {number: word for word, number in tokenizer.get_vocab().items() if number not in special}
    return dict(sorted(words.items()))
