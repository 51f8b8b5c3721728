"""The messages of the Open Inference Protocol over gRPC, built from `open_inference.proto` when this is imported.

Generated code would tie the project to one release of the compiler; the file uses little of the language, so reading it
takes less than the code would. The messages live in a pool of their own: a client in the same process may bring the
same names. Not here: what the messages mean (`serving.rpc`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from serving.wire import Refusal

SOURCE = Path(__file__).with_name("open_inference.proto")
STATEMENT = re.compile(r"([^{};]*)([{};])")
FIELD = re.compile(r"(repeated )?(map<(\w+), (\w+)>|\w+) (\w+) = (\d+)")
METHOD = re.compile(r"rpc (\w+)\((\w+)\) returns \((\w+)\)")
MOST_FIELDS = 2**14
"""Fields of a message, those of its tensors included: a thousand tensors have about seven each."""
TENSORS: tuple[int, ...] = (5, 6)
"""The fields of a ModelInferRequest that are messages of many fields: inputs and outputs."""
VARINT, COUNTED, FIXED = 0, 2, {1: 8, 5: 4}
"""How a field's value is written: as a number, as its size and so many bytes, or in so many bytes."""
Field = descriptor_pb2.FieldDescriptorProto


def read(text: str) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    """Message classes by name, and the request and response of each method."""
    text = re.sub(r"//[^\n]*", "", text)
    file = descriptor_pb2.FileDescriptorProto(name="noria_open_inference.proto", syntax="proto3")
    methods: dict[str, tuple[str, str]] = {}
    statements = ((" ".join(head.split()), end) for head, end in STATEMENT.findall(text))
    for head, end in statements:
        if head.startswith("package "):
            file.package = head.removeprefix("package ")
        elif end == "{" and head.startswith("message "):
            _message(file.message_type.add(name=head.split()[1]), statements)
        elif method := METHOD.fullmatch(head):
            methods[method[1]] = (method[2], method[3])
    _resolve(file)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = [message.name for message in file.message_type]
    found = {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{name}")) for name in names
    }
    return found, methods


def bounded(body: bytes) -> bytes:
    """A serialised message as it came, once it is known to have no more fields than may be. Raises Refusal 413.

    Two bytes are an empty tensor, which takes fifty times that once it is read, in the event loop. A body too short for
    so many fields is not looked at; values are skipped, so honest ones cost nothing either.
    """
    if len(body) <= 2 * MOST_FIELDS:
        return body
    count, parts = 0, [(0, len(body), TENSORS)]
    while parts:
        place, end, inner = parts.pop()
        while place < end:
            count += 1
            if count > MOST_FIELDS:
                raise Refusal(413, f"The message has more than {MOST_FIELDS:,} fields; send fewer tensors.")
            tag, place = _varint(body, place)
            field, kind = tag >> 3, tag & 7
            if kind == VARINT:
                _, place = _varint(body, place)
            elif kind == COUNTED:
                size, place = _varint(body, place)
                if field in inner:
                    parts.append((place, min(place + size, end), ()))
                place += size
            else:
                place += FIXED.get(kind, 0)
    return body


def _varint(body: bytes, place: int) -> tuple[int, int]:
    """The number at a place, and where it ends; what is none is left to the parser."""
    if place < len(body) and body[place] < 128:
        return body[place], place + 1
    value = 0
    for shift, byte in enumerate(body[place : place + 10]):
        value |= (byte & 127) << 7 * shift
        if byte < 128:
            return value, place + shift + 1
    return 0, len(body)


def _message(message: Any, statements: Iterator[tuple[str, str]], oneof: bool = False) -> None:
    for head, end in statements:
        if end == "}":
            return
        if head.startswith("message "):
            _message(message.nested_type.add(name=head.split()[1]), statements)
        elif head.startswith("oneof "):
            message.oneof_decl.add(name=head.split()[1])
            _message(message, statements, oneof=True)
        else:
            _field(message, head, oneof)


def _field(message: Any, head: str, oneof: bool) -> None:
    matched = FIELD.fullmatch(head)
    if matched is None:
        raise ValueError(f"{SOURCE.name}: '{head}' is not understood.")
    repeated, kind, key, value, name, number = matched.groups()
    field = message.field.add(name=name, number=int(number), label=Field.LABEL_OPTIONAL)
    if key:
        # A map is a repeated message of a key and a value.
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _field(entry, f"{key} key = 1", False)
        _field(entry, f"{value} value = 2", False)
        kind, repeated = entry.name, "repeated "
    if repeated:
        field.label = Field.LABEL_REPEATED
    if oneof:
        field.oneof_index = 0
    if f"TYPE_{kind.upper()}" in Field.Type.keys():  # noqa: SIM118 (an enumeration of protobuf, not a dict)
        field.type = Field.Type.Value(f"TYPE_{kind.upper()}")
    else:
        field.type, field.type_name = Field.TYPE_MESSAGE, kind


def _resolve(file: Any) -> None:
    """Full names of the messages that fields are of."""

    def walk(messages: Any, place: str) -> None:
        for message in messages:
            inner = f"{place}.{message.name}"
            nested = {one.name for one in message.nested_type}
            for field in message.field:
                if field.type_name:
                    field.type_name = f"{inner if field.type_name in nested else '.' + file.package}.{field.type_name}"
            walk(message.nested_type, inner)

    walk(file.message_type, f".{file.package}")


MESSAGES, METHODS = read(SOURCE.read_text())
