"""The API reference: one Markdown page a module, from the sources alone (nothing is imported, nothing mocked).

Docstrings here are plain prose. They are read as Markdown, with three habits of this package on top: lines
`name: text` of a parameter become a list, indented blocks are code, and `name` in backticks links to that name.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

CODE = re.compile(r"(`[^`\n]+`)")
EMPHASIS = re.compile(r"(?<![\w*])\*([A-Za-z][A-Za-z .'-]*[A-Za-z])\*(?![\w*])")
NEXT = re.compile(r"(?<=[.;]) (?=(\w+(?:, \w+)*): )")  # before a parameter in the middle of a line
PAGE = re.compile(r"\bdocs/([\w-]+\.md)\b")
KEPT = "\ue000"  # stands for an asterisk that stays one


@dataclass(frozen=True)
class Name:
    """A public name: a function, a class with its members, or a constant."""

    name: str
    kind: str  # function, class, method, property or data
    signature: str
    doc: str
    parameters: frozenset[str] = frozenset()
    members: tuple[Name, ...] = ()


@dataclass(frozen=True)
class Module:
    """A module's docstring and public names, in the order of the source."""

    name: str
    doc: str
    names: tuple[Name, ...]
    exports: tuple[str, ...] = field(default=())  # full names of what `__init__` hands on

    def every_name(self) -> list[str]:
        """Public names and, behind a dot, those of their members."""
        inside = [f"{item.name}.{member.name}" for item in self.names for member in item.members]
        return [*(item.name for item in self.names), *inside]


@cache
def modules(source: Path) -> list[Module]:
    """Every module below `source` (a package's folder) whose name does not begin with an underscore."""
    found = []
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source.parent).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            found.append(read_module(".".join(parts), path.read_text(encoding="utf-8")))
    return found


def read_module(name: str, text: str) -> Module:
    """The module that this source text is."""
    tree = ast.parse(text)
    tree = Annotations(name, tree).visit(tree)
    names, lines = [], text.splitlines()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.append(read_function(node, "function"))
        elif isinstance(node, ast.ClassDef):
            names.append(read_class(node))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names += read_constant(node, lines)
    unique = {item.name: item for item in names if not item.name.startswith("_")}
    exports = [
        f"{node.module}.{alias.name}"
        for block in tree.body
        for node in (block.body if isinstance(block, ast.If) else [block])
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("companion.")
        for alias in node.names
        if alias.asname == alias.name  # `import x as x` is how a package says that it hands x on
    ]
    return Module(name, ast.get_docstring(tree) or "", tuple(unique.values()), tuple(exports))


class Annotations(ast.NodeTransformer):
    """Writes the full names of this package's classes into annotations, so that each leads to its own page."""

    def __init__(self, module: str, tree: ast.Module):
        self.full = {node.name: f"{module}.{node.name}" for node in tree.body if isinstance(node, ast.ClassDef)}
        inner = [node for block in tree.body if isinstance(block, ast.If) for node in block.body]  # TYPE_CHECKING
        for node in [*tree.body, *inner]:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("companion"):
                self.full |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        self.inside = False

    def annotated(self, node: ast.expr | None) -> ast.expr | None:
        if node is None:
            return None
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        self.inside = True
        node = self.visit(node)
        self.inside = False
        return node

    def visit_Name(self, node):
        full = self.full.get(node.id) if self.inside else None
        return ast.Name(full) if full else node  # a dotted name will do: it is only written out again

    def visit_arg(self, node):
        node.annotation = self.annotated(node.annotation)
        return node

    def visit_AnnAssign(self, node):
        node.annotation = self.annotated(node.annotation)
        return node

    def visit_FunctionDef(self, node):
        self.visit(node.args)  # not the body, which has no part in the reference
        node.returns = self.annotated(node.returns)
        return node

    visit_AsyncFunctionDef = visit_FunctionDef


def read_function(node: ast.FunctionDef | ast.AsyncFunctionDef, kind: str) -> Name:
    arguments = node.args
    if kind == "method" and "staticmethod" not in decorators(node):
        arguments = copy.deepcopy(arguments)
        (arguments.posonlyargs or arguments.args).pop(0)
    signature = f"({ast.unparse(arguments)})"
    if node.returns is not None:
        signature += f" -> {ast.unparse(node.returns)}"
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return Name(node.name, kind, signature, ast.get_docstring(node) or "", frozenset(a.arg for a in every if a))


