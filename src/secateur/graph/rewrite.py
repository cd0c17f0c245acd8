"""Forwards that write down a size which no attribute gives: that one argument becomes a number.

Many attentions compute ``B, N, C = x.shape``, then ``q.reshape(B, N, self.num_heads, C // self.num_heads)``, scale by
``(C // self.num_heads) ** -0.5``, and end in ``y.reshape(B, N, C)``. With fewer heads `C` is no longer what the heads have
together, and no attribute can say so. But one size of a reshape follows from the others, and others stay what they were. So
the module is given a subclass of its own class whose forward is compiled from the installed source with ``-1``, or the number
that it was, in place of that single argument. No text from a plan is ever run: a plan holds places and numbers, and the source
at these places has to be what it was.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import itertools
import textwrap
import types
from collections.abc import Iterable
from typing import Any

from torch import nn

from secateur.errors import ModelError
from secateur.types import Rewrite

#: Code objects and instruction offsets from the call outwards to the forward of the module.
Frames = tuple[tuple[types.CodeType, int], ...]
_Site = tuple[int, int, str, int, int]  # line, column, source, argument, value


def frames_from(frame: types.FrameType | None) -> Frames:
    """Where a call is made: the frames from `frame` out to the call of the module."""
    found: list[tuple[types.CodeType, int]] = []
    while frame is not None and frame.f_code.co_name not in ("_call_impl", "_wrapped_call_impl") and len(found) < 6:
        found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def find_rewrite(cls: type[nn.Module], frames: Frames, argument: int) -> Rewrite | None:
    """The rewrite of argument or operand number `argument` of the expression at `frames`; None where there is no source."""
    if not frames or not hasattr(frames[0][0], "co_positions"):  # before Python 3.11 code does not know its columns
        return None
    code, at = frames[0]
    place = next(itertools.islice(code.co_positions(), at // 2, None))  # type: ignore[attr-defined]
    for depth in range(1, len(frames) + 1):
        names = tuple(code.co_name for code, _ in reversed(frames[:depth]))
        functions = [_function(cls, names[: i + 1]) for i in range(depth)]
        if all(f is not None and f.__code__ is c for f, (c, _) in zip(functions, reversed(frames[:depth]), strict=True)):
            break
    else:
        return None
    tree = _tree(code)
    for call in _calls(tree):
        if tree is not None and (call.lineno, call.end_lineno, call.col_offset, call.end_col_offset) == place:
            if argument >= len(_operands(call)):
                return None
            return Rewrite("", names, call.lineno - tree.lineno, call.col_offset, argument, ast.unparse(call))
    return None


def apply_rewrites(model: nn.Module, rewrites: Iterable[Rewrite]) -> None:
    """Give modules of `model` their rewritten classes, in place. Raises ModelError where the source is another one."""
    by_module: dict[str, list[Rewrite]] = {}
    for rewrite in rewrites:
        by_module.setdefault(rewrite.module, []).append(rewrite)
    for path, own in by_module.items():
        module = model.get_submodule(path)
        sites = frozenset((r.functions, r.line, r.column, r.call, r.argument, r.value) for r in own)
        base: Any
        base, before = getattr(type(module), "_secateur_rewritten", (type(module), frozenset()))
        module.__class__ = _rewritten(base, before | sites)


@functools.cache
def _rewritten(cls: type[nn.Module], sites: frozenset[tuple[Any, ...]]) -> type[nn.Module]:
    """The subclass of `cls` in which numbers stand at `sites`. One for all modules that need the same."""
    by_function: dict[tuple[str, ...], list[_Site]] = {}
    for functions, *site in sites:
        by_function.setdefault(functions, []).append(tuple(site))  # type: ignore[arg-type]
    methods: dict[str, Any] = {"_secateur_rewritten": (cls, sites), "__module__": cls.__module__, "__doc__": cls.__doc__}
    for functions, own in sorted(by_function.items()):
        function = _function(cls, functions)
        if function is None:
            raise ModelError(f"{cls.__name__} has no {'.'.join(functions)} to be rewritten. Its library has changed since.")
        made = _compiled(function, own)
        for i in range(len(functions) - 1, 0, -1):  # whoever calls it by its global name calls the rewritten one
            caller = methods.get(functions[0]) if i == 1 else None
            caller = caller or _function(cls, functions[:i])
            assert caller is not None
            made = _copied(caller, caller.__code__, {**caller.__globals__, functions[i]: made})
        methods[functions[0]] = made
    return type(cls.__name__, (cls,), methods)


def _function(cls: type, names: tuple[str, ...]) -> types.FunctionType | None:
    """The method ``names[0]`` of a class, or the function that it calls by the global name ``names[1]``, and so on."""
    found = getattr(cls, names[0], None)
    for name in names[1:]:
        if not isinstance(found, types.FunctionType):
            return None
        found = found.__globals__.get(name)
    return found if isinstance(found, types.FunctionType) else None


def _tree(code: types.CodeType) -> ast.FunctionDef | None:
    """The definition of a function as its source has it, with the places of the file."""
    try:
        lines, start = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, SyntaxError):  # typed at a prompt, or changed on disk since
        return None
    indent = len(lines[0]) - len(lines[0].lstrip())
    for node in ast.walk(tree):
        name = getattr(node, "id", getattr(node, "attr", ""))
        if name.startswith("__") and not name.endswith("__"):  # means another name inside of its class
            return None
        if isinstance(node, (ast.expr, ast.stmt, ast.arg, ast.keyword, ast.excepthandler)):
            node.lineno, node.col_offset = node.lineno + start - 1, node.col_offset + indent
            node.end_lineno, node.end_col_offset = (node.end_lineno or 0) + start - 1, (node.end_col_offset or 0) + indent
    return tree if isinstance(tree, ast.FunctionDef) else None


def _calls(tree: ast.FunctionDef | None) -> list[ast.Call | ast.BinOp]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Call, ast.BinOp))] if tree is not None else []


def _operands(node: ast.Call | ast.BinOp) -> list[ast.expr]:
    """Both sides of an operator; the sizes of ``x.view(a, b)`` or ``x.unflatten(d, (a, b))``; the argument of a function."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    last = node.args[-1] if node.args else None
    sizes = last.elts if isinstance(last, (ast.Tuple, ast.List)) else node.args
    wrong = isinstance(node.func, ast.Attribute) and node.func.attr == "unflatten" and sizes is node.args
    return [] if wrong or node.keywords or any(isinstance(a, ast.Starred) for a in sizes) else sizes


