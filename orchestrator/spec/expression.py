"""Comparisons between dotted fields, read without `eval`: numbers, + - * / **, < <= > >= == !=, and, or, not."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.Pow: operator.pow,
}  # fmt: skip
COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip


class ExpressionError(ValueError):
    """The text is no comparison, or uses more than is allowed."""


class Expression:
    """A comparison such as `optimizer.lr * batch.global_batch_size < 0.1`.

    `names`: the dotted fields in it. Raises ExpressionError for anything else.
    """

    def __init__(self, text: str) -> None:
        try:
            self._tree = ast.parse(text, mode="eval").body
        except SyntaxError as error:
            raise ExpressionError(f"is not an expression: {error.msg}") from error
        self.text = text
        self.names: set[str] = set()
        self._collect(self._tree)
        if not isinstance(self._tree, ast.Compare | ast.BoolOp | ast.UnaryOp):
            raise ExpressionError("compares nothing")

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Tell whether the comparison is true of these values.

        True where a field is not among them, false where it has no value: a division by zero, a word
        where a number is needed.
        """
        if not self.names <= values.keys():
            return True
        try:
            return bool(self._value(self._tree, values))
        except (ArithmeticError, TypeError):
            return False

    def _collect(self, node: ast.AST) -> None:
        match node:
            case ast.Attribute() | ast.Name():
                self.names.add(_dotted(node))
            case ast.Constant(value=bool() | int() | float() | str() | None):
                pass
            case ast.BinOp(op=op) if type(op) in ARITHMETIC:
                self._collect(node.left)
                self._collect(node.right)
            case ast.UnaryOp(op=ast.USub() | ast.Not()):
                self._collect(node.operand)
            case ast.BoolOp():
                for value in node.values:
                    self._collect(value)
            case ast.Compare() if all(type(op) in COMPARISONS for op in node.ops):
                for value in (node.left, *node.comparators):
                    self._collect(value)
            case _:
                raise ExpressionError(f"{ast.unparse(node)!r} is not allowed here")

    def _value(self, node: Any, values: Mapping[str, Any]) -> Any:
        match node:
            case ast.Attribute() | ast.Name():
                return values[_dotted(node)]
            case ast.Constant():
                return node.value
            case ast.BinOp():
                left, right = self._value(node.left, values), self._value(node.right, values)
                return ARITHMETIC[type(node.op)](left, right)
            case ast.UnaryOp():
                inner = self._value(node.operand, values)
                return not inner if isinstance(node.op, ast.Not) else -inner
            case ast.BoolOp():
                parts = (self._value(value, values) for value in node.values)
                return all(parts) if isinstance(node.op, ast.And) else any(parts)
            case _:
                sides = [self._value(n, values) for n in (node.left, *node.comparators)]
                pairs = zip(node.ops, sides, sides[1:], strict=False)
                return all(COMPARISONS[type(op)](a, b) for op, a, b in pairs)


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ExpressionError(f"{ast.unparse(node)!r} is not a field")