def read_class(node: ast.ClassDef) -> Name:
    members, fields, start = [], [], None
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            start = read_function(item, "method")
        elif isinstance(item, ast.FunctionDef) and not item.name.startswith("_") and ast.get_docstring(item):
            is_property = decorators(item) & {"property", "cached_property"}
            members.append(read_function(item, "property" if is_property else "method"))
        elif isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation):
            fields.append(item)
    public = [item for item in fields if not ast.unparse(item.target).startswith("_")]
    signature = f"({', '.join(map(field_text, public))})" if public else ""
    if start is not None:
        signature = start.signature.split(" -> ")[0]
    inside = frozenset(ast.unparse(f.target) for f in public) | (start.parameters if start else frozenset())
    doc = ast.get_docstring(node) or (start.doc if start else "")
    return Name(node.name, "class", signature, doc, inside, tuple(members))


def field_text(item: ast.AnnAssign) -> str:
    """A dataclass field as a parameter; what `param()` and `field()` say of it stays out."""
    text = f"{ast.unparse(item.target)}: {ast.unparse(item.annotation)}"
    if item.value is None:
        return text
    call = item.value if isinstance(item.value, ast.Call) else None
    maker = ast.unparse(call.func) if call else ""
    if maker == "param" and call.args:
        return f"{text} = {ast.unparse(call.args[0])}"
    if maker == "field":
        default = [k.value for k in call.keywords if k.arg == "default"]
        return f"{text} = {ast.unparse(default[0]) if default else '...'}"
    return f"{text} = {ast.unparse(item.value)}"


