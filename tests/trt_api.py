"""Compares calls into TensorRT, found in source code, with what a version of NVIDIA's bindings has.

    api = describe("11.4.0.106")         every class with its members and pybind's signatures
    report = check(source, api, others)  report.problems, one sentence each; report.seen, what was compared

The class of an object is inferred: from annotations (`engine: trt.ICudaEngine`), from constructors, and from the
signatures' return types. Anything named `trt` or `_trt` is the module, `trtp` is tensorrt.plugin.
"""
from __future__ import annotations

import ast
import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from trt_bindings import run_with

_DESCRIBE = """
import dis, json, tensorrt
def members(owner, depth):
    # What a class of tensorrt.plugin, which is Python, gives its objects; pybind's have no code to look into.
    code = getattr(owner.__dict__.get("__init__"), "__code__", None)
    given = [step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"] if code else ()
    found = {name: {"kind": "property", "writable": True, "doc": ""} for name in given}
    for name in dir(owner):
        if name.startswith("_") and name not in ("__init__", "__version__"):
            continue
        value = getattr(owner, name)
        if isinstance(value, type) and depth:
            found[name] = {"kind": "class", "members": members(value, depth - 1)}
        elif isinstance(value, property):
            doc = getattr(value.fget, "__doc__", None)
            found[name] = {"kind": "property", "writable": value.fset is not None, "doc": doc or ""}
        elif callable(value) and not hasattr(type(value), "__members__"):
            found[name] = {"kind": "method", "doc": value.__doc__ or ""}
        else:
            found[name] = {"kind": "value"}
    return found
import tensorrt.plugin
print(json.dumps({**members(tensorrt, 2), "plugin": {"kind": "class", "members": members(tensorrt.plugin, 1)}}))
"""


@functools.cache
def describe(version: str) -> dict:
    """{name: {"kind", ...}} of the module; skips the test where the bindings cannot be had."""
    return json.loads(run_with(version, _DESCRIBE).splitlines()[-1])  # before it, TensorRT may talk of its registry


class Kind(NamedTuple):
    """What an expression is: "module", "class", "object", "list" (of `name`) or "method" (of class `name`)."""

    what: str
    name: str = ""
    member: str = ""


MODULE = Kind("module", "trt")
MODULES = {"trt": MODULE, "_trt": MODULE, "trtp": Kind("class", "plugin")}
# Names that objects of other libraries have too, so that they say nothing about the class.
_COMMON = {name for owner in (torch.Tensor, Path, str, list, dict, torch.cuda.Stream) for name in dir(owner)} | {"path"}


@dataclass
class Report:
    problems: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)


def check(source: str, api: dict, others: list[dict] = ()) -> Report:
    """`others`: versions in one of which a name must be that a `hasattr` guards."""
    return _Checker(ast.parse(source), api, others).report


