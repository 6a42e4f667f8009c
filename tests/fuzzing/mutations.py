"""Changes to files: of bytes, of any message of protobuf by its own schema, of JSON, of arrays and archives."""

import copy
import io
import json
import random
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor as Field

NUMBERS = (0, 1, -1, 2, 3, 4, 7, 8, 64, 255, 2**16, 2**31 - 1, -(2**31), 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e30, -1e30, 1e-45, float("inf"), float("-inf"), float("nan"))
NAMES = (
    "",
    "x",
    "a\nb",
    "a\r\n\tb\u2028c",
    "\x1b[2J\x1b]0;own\x07",
    "\u202egnp.exe\u2066",
    "<script>alert('1')</script>&amp;",
    "[bold red]x[/] [link=http://a]",
    "../../../etc/passwd",
    "/etc/passwd",
    "C:\\x",
    "atpatch/layer0/flags",
    "atpatch.site",
    "ai.onnx",
    "com.microsoft",
    "\0",
    "%s%n{0}${x}",
    "e\u0301\ufeff\U000e0041",
    "n" * 5000,
)
OPERATORS = (
    "Softmax MatMul Gemm Einsum Reshape Transpose Where Add Mul Div Split Slice Gather Concat Cast Squeeze Unsqueeze "
    "Expand Identity If Loop Scan Constant ConstantOfShape Shape Range Attention MultiHeadAttention Dropout Tile Pad "
    "GroupQueryAttention LayerNormalization ReduceSum IsNaN Flatten Relu Conv Resize OneHot"
)


# Bytes


