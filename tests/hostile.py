"""Files that are no valid grafts, by name: what each does, and what must be said about it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hotgraft import Entries, Graft, Provenance

Header = dict[str, Any]


def good_graft() -> Graft:
    """Three rows, two dtypes; every hostile file below is this one with something wrong."""
    return Graft.from_entries(
        {
            "a": Entries([1, 3], torch.tensor([1.0, 2.0]), torch.zeros(2), (4,)),
            "b": Entries([0, 2, 5], torch.tensor([3.0, 4.0, 5.0]), torch.zeros(3), (2, 3)),
            "c": Entries([0], torch.ones(1).bfloat16(), torch.zeros(1).bfloat16(), ()),
        },
        Provenance(scope="all", eligible=20, method="given"),
    )


def split(data: bytes) -> tuple[Header, bytes]:
    """A safetensors file's header and tensor bytes."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Header | bytes, body: bytes) -> bytes:
    """The file of a header (as it is, or to be written as JSON) and tensor bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def good_file(folder: Path) -> bytes:
    good_graft().save(folder / "good.graft.safetensors")
    return (folder / "good.graft.safetensors").read_bytes()


# ---- ways to spoil a file ---------------------------------------------------------------------

Spoil = Callable[[bytes], bytes]


def header(change: Callable[[Header], object]) -> Spoil:
    """Change the header."""

    def spoil(data: bytes) -> bytes:
        head, body = split(data)
        change(head)
        return join(head, body)

    return spoil


def metadata(**values: Any) -> Spoil:
    """Change metadata; None takes a key away."""

    def change(head: Header) -> None:
        head["__metadata__"] |= values
        for key in [k for k, v in values.items() if v is None]:
            del head["__metadata__"][key]

    return header(change)


def table(change: Callable[[list[Any]], object]) -> Spoil:
    """Change the parsed table: [a, b, c] as [name, shape, dtype, block, first, count]."""

    def spoil(head: Header) -> None:
        rows = json.loads(head["__metadata__"]["table"])
        head["__metadata__"]["table"] = json.dumps(change(rows) or rows)

    return header(spoil)


def put(row: int, field: int, value: Any) -> Spoil:
    """Set one field of one row of the table."""
    return table(lambda rows: rows[row].__setitem__(field, value))


def positions(*values: int) -> Spoil:
    """Set the five positions of the F32 rows: two of `a`, three of `b`."""

    def spoil(data: bytes) -> bytes:
        head, body = split(data)
        begin, end = head["F32.positions"]["data_offsets"]
        return join(head, body[:begin] + struct.pack("<5i", *values) + body[end:])

    return spoil


def offsets(tensor: str, begin: int, end: int) -> Spoil:
    return header(lambda head: head[tensor].__setitem__("data_offsets", [begin, end]))


def flipped(tensor: str) -> Spoil:
    """Flip one bit of a tensor."""

    def spoil(data: bytes) -> bytes:
        head, body = split(data)
        at = head[tensor]["data_offsets"][0]
        return join(head, body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])

    return spoil


def rebuilt(change: Callable[[Header, dict[str, bytes]], object]) -> Spoil:
    """Take the tensors apart, change them, and lay them out anew without gaps."""

    def spoil(data: bytes) -> bytes:
        head, body = split(data)
        meta = head.pop("__metadata__")
        blobs = {name: body[slice(*tensor["data_offsets"])] for name, tensor in head.items()}
        change(head, blobs)
        at = 0
        for name, blob in blobs.items():
            head[name]["data_offsets"] = [at, at + len(blob)]
            at += len(blob)
        return join({"__metadata__": meta, **head}, b"".join(blobs.values()))

    return spoil


def without(tensor: str) -> Spoil:
    return rebuilt(lambda head, blobs: (head.pop(tensor), blobs.pop(tensor)))


def extra(name: str, dtype: str, shape: list[int], blob: bytes) -> Spoil:
    """Add a tensor, or replace one."""

    def change(head: Header, blobs: dict[str, bytes]) -> None:
        head[name] = {"dtype": dtype, "shape": shape}
        blobs[name] = blob

    return rebuilt(change)


def raw(data: bytes) -> Spoil:
    return lambda _: data


NOT_A_FILE = "not a safetensors file: "
FOLLOW = "do not follow the"
BIG = 10**30
HOSTILE: dict[str, tuple[Spoil, str]] = {
    # the container
    "empty": (raw(b""), NOT_A_FILE),
    "seven bytes": (raw(b"\0" * 7), NOT_A_FILE),
    "header length only": (lambda data: data[:8], NOT_A_FILE),
    "header cut short": (lambda data: data[:60], NOT_A_FILE),
    "tensors cut short": (lambda data: data[:-1], NOT_A_FILE),
    "no tensors": (lambda data: join(split(data)[0], b""), NOT_A_FILE),
    "bytes at the end": (lambda data: data + b"\0", NOT_A_FILE),
    "header length 0": (lambda data: bytes(8) + data[8:], NOT_A_FILE),
    "header length beyond the file": (lambda d: struct.pack("<Q", len(d)) + d[8:], NOT_A_FILE),
    "header length 2^64 - 1": (lambda data: b"\xff" * 8 + data[8:], NOT_A_FILE),
    "header length 2^64 - 8": (lambda d: struct.pack("<Q", 2**64 - 8) + d[8:], NOT_A_FILE),
    "header not JSON": (lambda data: join(b"{no", split(data)[1]), NOT_A_FILE),
    "header not UTF-8": (lambda data: join(b'{"\xff":1}', split(data)[1]), NOT_A_FILE),
    "header a list": (raw(join(b"[]", b"")), NOT_A_FILE),
    "header nested deeply": (raw(join(b'{"a":' + b"[" * 50_000, b"")), NOT_A_FILE),
    "a pickle": (raw(b"\x80\x04\x95" + bytes(64)), NOT_A_FILE),
    "tensors overlap": (offsets("F32.old", 2, 22), NOT_A_FILE),
    "tensor beyond the file": (offsets("F32.old", 10**6, 10**6 + 20), NOT_A_FILE),
    "tensor ends before it begins": (offsets("F32.old", 20, 0), NOT_A_FILE),
    "tensor offset negative": (offsets("F32.old", -4, 16), NOT_A_FILE),
    "tensor offset 2^64": (offsets("F32.old", 2**64, 2**64 + 20), NOT_A_FILE),
    "tensor shape overflows": (
        header(lambda head: head["F32.old"].__setitem__("shape", [2**62, 2**62])),
        NOT_A_FILE,
    ),
    "tensor shape is not its size": (
        header(lambda head: head["F32.old"].__setitem__("shape", [6])),
        NOT_A_FILE,
    ),
    "tensor dtype unknown": (
        header(lambda head: head["F32.old"].__setitem__("dtype", "F31")),
        NOT_A_FILE,
    ),
    "metadata not a map": (header(lambda head: head.update(__metadata__=[1])), NOT_A_FILE),
    "metadata value a number": (metadata(version=1), NOT_A_FILE),
    "metadata value a list": (metadata(table=[]), NOT_A_FILE),
    # the metadata
    "not a graft": (metadata(format=None), "a safetensors file, but not a graft (format None"),
    "format another": (metadata(format="pt"), "but not a graft (format 'pt', wanted 'hotgraft')"),
    "no metadata": (header(lambda head: head.pop("__metadata__")), "but not a graft (format None"),
    "metadata null": (header(lambda head: head.update(__metadata__=None)), "but not a graft"),
    "version 2": (metadata(version="2"), "graft format version '2'; this is hotgraft"),
    "version missing": (metadata(version=None), "graft format version None"),
    "version 1.0": (metadata(version="1.0"), "graft format version '1.0'"),
    "table missing": (metadata(table=None), "the metadata lacks 'table'"),
    "eligible missing": (metadata(eligible=None), "the metadata lacks 'eligible'"),
    "scope missing": (metadata(scope=None), "the metadata lacks 'scope'"),
    "method missing": (metadata(method=None), "the metadata lacks 'method'"),
    "creator missing": (metadata(creator=None), "the metadata lacks 'creator'"),
    "eligible a word": (metadata(eligible="many"), "eligible is 'many', not a count"),
    "eligible negative": (metadata(eligible="-20"), "eligible is '-20', not a count"),
    "eligible too small": (
        metadata(eligible="5"),
        "5 eligible elements cannot be: the graft has 6",
    ),
    "eligible 2^63": (metadata(eligible=str(2**63)), f"{2**63} eligible elements cannot be"),
    "eligible of 5000 digits": (metadata(eligible="9" * 5000), "Exceeds the limit"),
    "id missing": (metadata(id=None), "it states None where its id should be"),
    "id malformed": (metadata(id="G" * 64), f"it states '{'G' * 64}' where its id should be"),
    "id wrong": (metadata(id="0" * 64), f"but it states {'0' * 64}: the file is damaged"),
    # the table
    "table not JSON": (metadata(table="[["), "the table is malformed: "),
    "table nested deeply": (metadata(table="[" * 100_000), "the table is malformed: "),
    "table a number": (metadata(table="7"), "the table is malformed: "),
    "table null": (metadata(table="null"), "the table is malformed: "),
    "table empty": (metadata(table="[]"), "the graft is empty: it needs at least one entry"),
    "table a map": (metadata(table='{"aaaaaa": 1}'), "the table is malformed: "),
    "row short": (table(lambda rows: rows[0].pop()), "the table is malformed: "),
    "row long": (table(lambda rows: rows[0].append(1)), "the table is malformed: "),
    "row a string": (table(lambda rows: ["abcdef", *rows]), "row 'a' is not [name, shape, dtype"),
    "name a number": (put(0, 0, 7), "row 7 is not [name, shape, dtype, block, first, count]"),
    "dtype a list": (put(0, 2, ["F32"]), "row 'a' is not [name, shape, dtype"),
    "shape a map": (put(0, 1, {}), "row 'a' is not [name, shape, dtype"),
    "shape a number": (put(0, 1, 4), "the table is malformed: "),
    "shape of strings": (put(0, 1, ["4"]), "row 'a' is not [name, shape, dtype"),
    "shape of booleans": (put(0, 1, [True]), "row 'a' is not [name, shape, dtype"),
    "count a boolean": (put(2, 5, True), "row 'c' is not [name, shape, dtype"),
    "count a float": (put(0, 5, 2.0), "row 'a' is not [name, shape, dtype"),
    "block null": (put(0, 3, None), "row 'a' is not [name, shape, dtype"),
    "first not a number": (put(0, 4, float("nan")), "row 'a' is not [name, shape, dtype"),
    "integer of 5000 digits": (
        header(lambda h: h["__metadata__"].update(table=f'[["a",[{"9" * 5000}],"F32",0,0,1]]')),
        "the table is malformed: ",
    ),
    "dtype unknown": (put(0, 2, "F31"), "'a': unknown dtype 'F31'; known are BF16"),
    "dtype without arrays": (put(0, 2, "F16"), "'a' is of dtype F16, but the graft has no such"),
    "dtype of other arrays": (put(0, 2, "BF16"), FOLLOW),
    "shape of zero": (put(0, 1, [4, 0]), "'a': shape [4, 0] is not a possible shape"),
    "shape negative": (put(0, 1, [-4]), "'a': shape [-4] is not a possible shape"),
    "shape negative twice": (put(0, 1, [-2, -2]), "'a': shape [-2, -2] is not a possible shape"),
    "shape of 2^63": (put(0, 1, [2**32, 2**31]), "is not a possible shape"),
    "shape huge": (put(0, 1, [BIG] * 40), "is not a possible shape"),
    "shape smaller than a position": (put(0, 1, [3]), "'a': position 3 is outside [0, 3)"),
    "block odd": (put(0, 3, 1), "'a': block offset 1 is not one of its shape's blocks"),
    "block negative": (put(0, 3, -(2**31)), "is not one of its shape's blocks"),
    "block beyond the shape": (put(0, 3, 2**31), "is not one of its shape's blocks"),
    "block huge": (put(0, 3, 2**31 * BIG), "is not one of its shape's blocks"),
    "first off by one": (put(0, 4, 1), "'a': entries [1, 1 + 2) do not follow the 0 entries"),
    "first not after the row before": (put(1, 4, 0), "'b': entries [0, 0 + 3) do not follow the 2"),
    "first negative": (put(0, 4, -2), FOLLOW),
    "first huge": (put(1, 4, BIG), FOLLOW),
    "count zero": (put(0, 5, 0), FOLLOW),
    "count negative": (put(1, 5, -3), FOLLOW),
    "count too small": (put(1, 5, 2), "F32: the rows count 4 entries, but there are 5 positions"),
    "count too large": (put(1, 5, 4), "F32: the rows count 6 entries, but there are 5 positions"),
    "count 2^64": (put(1, 5, 2**64), "F32: the rows count 18446744073709551618 entries"),
    "row missing": (table(lambda rows: rows[:2]), "BF16: the rows count 0 entries"),
    "rows not sorted": (
        table(lambda rows: [rows[0], rows[2], rows[1]]),
        "rows must be sorted and unique: 'b' follows 'c'",
    ),
    "row twice": (put(1, 0, "a"), "rows must be sorted and unique: 'a' follows 'a'"),
    "blocks of unlike shapes": (
        table(lambda rows: [["a", [2**32], *rows[0][2:]], ["a", [2**33], "F32", 2**31, 2, 3]]),
        "'a': its blocks disagree on shape or dtype",
    ),
    # the arrays
    "positions not sorted": (
        positions(1, 3, 2, 0, 5),
        "'b': positions must ascend without repeats, but 0 follows 2",
    ),
    "position twice": (
        positions(1, 1, 0, 2, 5),
        "'a': positions must ascend without repeats, but 1",
    ),
    "position negative": (positions(-1, 3, 0, 2, 5), "'a': position -1 is outside [0, 4)"),
    "position out of range": (positions(1, 3, 0, 2, 6), "'b': position 6 is outside [0, 6)"),
    "position least": (positions(1, 3, -(2**31), 2, 5), f"'b': position -{2**31} is outside"),
    "position largest": (positions(1, 2**31 - 1, 0, 2, 5), f"'a': position {2**31 - 1} is outside"),
    "position moved": (positions(0, 3, 0, 2, 5), "the file is damaged or was changed"),
    "new bits changed": (flipped("F32.new"), "the file is damaged or was changed"),
    "old bits changed": (flipped("BF16.old"), "the file is damaged or was changed"),
    "name changed": (put(0, 0, "A"), "the file is damaged or was changed"),
    "tensor missing": (without("F32.old"), "the tensor F32.old is missing"),
    "positions missing": (without("BF16.positions"), "the tensor BF16.positions is missing"),
    "tensor too many": (
        extra("F32.more", "U8", [1], b"\0"),
        "unexpected tensors beside positions, new and old",
    ),
    "tensor without a dtype": (extra("weight", "U8", [1], b"\0"), "unknown dtype ''; known are"),
    "tensor of an unknown dtype": (extra("F31.new", "U8", [1], b"\0"), "unknown dtype 'F31'"),
    "dtype without a row": (
        lambda data: extra("I8.old", "I8", [1], b"\0")(
            extra("I8.new", "I8", [1], b"\0")(extra("I8.positions", "I32", [1], bytes(4))(data))
        ),
        "I8: the rows count 0 entries, but there are 1 positions",
    ),
    "positions of 64 bits": (
        extra("F32.positions", "I64", [5], bytes(40)),
        "F32.positions is I64 of shape [5]; wanted a flat I32",
    ),
    "new of another dtype": (
        extra("F32.new", "I32", [5], bytes(20)),
        "F32.new is I32 of shape [5]",
    ),
    "new not flat": (extra("F32.new", "F32", [5, 1], bytes(20)), "F32.new is F32 of shape [5, 1]"),
    "new a scalar": (extra("BF16.new", "BF16", [], bytes(2)), "BF16.new is BF16 of shape []"),
    "new shorter": (extra("F32.new", "F32", [4], bytes(16)), "5 positions, 4 new and 5 old"),
    "positions of none": (extra("F32.positions", "I32", [0], b""), "0 positions, 5 new and 5 old"),
}