class _Numbers(ast.NodeTransformer):
    """Puts numbers in the place of expressions."""

    def __init__(self, numbers: dict[ast.expr, int]):
        self.numbers = numbers

    def visit(self, node: ast.AST) -> ast.AST:
        """A number instead of `node`, or `node` with all that is in it visited."""
        if isinstance(node, ast.expr) and node in self.numbers:
            return ast.copy_location(ast.parse(str(self.numbers[node]), mode="eval").body, node)
        return self.generic_visit(node)


def _compiled(function: types.FunctionType, sites: list[_Site]) -> types.FunctionType:
    tree = _tree(function.__code__)
    places = (
        {} if tree is None else {(c.lineno - tree.lineno, c.col_offset, ast.unparse(c)): _operands(c) for c in _calls(tree)}
    )
    numbers: dict[ast.expr, int] = {}
    for line, column, text, argument, value in sites:
        operands = places.get((line, column, text), [])
        if argument >= len(operands):
            raise ModelError(
                f"{text!r} is not in {function.__qualname__} any more. Its library has changed since the plan was made."
            )
        numbers[operands[argument]] = value
    assert tree is not None
    _Numbers(numbers).visit(tree)
    tree.decorator_list = []
    factory = ast.parse(f"def factory({', '.join(function.__code__.co_freevars)}): pass")
    factory.body[0].body = [tree]  # type: ignore[attr-defined]
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    code = compile(ast.fix_missing_locations(factory), function.__code__.co_filename, "exec", flags, dont_inherit=True)
    for _ in range(2):
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType))
    return _copied(function, code, function.__globals__)


def _copied(function: types.FunctionType, code: types.CodeType, names: dict[str, Any]) -> types.FunctionType:
    """`function` with other code and other globals, and all else alike."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    made = types.FunctionType(code, names, function.__name__, function.__defaults__, tuple(cells[n] for n in code.co_freevars))
    made.__kwdefaults__, made.__qualname__, made.__doc__ = function.__kwdefaults__, function.__qualname__, function.__doc__
    made.__annotations__, made.__module__ = function.__annotations__, function.__module__
    return made
