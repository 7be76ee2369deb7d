"""Scopes: which tensors of a model are eligible for a graft."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

from hotgraft.errors import CoverageError
from hotgraft.weights import Spec, sample

Predicate: TypeAlias = Callable[[str, tuple[int, ...]], bool]
Scope: TypeAlias = str | Predicate
"""`all`, `encoder`, `linear`, or a function of a tensor's name and shape."""

_IN_A_BLOCK = re.compile(r"(^|\.)(layers?|h|blocks?|block)\.\d+\.")


def _encoder(name: str, shape: tuple[int, ...]) -> bool:  # noqa: ARG001 - a Predicate
    return _IN_A_BLOCK.search(name) is not None


def _linear(name: str, shape: tuple[int, ...]) -> bool:
    return _encoder(name, shape) and len(shape) == 2 and name.endswith(".weight")


SCOPES: Mapping[str, Predicate] = {
    "all": lambda _name, _shape: True,
    "encoder": _encoder,
    "linear": _linear,
}


def in_scope(specs: Mapping[str, Spec], scope: Scope) -> tuple[str, list[str]]:
    """The scope's name and the sorted names of the tensors in it.

    `all` is every tensor; `encoder` the tensors of the numbered blocks (`layer.0.`, `layers.0.`,
    `h.0.`, `block.0.`, `blocks.0.`), biases and norms included, so no embeddings, no final norm, no
    head; `linear` the two-dimensional `.weight`s among these.

    Raises:
        CoverageError: the scope is unknown or holds no tensor.

    Example:
        >>> from hotgraft.format import DTYPES
        >>> spec = Spec((4, 4), DTYPES["F32"])
        >>> in_scope({"embed.weight": spec, "layers.0.q.weight": spec}, "linear")
        ('linear', ['layers.0.q.weight'])
    """
    if callable(scope):
        label, predicate = getattr(scope, "__name__", "predicate"), scope
    elif scope in SCOPES:
        label, predicate = scope, SCOPES[scope]
    else:
        known = ", ".join(SCOPES)
        raise CoverageError(f"unknown scope {scope!r}; known are {known}, or a function")
    names = sorted(name for name, spec in specs.items() if predicate(name, spec.shape))
    if not names:
        raise CoverageError(
            f"scope {label!r} holds none of the {len(specs)} tensors ({sample(specs)}); "
            "use scope='all' or a function of name and shape"
        )
    return label, names
