"""Mutants of a module: the module with one small mistake each, made from its syntax tree.

| kind | what it does |
|---|---|
| comparison | turns one around (``<`` to ``<=``, ``==`` to ``!=``, ``in`` to ``not in``, ``is`` to ``is not``) |
| constant | an integer one more and one less; True for False |
| condition | negates an ``if``, a ``while``, a conditional expression |
| and/or | swaps the two; leaves one side out |
| arithmetic | ``+`` for ``-``, ``&`` for ``|``, ``>>`` for ``<<``, and the other way round; drops a ``not``, a ``-``, a ``~`` |
| statement | leaves one out: a call, an assignment to a place, ``del``, ``raise``, ``return`` of nothing |
| return | returns 0 for a value, 1 for 0 |
| member | another member of the same enum, as far as the module names one: errnos, states, events, flags |
| table | leaves an entry of a dictionary or a set at module level out |

Left alone: docstrings and texts, asserts and what only they look at (they guard what never happens), annotations,
``__repr__`` and ``__str__``, ``if TYPE_CHECKING``, imports.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator

import attrs

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
#: Longer statements are not shown whole, but so many characters around the mistake.
_TEXT_MAX = 150
_CONTEXT = 50
_SKIPPED_FUNCTIONS = {"__repr__", "__str__"}


@attrs.frozen(kw_only=True)
class Mutant:
    """One mistake. ``module`` is the whole broken tree."""

    #: What it is in, as ``Class.method``; the module itself is "".
    where: str
    #: The statement, or its head, as it was and as it is now, on one line each.
    before: str
    after: str
    #: The lines of the statement that was changed; none for what runs when the module is imported.
    lines: range | None
    module: ast.Module

    def __str__(self) -> str:
        before, after = _difference(self.before, self.after)
        return f"{self.where or 'module'}: {before} -> {after}"


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its text. No two have the same text."""
    tree = ast.parse(source)
    found: dict[str, Mutant] = {}
    for place in _places(tree):
        for mutant in place.mutants():
            # Two in one statement that read alike are one.
            found.setdefault(f"{mutant.where} {mutant.before} {mutant.after} {mutant.lines}", mutant)
    return list(found.values())


def _difference(before: str, after: str) -> tuple[str, str]:
    """Both texts; of long ones only where they differ, with what stands around it."""
    if len(before) <= _TEXT_MAX:
        return before, after
    start = _alike(before, after)
    end = _alike(before[start:][::-1], after[start:][::-1])
    first = max(0, before.rfind(" ", 0, max(0, start - _CONTEXT)))
    head = before.split("=")[0].split(":")[0].strip() + " …" if first else ""
    last = max(0, end - _CONTEXT)
    return f"{head}{before[first : len(before) - last]}…", f"…{after[start : len(after) - last]}…"


def _alike(one: str, other: str) -> int:
    """How many characters the two have in common, from the first."""
    return next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


@attrs.frozen(kw_only=True)
class _Place:
    """A statement of the tree, and where it stands."""

    tree: ast.Module
    where: str
    in_function: bool
    #: From the module down: the field's name and the index in it.
    path: tuple[tuple[str, int], ...]

    def statement(self) -> ast.stmt:
        node: ast.AST = self.tree
        for field, index in self.path:
            node = getattr(node, field)[index]
        assert isinstance(node, ast.stmt)
        return node

    def mutants(self) -> Iterator[Mutant]:
        statement = self.statement()
        before = _text(statement)
        lines = range(statement.lineno, _head_end(statement) + 1) if self.in_function else None
        edits = 0
        while True:
            changed = copy.deepcopy(statement)
            editor = _Editor(edits, at_import=not self.in_function)
            editor.edit_head(changed)
            if not editor.done:
                break
            edits += 1
            if (after := _text(changed)) != before:
                yield Mutant(where=self.where, before=before, after=after, lines=lines, module=self._with(changed))
        if _removable(statement, in_function=self.in_function):
            nothing = ast.copy_location(ast.Pass(), statement)
            yield Mutant(where=self.where, before=before, after="pass", lines=lines, module=self._with(nothing))

    def _with(self, statement: ast.stmt) -> ast.Module:
        """The tree with another statement here. It shares all the rest with the original: there are hundreds of them."""
        tree = copy.copy(self.tree)
        node: ast.AST = tree
        for field, index in self.path[:-1]:
            inside = list(getattr(node, field))
            inside[index] = copy.copy(inside[index])
            setattr(node, field, inside)
            node = inside[index]
        field, index = self.path[-1]
        inside = list(getattr(node, field))
        inside[index] = ast.fix_missing_locations(statement)
        setattr(node, field, inside)
        return tree


