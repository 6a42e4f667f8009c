"""Tokenizers of onnxruntime-extensions: what they make of texts has as many tokens as the texts need."""

from collections.abc import Mapping

DOMAIN = "ai.onnx.contrib"

TOKENS = "tokens"
"""The symbol for how many there are."""

OF_TEXTS = frozenset({"GPT2Tokenizer", "CLIPTokenizer", "RobertaTokenizer", "BpeTokenizer"})
"""Their results are `[*texts, tokens]`."""

OF_ONE: Mapping[str, int] = {"BertTokenizer": 1, "SentencepieceTokenizer": 1, "HfBertTokenizer": 2}
"""Their results are of one text, or of a pair of texts, and have so many axes, the last of tokens."""

KINDS = OF_TEXTS | set(OF_ONE)