class _Checker:
    def __init__(self, tree: ast.Module, api: dict, others):
        self.api, self.others, self.report = api, others, Report()
        self.guarded: set[str] = set()
        self.vocabulary = {
            name for entry in api.values() if entry["kind"] == "class" for name in entry["members"] if "_" in name
        } - _COMMON - {"__init__"}  # fmt: skip
        self.attributes: dict[str, tuple[Kind, ...]] = {}
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        self.returns = {node.name: self.annotated(node.returns) for node in functions}
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
                kind = self.annotated(node.annotation)
                if kind:
                    self.attributes[node.target.attr] = kind
        self.block(tree.body, {})

    def annotated(self, node: ast.AST | None) -> tuple[Kind, ...]:
        """The classes that an annotation names: `trt.X`, `trt.X | trt.Y`, `trt.X | None`, `list[trt.X]`."""
        if isinstance(node, ast.BinOp):
            return self.annotated(node.left) + self.annotated(node.right)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "list":
            return tuple(Kind("list", kind.name) for kind in self.annotated(node.slice))
        if isinstance(node, ast.Attribute):
            modules = {name: (kind,) for name, kind in MODULES.items()}
            return tuple(Kind("object", kind.name) for kind in self.infer(node, modules) if kind.name)
        return ()

    # Statements

    def block(self, statements: list[ast.stmt], scope: dict) -> None:
        for statement in statements:
            self.statement(statement, scope)

    def statement(self, node: ast.stmt, scope: dict) -> None:
        if isinstance(node, ast.FunctionDef):
            inner = dict(scope)
            for argument in (*node.args.args, *node.args.kwonlyargs):
                self.bind(ast.Name(argument.arg), self.annotated(argument.annotation), inner)
            self.block(node.body, inner)
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                self.infer(base, scope)
            self.block(node.body, dict(scope))
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self.assign(target, node.value, scope)
            self.infer(node.value, scope)
        elif isinstance(node, ast.If):
            self.infer(node.test, scope)
            guards = set(self.guards(node.test))
            self.guarded |= guards
            self.block(node.body, scope)
            self.guarded -= guards
            self.block(node.orelse, scope)
        else:
            if isinstance(node, ast.For):
                self.bind(node.target, tuple(Kind("object", k.name) for k in self.infer(node.iter, scope)), scope)
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    self.statement(child, scope)
                elif isinstance(child, ast.excepthandler):
                    self.block(child.body, scope)
                else:
                    self.infer(child.context_expr if isinstance(child, ast.withitem) else child, scope)

    def assign(self, target: ast.expr, value: ast.expr, scope: dict) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=True):
                self.assign(one, its, scope)
            return
        self.bind(target, self.infer(value, scope), scope)
        if isinstance(target, ast.Attribute):
            for owner in self.infer(target.value, scope):
                entry = self.member(owner, target.attr, target)
                if entry and not entry.get("writable"):
                    self.problem(target, f"{owner.name}.{target.attr} cannot be set")

    def bind(self, target: ast.expr, kinds: tuple[Kind, ...], scope: dict) -> None:
        if isinstance(target, ast.Name):
            scope[target.id] = (MODULES[target.id],) if target.id in MODULES else kinds

    def guards(self, test: ast.expr):
        """ "trt.X.Y" for each hasattr(trt.X, "Y")."""
        for node in ast.walk(test):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
                if isinstance(node.args[1], ast.Constant):
                    yield f"{ast.unparse(node.args[0])}.{node.args[1].value}"

    # Expressions

    def infer(self, node: ast.AST, scope: dict) -> tuple[Kind, ...]:
        """What `node` may be; everything inside it is compared on the way."""
        if isinstance(node, ast.Name):
            return scope.get(node.id, ())
        if isinstance(node, ast.Attribute):
            return self.attribute(node, scope)
        if isinstance(node, ast.Call):
            return self.call(node, scope)
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp):
            inner = dict(scope)
            for loop in node.generators:
                self.bind(loop.target, tuple(Kind("object", k.name) for k in self.infer(loop.iter, inner)), inner)
                for test in loop.ifs:
                    self.infer(test, inner)
            parts = (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)
            found = [self.infer(part, inner) for part in parts][-1]
            return tuple(Kind("list", kind.name) for kind in found)
        for child in ast.iter_child_nodes(node):
            self.infer(child, scope)
        return ()

    def attribute(self, node: ast.Attribute, scope: dict) -> tuple[Kind, ...]:
        if node.attr in MODULES:
            return (MODULES[node.attr],)
        owners = self.infer(node.value, scope)
        if not owners:
            if node.attr in self.attributes:
                return self.attributes[node.attr]
            if node.attr in self.vocabulary and isinstance(node.ctx, ast.Load):
                self.problem(node, f"the class of {ast.unparse(node.value)!r} is not known; annotate it")
            return ()
        found = []
        for owner in owners:
            entry = self.member(owner, node.attr, node)
            if entry is None:
                continue
            if entry["kind"] == "class":
                found.append(Kind("class", node.attr if owner == MODULE else f"{owner.name}.{node.attr}"))
            elif entry["kind"] == "method":
                found.append(Kind("method", owner.name, f"{owner.what}.{node.attr}"))
            elif entry["kind"] == "property":
                found.extend(self.returned(re.search(r"-> (.+)", entry["doc"])))
        return tuple(found)

    def member(self, owner: Kind, name: str, node: ast.AST) -> dict | None:
        if owner.what not in ("module", "class", "object"):
            return None
        entry = _members(self.api, owner).get(name)
        if entry is not None:
            self.report.seen.add(f"{owner.name}.{name}")
        elif ast.unparse(node) not in self.guarded:
            self.problem(node, f"{owner.name} has no {name}")
        elif not any(name in _members(other, owner) for other in self.others):
            self.problem(node, f"{owner.name} has no {name} in any version, guarded or not")
        return entry

    def call(self, node: ast.Call, scope: dict) -> tuple[Kind, ...]:
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.infer(argument.value if isinstance(argument, ast.Starred) else argument, scope)
        targets = self.infer(node.func, scope)
        if not targets:  # a function or method of this file, or of no concern
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            return self.returns.get(name, ())
        found = []
        for target in targets:
            if target.what == "class":
                self.arguments(node, target.name, "__init__", bound=True)
                found.append(Kind("object", target.name))
            elif target.what == "method":
                how, _, method = target.member.partition(".")
                signatures = self.arguments(node, target.name, method, bound=how == "object")
                found.extend(kind for signature in signatures[:1] for kind in self.returned(signature))
        return tuple(found)

    def returned(self, signature: re.Match | None) -> list[Kind]:
        """The class that a signature's return annotation names."""
        told = signature[signature.lastindex].strip() if signature else ""
        name = re.sub(r"^I(?=ParserError$)", "", re.split(r"[.:]", told.rstrip("]"))[-1])
        inside = "list" if told.lower().startswith("list[") else "object"
        return [Kind(inside, name)] if self.api.get(name, {}).get("kind") == "class" else []

    def arguments(self, node: ast.Call, owner: str, method: str, *, bound: bool) -> list[re.Match]:
        """Compares a call with the signatures; returns those that take it."""
        entry = _members(self.api, Kind("class", owner)).get(method, {"doc": ""})
        pattern = rf"^(?:\d+\. )?{method}\((.*)\) -> (.+)$"
        signatures = list(re.finditer(pattern, entry["doc"], re.M))
        if any(isinstance(one, ast.Starred) for one in node.args) or any(one.arg is None for one in node.keywords):
            self.problem(node, f"{owner}.{method} is called with * or **, which cannot be compared")
            return []
        if not signatures:
            return []
        keywords = {keyword.arg for keyword in node.keywords}
        fitting = [one for one in signatures if _takes(one[1], len(node.args) - (not bound), keywords)]
        if not fitting:
            told = " or ".join(one[0] for one in signatures)
            self.problem(node, f"{owner}.{method} does not take these arguments: {told}")
        self.report.seen.add(f"{owner}.{method}()")
        return fitting

    def problem(self, node: ast.AST, message: str) -> None:
        self.report.problems.append(f"line {node.lineno}, {ast.unparse(node)}: {message}")


def _members(api: dict, owner: Kind) -> dict:
    found = api
    for name in () if owner.what == "module" else owner.name.split("."):
        found = found.get(name, {}).get("members", {})
    return found


def _takes(parameters: str, positional: int, keywords: set[str]) -> bool:
    """Whether pybind's "self: X, a: int, b: str = None" takes so many positional arguments and these keywords."""
    pieces, depth, start = [], 0, 0
    for index, letter in enumerate(parameters):
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and depth == 0:
            pieces.append(parameters[start:index])
            start = index + 1
    pieces.append(parameters[start:])
    after_self = [piece.strip() for piece in pieces][1:]
    names = [piece.partition(":")[0] for piece in after_self]
    required = {piece.partition(":")[0] for piece in after_self if "=" not in piece}
    rest = set(names[positional:])
    return 0 <= positional <= len(names) and keywords <= rest and required & rest <= keywords