def _text(statement: ast.stmt) -> str:
    """The statement on one line; of a compound one its head."""
    if hasattr(statement, "body"):
        bare = copy.copy(statement)
        for field in ("body", "orelse", "finalbody", "handlers"):
            if hasattr(bare, field):
                setattr(bare, field, [])
        return " ".join(ast.unparse(bare).split()).removesuffix(":")
    return " ".join(ast.unparse(statement).split())


def _head_end(statement: ast.stmt) -> int:
    body: list[ast.stmt] = getattr(statement, "body", [])
    if not body:
        return statement.end_lineno or statement.lineno
    return max(statement.lineno, body[0].lineno - 1)


def _places(tree: ast.Module) -> Iterator[_Place]:
    def walk(
        statements: list[ast.stmt], field: str, above: tuple[tuple[str, int], ...], where: str, in_function: bool
    ) -> Iterator[_Place]:
        for index, statement in enumerate(statements):
            path = (*above, (field, index))
            if _left_alone(statement):
                continue
            inner, inside = where, in_function
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{where}.{statement.name}".lstrip(".")
                inside = in_function or not isinstance(statement, ast.ClassDef)
            else:
                yield _Place(tree=tree, where=where, in_function=in_function, path=path)
            for name in ("body", "orelse", "finalbody"):
                yield from walk(getattr(statement, name, None) or [], name, path, inner, inside)
            for number, handler in enumerate(getattr(statement, "handlers", [])):
                yield from walk(handler.body, "body", (*path, ("handlers", number)), inner, inside)

    yield from walk(tree.body, "body", (), "", False)


def _left_alone(statement: ast.stmt) -> bool:
    match statement:
        case ast.Import() | ast.ImportFrom() | ast.Assert() | ast.Pass() | ast.Global() | ast.Nonlocal():
            return True
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.FunctionDef(name=name) if name in _SKIPPED_FUNCTIONS:
            return True
        case ast.Assign(targets=[ast.Name(id="__slots__")]):
            return True
        case ast.Assign(value=ast.Call(func=ast.Name(id="TypeVar"))):
            return True
        case ast.AnnAssign(value=None):
            return True
    return False


def _removable(statement: ast.stmt, *, in_function: bool) -> bool:
    """Whether it can be left out and the rest still means something: no name goes away that others use."""
    if not in_function:
        return False
    match statement:
        case ast.Expr(value=ast.Yield() | ast.YieldFrom()):
            # Without it a generator might be none any more.
            return False
        case ast.Expr() | ast.Raise() | ast.Delete() | ast.AugAssign() | ast.Break() | ast.Continue():
            return True
        case ast.Assign(targets=targets):
            return not any(isinstance(target, ast.Name | ast.Tuple) for target in targets)
        case ast.AnnAssign(target=target):
            return not isinstance(target, ast.Name)
        case ast.Return(value=value):
            return value is None
    return False


