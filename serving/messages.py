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

SOURCE = Path(__file__).with_name("open_inference.proto")
STATEMENT = re.compile(r"([^{};]*)([{};])")
FIELD = re.compile(r"(repeated )?(map<(\w+), (\w+)>|\w+) (\w+) = (\d+)")
METHOD = re.compile(r"rpc (\w+)\((\w+)\) returns \((\w+)\)")
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
