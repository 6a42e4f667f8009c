"""A file holds what the schema of ONNX knows, and its names are text: nothing is left that only another reader sees.

protobuf keeps the fields that its schema does not know, and values that an enumeration does not have, and hands them on
unread: a runtime of another version may well read them.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

Refusal = Callable[[str, str, str], Exception]
"""Makes the error from the place, what was expected there, and what was found."""


def check_schema(message: Message, refusal: Refusal, where: str = "") -> None:
    """Every field known, every text valid: of a message and all that it holds.

    Args:
        message: Any message of a file. Bytes, such as weights, are not looked at.
        refusal: Makes the error.
        where: What the message belongs to.

    Raises:
        Exception: What `refusal` makes.
    """
    kind = message.DESCRIPTOR
    where = _place(message, kind, where)
    for field in UnknownFieldSet(message):
        raise refusal(where, "fields that the schema of ONNX has", f"field {field.field_number} of a {kind.name}")
    texts, messages = _fields(kind)
    for name, repeated in texts:
        held = getattr(message, name)
        for text in held if repeated else (held,):
            if not isinstance(text, str):  # protobuf hands on bytes that are no text as bytes
                raise refusal(where, "names that are text", f"the name {text!r}, which is no text")
            if "\0" in text and name != "doc_string":
                raise refusal(where, "names without a NUL, where some readers end them", f"the {name} {text!r}")
    for name, repeated in messages:
        if repeated:
            for part in getattr(message, name):
                check_schema(part, refusal, where)
        elif message.HasField(name):
            check_schema(getattr(message, name), refusal, where)


@cache
def _fields(kind: Descriptor) -> tuple[tuple[tuple[str, bool], ...], tuple[tuple[str, bool], ...]]:
    """The fields of a kind of message that hold text, and those that hold messages; each with whether it repeats."""
    return tuple(_of_type(kind, FieldDescriptor.TYPE_STRING)), tuple(_of_type(kind, FieldDescriptor.TYPE_MESSAGE))


def _of_type(kind: Descriptor, wanted: int) -> Iterator[tuple[str, bool]]:
    return ((field.name, field.is_repeated) for field in kind.fields if field.type == wanted)


_NAMED = {"NodeProto": "node", "TensorProto": "tensor", "FunctionProto": "function", "ValueInfoProto": "value"}


def _place(message: Any, kind: Descriptor, where: str) -> str:
    """The innermost part of the file with a name."""
    word = _NAMED.get(kind.name)
    return f"{word} {message.name!r}" if word and message.name else where