class _Editor:
    """Makes the edit with a given number in a statement's head, counting from 0 in a fixed order."""

    def __init__(self, number: int, *, at_import: bool) -> None:
        self._left = number
        self._at_import = at_import
        self.done = False

    def _now(self) -> bool:
        """Whether it is this edit's turn."""
        if self.done:
            return False
        self.done = self._left == 0
        self._left -= 1
        return self.done

    def edit_head(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.If | ast.While) and self._now():
            statement.test = _negated(statement.test)
        if isinstance(statement, ast.Return) and statement.value is not None:
            zero = isinstance(statement.value, ast.Constant) and statement.value.value == 0
            if not isinstance(statement.value, ast.Constant) and self._now():
                statement.value = ast.Constant(0)
            elif zero and self._now():
                statement.value = ast.Constant(1)
        for field, value in ast.iter_fields(statement):
            if field in (
                "body",
                "orelse",
                "finalbody",
                "handlers",
                "annotation",
                "target",
                "targets",
                "msg",
                "type_comment",
            ):
                if field in ("target", "targets"):
                    self._subscripts(value)
                continue
            if isinstance(value, ast.expr):
                setattr(statement, field, self._expression(value))
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, ast.withitem):
                        item.context_expr = self._expression(item.context_expr)

    def _subscripts(self, targets: ast.expr | list[ast.expr]) -> None:
        for target in targets if isinstance(targets, list) else [targets]:
            if isinstance(target, ast.Subscript):
                target.slice = self._expression(target.slice)

    def _expression(self, node: ast.expr) -> ast.expr:
        """The expression, edited if the edit's turn comes in it."""
        match node:
            case ast.Constant(value=bool(value)):
                if self._now():
                    return ast.Constant(not value)
            case ast.Constant(value=int(value)):
                for number in (value + 1, value - 1):
                    if self._now():
                        return ast.Constant(number)
            case ast.Compare(ops=[op], left=left, comparators=[right]):
                if type(op) in _COMPARISONS and self._now():
                    return ast.Compare(left, [_COMPARISONS[type(op)]()], [right])
            case ast.BoolOp(op=op, values=values):
                if self._now():
                    return ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
                for left_out in range(len(values)):
                    if self._now():
                        rest = values[:left_out] + values[left_out + 1 :]
                        return rest[0] if len(rest) == 1 else ast.BoolOp(op, rest)
            case ast.UnaryOp(operand=operand):
                if self._now():
                    return operand
            case ast.BinOp(op=op, left=left, right=right):
                if type(op) in _OPERATORS and self._now():
                    return ast.BinOp(left, _OPERATORS[type(op)](), right)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                if self._now():
                    return ast.IfExp(_negated(test), body, orelse)
            case ast.Attribute(value=ast.Name(id=owner), attr=name):
                if (other := _other_member(owner, name)) is not None and self._now():
                    return ast.Attribute(ast.Name(owner, ast.Load()), other, ast.Load())
            case ast.Dict(keys=keys) if self._at_import:
                for index in range(len(keys)):
                    if self._now():
                        return ast.Dict(
                            node.keys[:index] + node.keys[index + 1 :], node.values[:index] + node.values[index + 1 :]
                        )
            case ast.Set(elts=elements) if self._at_import and len(elements) > 1:
                for index in range(len(elements)):
                    if self._now():
                        return ast.Set(elements[:index] + elements[index + 1 :])
            case ast.JoinedStr():
                return node
        self._inside(node)
        return node

    def _inside(self, node: ast.AST) -> None:
        for field, value in ast.iter_fields(node):
            if isinstance(value, ast.expr):
                setattr(node, field, self._expression(value))
            elif isinstance(value, list):
                for index, item in enumerate(value):
                    if isinstance(item, ast.expr):
                        value[index] = self._expression(item)
                    elif isinstance(item, ast.keyword | ast.comprehension):
                        self._inside(item)


def _negated(test: ast.expr) -> ast.expr:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return test.operand
    return ast.UnaryOp(ast.Not(), test)


#: Another member for one that is named: of errno, and of the enums that the tested modules are about.
_MEMBERS = {
    "errno": ("EINVAL", "EBUSY", "ENODEV", "EIO"),
    "TagState": ("UNFETCHED", "FETCHING", "ANNOUNCED", "GETTING_DATA", "SERVING", "CLOSED", "LOST"),
    "TagEvent": ("FETCH", "GET_DATA", "COMMIT", "DELIVERED", "WRITE_ANNOUNCED", "ABORTED", "REFUSED", "RING_CLOSED"),
    "DeviceState": ("DEAD", "LIVE", "QUIESCED", "FAIL_IO"),
    "IoCommand": ("FETCH_REQ", "COMMIT_AND_FETCH_REQ", "NEED_GET_DATA", "REGISTER_IO_BUF", "UNREGISTER_IO_BUF"),
}


def _other_member(owner: str, name: str) -> str | None:
    members = _MEMBERS.get(owner)
    if members is None or not name.isupper():
        return None
    return members[(members.index(name) + 1) % len(members)] if name in members else members[0]