def read_constant(node: ast.Assign | ast.AnnAssign, lines: list[str]) -> list[Name]:
    """Constants in capitals, with the comment that stands behind or above them."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = [t.id for t in targets if isinstance(t, ast.Name) and t.id.isupper()]
    value = ast.unparse(node.value) if node.value is not None else ""
    behind = re.search(r"\s# (?!noqa|type:|pyright)(.*)$", lines[node.lineno - 1])
    above, i = [], node.lineno - 2
    while i >= 0 and lines[i].startswith("# "):
        above.insert(0, lines[i][2:])
        i -= 1
    doc = behind[1] if behind else "\n".join(above)
    return [Name(name, "data", f" = {value}" if value and len(value) <= 70 else "", doc) for name in names]


def decorators(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> set[str]:
    return {ast.unparse(d.func if isinstance(d, ast.Call) else d).split(".")[-1] for d in node.decorator_list}


class Links:
    """Where a name in backticks leads: to the same module first, else to the only module that has it."""

    def __init__(self, found: list[Module]):
        self.homes = {f"{m.name}.{n.name}" for m in found for n in m.names} | {m.name for m in found}
        count = Counter(n.name for m in found for n in m.names)
        self.unique = {n.name: f"{m.name}.{n.name}" for m in found for n in m.names if count[n.name] == 1}

    def __call__(self, code: str, module: str) -> str:
        name = code.strip("`").removesuffix("()")
        for full in (f"{module}.{name}", name, f"companion.{name}", self.unique.get(name, "")):
            if full in self.homes:
                return f"{{py:obj}}`{name} <{full}>`"
        return code


def markdown(doc: str, module: str, links: Links, parameters: frozenset[str] = frozenset()) -> str:
    """A docstring as Markdown."""
    out: list[str] = []
    lines = inspect.cleandoc(spread(doc, parameters)).splitlines()
    i = 0
    while i < len(lines):
        begins = lines[i].startswith("    ") and (not out or out[-1] == "")
        if begins:
            j = i
            while j < len(lines) and (lines[j].startswith("    ") or not lines[j].strip()):
                j += 1
            block = inspect.cleandoc("\n".join(lines[i:j]))
            out += [f"```{'python' if is_python(block) else 'text'}", block, "```", ""]
            i = j
            continue
        line = lines[i].strip() if not lines[i].lstrip().startswith("- ") else lines[i]
        given = re.match(r"(\*{0,2}\w+(?:, \w+)*): ", line)
        names = given[1].replace("*", "").split(", ") if given else []
        if names and all(name in parameters for name in names):
            rest = prose(line[len(given[0]) :], module, links)
            out.append(f"- {', '.join(f'`{name}`' for name in names)}: {rest}")
        else:
            indent = re.match(r" *", line)[0]
            out.append(indent + prose(line.strip(), module, links))
        i += 1
    return "\n".join(out)


def spread(doc: str, parameters: frozenset[str]) -> str:
    """The docstring with a line for each parameter, where several share one, and a paragraph for what is raised."""

    def own(match: re.Match) -> str:
        return "\n" if set(match[1].split(", ")) <= parameters else " "

    out = []
    for line in doc.splitlines():
        begin = re.match(r" *", line)[0]
        line = NEXT.sub(own, line).replace("\n", f"\n{begin}")
        out.append(re.sub(r"(?:^ *|(?<=\.) )(?=Raises [A-Z])", f"\n\n{begin}", line))
    return "\n".join(out)


def prose(line: str, module: str, links: Links) -> str:
    """A line with what Markdown would take for markup escaped, except emphasis, tables and code."""
    parts = CODE.split(line)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = links(part, module)
        else:
            part = EMPHASIS.sub(rf"{KEPT}\1{KEPT}", part)
            part = part.replace("&", "&amp;").replace("<", "&lt;").replace("*", r"\*").replace("$", r"\$")
            part = re.sub(r"^([>#+])", r"\\\1", part).replace(KEPT, "*")
            parts[i] = PAGE.sub(r"[docs/\1](../\1)", part)
    return "".join(parts)


def is_python(block: str) -> bool:
    try:
        return any(not isinstance(node, ast.Expr) or "(" in block for node in ast.parse(block).body)
    except SyntaxError:
        return False


def page(module: Module, links: Links) -> str:
    """The page of a module."""
    lines = [f"# {module.name}", "", f"```{{py:module}} {module.name}", "```", ""]
    lines += [markdown(module.doc, module.name, links), ""]
    for full in sorted(module.exports):
        lines.append(f"- {{py:obj}}`{full.split('.')[-1]} <{full}>`")
    for item in module.names:
        lines += entry(item, module.name, links)
    return "\n".join(lines) + "\n"


def entry(item: Name, module: str, links: Links, fence: str = "::::") -> list[str]:
    """A name as a directive of Sphinx' Python domain, its members inside."""
    value = item.signature if item.kind not in ("data", "property") else ""
    lines = ["", f"{fence}{{py:{item.kind}}} {item.name}{value}"]
    if item.kind == "data" and item.signature:
        lines.append(f":value: {json.dumps(item.signature[3:])}")
    if item.kind == "property" and "->" in item.signature:
        lines.append(f":type: {json.dumps(item.signature.split('-> ')[1])}")
    lines += ["", markdown(item.doc, module, links, item.parameters)]
    for member in item.members:
        lines += entry(member, module, links, fence[:-1])
    return [*lines, fence]


def pages(source: Path) -> Iterator[tuple[str, str]]:
    """(file name, text) of every module's page and of their index."""
    found = modules(source)
    links = Links(found)
    for module in found:
        yield f"{module.name}.md", page(module, links)
    yield "index.md", index(found)


def index(found: list[Module]) -> str:
    """The table of all modules, room by room."""
    lines = [
        "# API reference",
        "",
        "Every public name, from the docstrings. `import companion as c` gives the names that",
    ]
    lines += ["[companion](companion.md) lists; all others come from the modules below."]
    rooms: dict[str, list[Module]] = {}
    for module in found:
        rooms.setdefault(".".join(module.name.split(".")[:2]), []).append(module)
    for room, members in rooms.items():
        lines += ["", f"## {room}", ""]
        for module in members:
            first = module.doc.split("\n\n")[0].replace("\n", " ").strip()
            said = prose(first, module.name, Links([])).replace("|", r"\|")
            lines.append(f"- [{module.name}]({module.name}.md): {said}")
    toc = "\n".join(module.name for module in found)
    return "\n".join(lines) + f"\n\n```{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{toc}\n```\n"
