"""Documentation of fields: the docstring under each field, read from the source on demand.

pydantic would do it while each class is made (`use_attribute_docstrings`): a third of what
`check` took (0.37 s of CPU, 0.25 without), and as much again in every process that reads a plan.
"""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache

from pydantic import BaseModel


@cache
def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """Field → docstring, of a model and of what it inherits from."""
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if issubclass(owner, BaseModel) and owner is not BaseModel:
            found |= _docstrings(owner.__module__).get(owner.__name__, {})
    return {name: found[name] for name in model.model_fields if name in found}


@cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """Class → field → the string that follows it, of a whole module."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {
        node.name: {
            field.target.id: inspect.cleandoc(text.value.value)
            for field, text in zip(node.body, node.body[1:], strict=False)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
