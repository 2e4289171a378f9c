"""The tiny language of the lab's tasks: which programs belong to it, and what they return.

A model's sample is run in this process, so what is run must be harmless by its form: nothing but one function over a
list of integers, without attributes, imports, loops or calls other than five builtins, whose lists cannot grow and
whose numbers stay short. Whatever else a model writes is no program of the language, and counts as wrong.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Sequence
from typing import Any

MAX_CHARACTERS = 600
MAX_LINES = 8
MAX_NODES = 160
MAX_PRODUCTS = 6  # each at most doubles the digits of a number
MAX_CONSTANT = 1000

_BUILTINS: dict[str, Callable[..., Any]] = {"sorted": sorted, "sum": sum, "max": max, "min": min, "len": len}
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Mod)
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def run_program(program: str, inputs: Sequence[Sequence[int]]) -> list[list[int] | int | None] | None:
    """What `solve` returns for each of the lists, None where it raises; None alone for what is not of the language."""
    if len(program) > MAX_CHARACTERS:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # of numbers that run into words, say
            tree = ast.parse(program)
            if not _is_solve(tree):
                return None
            code = compile(tree, "<sample>", "exec")  # which refuses some of what parses
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    names: dict[str, Any] = {"__builtins__": {}, **_BUILTINS}
    exec(code, names)
    return [_call(names["solve"], list(xs)) for xs in inputs]


def _call(solve: Callable[[list[int]], list[int] | int], xs: list[int]) -> list[int] | int | None:
    try:
        return solve(xs)
    except (ArithmeticError, ValueError):  # x % 0, max of an empty list, a step of 0
        return None


def _is_solve(tree: ast.Module) -> bool:
    nodes = list(ast.walk(tree))
    products = sum(isinstance(node, ast.Mult) for node in nodes)
    if len(nodes) > MAX_NODES or products > MAX_PRODUCTS or len(tree.body) != 1:
        return False
    match tree.body[0]:
        case ast.FunctionDef(
            name="solve",
            args=ast.arguments(
                posonlyargs=[], args=[ast.arg(arg="xs", annotation=None)], vararg=None, kwonlyargs=[], kwarg=None,
                defaults=[],
            ),
            body=[*lines, ast.Return(value=ast.expr() as returned)],
            decorator_list=[],
            returns=None,
        ) if len(lines) < MAX_LINES:  # fmt: skip
            return all(_is_step(line) for line in lines) and (_is_list(returned) or _is_number(returned, in_list=False))
    return False


def _is_step(line: ast.stmt) -> bool:
    """`xs = ` and a list."""
    match line:
        case ast.Assign(targets=[ast.Name(id="xs")], value=value):
            return _is_list(value)
    return False


def _is_list(node: ast.expr) -> bool:
    """An expression for a list that is no longer than `xs`."""
    match node:
        case ast.Name(id="xs"):
            return True
        case ast.Subscript(value=value, slice=ast.Slice(lower=lower, upper=upper, step=step)):
            return _is_list(value) and all(part is None or _is_constant(part) for part in (lower, upper, step))
        case ast.Call(func=ast.Name(id="sorted"), args=[value], keywords=[]):
            return _is_list(value)
        case ast.ListComp(
            elt=element, generators=[ast.comprehension(target=ast.Name(id="x"), iter=values, ifs=ifs, is_async=0)]
        ):
            return _is_number(element, in_list=True) and _is_list(values) and all(_is_condition(test) for test in ifs)
    return False


def _is_number(node: ast.expr, *, in_list: bool) -> bool:
    """An expression for an integer; `x` has a meaning within a comprehension alone, `xs` outside of one."""
    match node:
        case ast.Name(id="x"):
            return in_list
        case ast.BinOp(left=left, op=operator, right=right):
            return isinstance(operator, _OPERATORS) and all(_is_number(side, in_list=in_list) for side in (left, right))
        case ast.UnaryOp(op=ast.USub(), operand=operand) if not isinstance(operand, ast.Constant):
            return _is_number(operand, in_list=in_list)
        case ast.Call(func=ast.Name(id="sum" | "len"), args=[values], keywords=[]):
            return not in_list and _is_list(values)
        case ast.Call(func=ast.Name(id="max" | "min"), args=[values], keywords=[]):
            return not in_list and _is_list(values)
        case ast.Call(
            func=ast.Name(id="max" | "min"), args=[values], keywords=[ast.keyword(arg="default", value=default)]
        ):
            return not in_list and _is_list(values) and _is_constant(default)
    return _is_constant(node)


def _is_condition(node: ast.expr) -> bool:
    match node:
        case ast.Compare(left=left, ops=[operator], comparators=[right]):
            return isinstance(operator, _COMPARISONS) and all(_is_number(side, in_list=True) for side in (left, right))
    return False


def _is_constant(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=value):
            return type(value) is int and value <= MAX_CONSTANT
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)):
            return type(value) is int and value <= MAX_CONSTANT
    return False
