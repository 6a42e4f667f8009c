"""Operators of other libraries that make tokens of text: what is known of the shapes of their results."""

import onnx_ir as ir

_OF_EACH = {"GPT2Tokenizer", "CLIPTokenizer", "RobertaTokenizer", "BpeTokenizer", "SpmTokenizer", "HfJsonTokenizer"}
"""A row of ids for each text, then one of a mask."""

_OF_ONE = {"BertTokenizer": 1, "SentencepieceTokenizer": 1, "HfBertTokenizer": 2}
"""The ids of all that they are given, in one row; then more such rows, such as of types and a mask. How many axes."""

_ROWS = 3
"""Results of this form at most; further ones are about places in the text."""


def length_of(op_type: str, result: str) -> str | None:
    """The symbol for the number of tokens that come out, which no input has; None of other operators."""
    return f"{result}_tokens" if op_type in {*_OF_EACH, *_OF_ONE} else None


def results(op_type: str, texts: tuple[int | None, ...], tokens: int, count: int) -> list[tuple[int | None, ...]]:
    """The shapes of the first results, as far as they are known.

    Args:
        op_type: Of a tokenizer.
        texts: The shape of its text.
        tokens: How many come out of each.
        count: Results of the node.
    """
    if op_type in _OF_EACH:
        return [(*texts, tokens)] * min(count, _ROWS - 1)
    return [(*[1] * (_OF_ONE[op_type] - 1), tokens)] * min(count, _ROWS)


def takes_one_text(node: ir.Node) -> bool:
    """Whether a node makes one row of tokens, whatever the number of its texts."""
    return node.op_type in _OF_ONE