def change_bytes(rng: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        part = data[(start := rng.randrange(len(data) + 1)) : start + rng.randrange(1, 40)]
        how = rng.randrange(6)
        if how == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1 and at < len(data):
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif how == 2:
            data[at:at] = part
        elif how == 3:
            data[at : at + len(part)] = part
        elif how == 4:
            del data[at : at + rng.randrange(1, 20)]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


# protobuf


def change_model(rng: random.Random, content: bytes) -> bytes:
    """Some changes to a model's messages, anywhere in it."""
    model = onnx.load_from_string(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found: dict[str, list[Any]] = {}
        for message in _messages(model):
            found.setdefault(message.DESCRIPTOR.name, []).append(message)
        message = rng.choice(found[rng.choice(sorted(found))])
        _change_message(rng, message, found)
    return bytes(model.SerializeToString())


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, held in message.ListFields():
        if field.type == Field.TYPE_MESSAGE:
            for part in held if field.is_repeated else (held,):
                yield from _messages(part)


def _change_message(rng: random.Random, message: Any, found: dict[str, list[Any]]) -> None:
    if rng.random() < 0.02:
        message.MergeFromString(b"\xf8\x7d\x01")
        return
    if rng.random() < 0.1:  # another of its kind in its place
        other = copy.deepcopy(rng.choice(found[message.DESCRIPTOR.name]))
        if other.ByteSize() < 20_000:
            message.CopyFrom(other)
        return
    held = [field for field, _ in message.ListFields()]
    field = rng.choice(held if held and rng.random() < 0.85 else list(message.DESCRIPTOR.fields))
    if field.is_repeated:
        _change_repeated(rng, getattr(message, field.name), field, found)
    elif rng.random() < 0.15:
        message.ClearField(field.name)
    elif field.type == Field.TYPE_MESSAGE:
        others = found.get(field.message_type.name)
        part = getattr(message, field.name)
        part.SetInParent()
        if others:
            part.CopyFrom(copy.deepcopy(rng.choice(others)))
    else:
        setattr(message, field.name, _value(rng, field, getattr(message, field.name), found))


def _change_repeated(rng: random.Random, held: Any, field: Field, found: dict[str, list[Any]]) -> None:
    how, is_message = rng.randrange(5), field.type == Field.TYPE_MESSAGE
    at = rng.randrange(len(held)) if len(held) else None
    if how == 0 and at is not None:
        del held[at]
    elif how == 1 and at is not None:
        held.append(held[at])
        if rng.random() < 0.5:
            held.insert(0, held.pop())
    elif how == 2 and at is not None:
        held.insert(rng.randrange(len(held)), held.pop(at))
    elif is_message:
        others = found.get(field.message_type.name)
        held.append(copy.deepcopy(rng.choice(others))) if others else held.add()
    elif at is not None and how == 3:
        held[at] = _value(rng, field, held[at], found)
    else:
        held.append(_value(rng, field, held[at] if at is not None else None, found))


def _value(rng: random.Random, field: Field, old: Any, found: dict[str, list[Any]]) -> Any:
    if field.type == Field.TYPE_STRING:
        return _name(rng, field, old, found)
    if field.type == Field.TYPE_BYTES:
        return change_bytes(rng, old or b"\0")
    if field.type == Field.TYPE_ENUM:
        return rng.choice(field.enum_type.values).number
    if field.cpp_type in (Field.CPPTYPE_FLOAT, Field.CPPTYPE_DOUBLE):
        return rng.choice(FLOATS)
    low, high = _BOUNDS.get(field.cpp_type, (0, 1))
    near = (old or 0) + rng.choice((-1, 1, 2, 16))
    return min(max(near if rng.random() < 0.5 else rng.choice(NUMBERS), low), high)


_BOUNDS = {
    Field.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    Field.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    Field.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def _name(rng: random.Random, field: Field, old: Any, found: dict[str, list[Any]]) -> str:
    if field.name == "op_type":
        return rng.choice(OPERATORS.split())
    if field.name == "value" and isinstance(old, str) and old[:1] in ("{", "["):
        return change_json(rng, old)
    if rng.random() < 0.3:
        return rng.choice(NAMES)
    nodes = found.get("NodeProto", [])
    taken = [name for node in nodes for name in (*node.input, *node.output, node.name)]
    return rng.choice(taken) if taken and rng.random() < 0.8 else f"{old or ''}_"


# JSON, and the file of a patch


def change_json(rng: random.Random, text: str) -> str:
    if rng.random() < 0.05:
        return rng.choice(("", "null", "[" * 5000, "9" * 5000, '"\\ud800"', '{"a": NaN}', text[: len(text) // 2]))
    found = json.loads(text)
    for _ in range(rng.choice((1, 1, 2))):
        found = _changed(rng, found)
    return json.dumps(found)


def _changed(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        how = rng.random()
        if how < 0.1:
            return {name: part for name, part in value.items() if name != key}
        if how < 0.2:
            return {**value, rng.choice(NAMES): value[key]}
        return {**value, key: _changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at, how = rng.randrange(len(value)), rng.random()
        if how < 0.1:
            return value[:at] + value[at + 1 :]
        if how < 0.2:
            return [*value, value[at]]
        return [*value[:at], _changed(rng, value[at]), *value[at + 1 :]]
    return rng.choice((None, True, "", [], {}, [[]], {"a": []}, "\ud800", *NUMBERS, *FLOATS, *NAMES, 10**400))


def change_patch(rng: random.Random, content: bytes) -> bytes:
    """A `.safetensors` file with another header or other entries; its length of header fits."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    if rng.random() < 0.85:
        header["__metadata__"]["atpatch"] = change_json(rng, header["__metadata__"]["atpatch"])
    else:
        header = _changed(rng, header)
    if rng.random() < 0.2:
        data = change_bytes(rng, data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# Arrays and archives


def change_arrays(rng: random.Random, arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    """The arrays of a debug set as `.npy` files, some of them others."""
    made = dict(arrays)
    for _ in range(rng.choice((0, 1, 1, 2))):
        key = rng.choice(sorted(made))
        how = rng.randrange(6)
        if how == 0:
            del made[key]
        elif how == 1:
            made[f"{key.rpartition('/')[0]}/{rng.choice(NAMES)}".strip("/")] = made[key]
        elif how == 2 and made[key].ndim:
            made[key] = made[key][: rng.choice((0, 1, 2))]
        elif how == 3 and made[key].dtype.kind != "U":
            made[key] = made[key].astype(rng.choice(("<f2", ">f8", "i1", "u8", "c8", "?", "U3", "S2", "M8[s]")))
        elif how == 4 and made[key].dtype.kind == "f":
            with np.errstate(all="ignore"):
                made[key] = made[key] * np.float32(rng.choice(FLOATS))
        else:
            made[key] = made[key][None] if rng.random() < 0.5 else made[key].reshape(-1)
    files = {key: _npy(array) for key, array in made.items()}
    if rng.random() < 0.6 and files:
        key = rng.choice(sorted(files))
        files[key] = _change_npy(rng, files[key])
    return files


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _change_npy(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.4:
        return change_bytes(rng, content)
    end = content.index(b"\n") + 1
    kind = rng.choice(
        ("<f4", "<U0", "<U1", "|V0", "<U999999999", "|O", "<i8", "[('a', '<f4')]", "('<f4', (2,))", "nope")
    )
    sizes = tuple(rng.choice(NUMBERS) for _ in range(rng.randrange(4)))
    text = {"descr": kind, "fortran_order": rng.random() < 0.5, "shape": sizes}
    header = rng.choice((repr(text), repr(text).replace("'shape'", "'shapes'"), "(" * 3000, "{}", "1" * 9000)).encode()
    return content[:8] + len(header).to_bytes(2, "little") + header + content[end:]


def archived(rng: random.Random, files: dict[str, bytes]) -> bytes:
    """A `.npz` of these files, packed in any way, perhaps damaged."""
    stream = io.BytesIO()
    packing = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(stream, "w") as file:
        for name, content in files.items():
            file.writestr(f"{name}.npy".replace("\0", "0"), content, packing)
    content = stream.getvalue()
    return change_bytes(rng, content) if rng.random() < 0.4 else content
