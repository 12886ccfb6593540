"""Prints the house: rooms, arrows between rooms, circles of files and lines per file.

A room is a top-level file or a folder of src/fedvlm; deploy/nvflare is a room as well. An arrow is
a pair of rooms in which a file of the first imports a file of the second. Every import statement
counts: at the top of a file, inside a function, and under `if TYPE_CHECKING`. `from fedvlm import
config` is an import of config.py. An arrow that only TYPE_CHECKING needs is marked with (types).

    python scripts/house.py                          # this repository
    python scripts/house.py TREE                     # another checkout of it
    python scripts/house.py TREE --layers old.txt    # one layer a line, from the roof down

Without --layers, the layers are those of the import-linter contract in TREE's pyproject.toml. An
arrow points upwards when the second room lies in a higher layer than the first. `__init__.py` and
`__main__.py` lie above the roof.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "fedvlm"
OWN_ROOMS = ("nvflare",)  # folders inside a folder that are rooms
ABOVE = ("__init__", "__main__")  # rooms above the roof
MOST_LINES = 400


@dataclass(frozen=True)
class Import:
    """One import statement of a file of the package.

    Attributes:
        source: path of the importing file below the package.
        target: path of the imported file below the package.
        line: line number in ``source``.
        types: whether only a type checker executes the statement.
    """

    source: str
    target: str
    line: int
    types: bool


def files(tree: Path) -> dict[str, Path]:
    """Path below the package -> path on disk, of every Python file of a tree."""
    package = tree / "src" / PACKAGE
    if not package.is_dir():
        raise SystemExit(f"'{package}' is no folder: give the root of a checkout of {PACKAGE}")
    return {path.relative_to(package).as_posix(): path for path in sorted(package.rglob("*.py"))}


def room(file: str) -> str:
    """The room of a file, both as a path below the package."""
    *folders, name = file.split("/")
    if not folders:
        return name.removesuffix(".py")
    return "/".join(folders[:2]) if folders[1:2] and folders[1] in OWN_ROOMS else folders[0]


def rooms(tree: Path) -> list[str]:
    """All rooms of a tree; a folder without Python files counts."""
    package = tree / "src" / PACKAGE
    folders = {path.name for path in package.iterdir() if path.is_dir()} - {"__pycache__"}
    return sorted(folders | {room(file) for file in files(tree)})


def imports(tree: Path) -> list[Import]:
    """Every import of one file of the package by another."""
    paths = files(tree)
    modules = {_module(file): file for file in paths}
    found = []
    for file, path in paths.items():
        parsed = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for node, types in _statements(parsed, types=False):
            targets = {modules[name] for name in _names(node, file, modules)} - {file}
            found += [Import(file, target, node.lineno, types) for target in sorted(targets)]
    return found


def _module(file: str) -> str:
    dotted = file.removesuffix(".py").replace("/", ".")
    return f"{PACKAGE}.{dotted}".removesuffix(".__init__")


def _statements(node: ast.AST, types: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The import statements below a node, each with whether only a type checker executes it."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, types
    elif isinstance(node, ast.If):
        guarded = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in node.body:
            yield from _statements(child, types or guarded)
        for child in node.orelse:
            yield from _statements(child, types)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _statements(child, types)


def _names(
    node: ast.Import | ast.ImportFrom, file: str, modules: Mapping[str, str]
) -> Iterator[str]:
    """The modules of the package that a statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
        return
    home = node.module or ""
    if node.level:
        folder = [PACKAGE, *file.split("/")[:-1]]
        home = ".".join([*folder[: len(folder) - node.level + 1], *filter(None, [node.module])])
    for alias in node.names:
        name = f"{home}.{alias.name}"
        if name in modules:
            yield name
        elif home in modules:
            yield home


def arrows(found: Sequence[Import]) -> dict[tuple[str, str], bool]:
    """(room, imported room) -> whether only a type checker needs the arrow."""
    seen: dict[tuple[str, str], bool] = {}
    for one in found:
        pair = room(one.source), room(one.target)
        if pair[0] != pair[1]:
            seen[pair] = seen.get(pair, True) and one.types
    return dict(sorted(seen.items()))


def upward(found: Sequence[Import], layers: Sequence[Sequence[str]]) -> list[Import]:
    """The imports of a room in a higher layer.

    Args:
        found: all imports.
        layers: the rooms of each layer, from the roof down.
    """
    return [one for one in found if _height(one.source, layers) > _height(one.target, layers)]


def _height(file: str, layers: Sequence[Sequence[str]]) -> int:
    """The number of a file's layer, counted from the roof; -1 above the roof."""
    place = room(file)
    if place in ABOVE:
        return -1
    for name in (place, place.split("/")[0]):
        for number, layer in enumerate(layers):
            if name in layer:
                return number
    raise SystemExit(f"the room '{place}' is in no layer: add it to the list of layers")


def circles(found: Sequence[Import]) -> list[list[str]]:
    """Groups of files that import one another in a circle, the largest first.

    These are the strongly connected components of more than one file (Tarjan, 1972).
    """
    graph: dict[str, set[str]] = {}
    for one in found:
        graph.setdefault(one.source, set()).add(one.target)
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(file: str) -> None:
        number[file] = lowest[file] = len(number)
        stack.append(file)
        for target in sorted(graph.get(file, ())):
            if target not in number:
                visit(target)
                lowest[file] = min(lowest[file], lowest[target])
            elif target in stack:
                lowest[file] = min(lowest[file], number[target])
        if lowest[file] == number[file]:
            at = stack.index(file)
            groups.append(sorted(stack[at:]))
            del stack[at:]

    for file in sorted(graph):
        if file not in number:
            visit(file)
    return sorted((g for g in groups if len(g) > 1), key=lambda group: (-len(group), group))


def lines(tree: Path) -> dict[str, int]:
    """Path below the package -> number of lines."""
    return {file: len(path.read_bytes().splitlines()) for file, path in files(tree).items()}


def read_layers(file: Path) -> list[list[str]]:
    """The layers of a text file (one a line) or of the contract in a ``pyproject.toml``.

    Returns:
        The rooms of each layer, from the roof down.
    """
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if file.suffix != ".toml":
        listed = [line for line in text.splitlines() if not line.startswith("#")]
    else:
        linter = tomllib.loads(text).get("tool", {}).get("importlinter", {})
        contracts = [c for c in linter.get("contracts", []) if c["type"] == "layers"]
        listed = contracts[0]["layers"] if contracts else []
    layers = [line.replace(":", " ").replace("|", " ").split() for line in listed]
    if not any(layers):
        raise SystemExit(f"'{file}' lists no layers: give a file with --layers, one layer a line")
    return [[name.replace(".", "/") for name in layer] for layer in layers if layer]


def report(tree: Path, layers: Sequence[Sequence[str]]) -> str:
    """The whole text that the script prints."""
    found = imports(tree)
    between, wrong, closed = arrows(found), upward(found, layers), circles(found)
    wrong_arrows = arrows(wrong)
    sizes = lines(tree)
    longest = max(sizes, key=lambda file: sizes[file])
    long = [file for file, count in sizes.items() if count > MOST_LINES]
    parts = [
        f"rooms: {len(rooms(tree))}",
        f"arrows: {len(between)}, of which {sum(between.values())} for types only",
        *(f"  {place} -> {_targets(place, between)}" for place in rooms(tree)),
        f"upward: {len(wrong_arrows)} arrows, {len(wrong)} imports",
        *(f"  {_shown(one)}" for one in wrong),
        f"circles: {len(closed)}",
        *(f"  {len(group)} files: {', '.join(group)}" for group in closed),
        f"files: {len(sizes)}, lines: {sum(sizes.values())}, "
        f"median {statistics.median(sizes.values()):g}, longest {sizes[longest]} ({longest}), "
        f"above {MOST_LINES}: {len(long)}",
    ]
    return "\n".join(parts)


def _targets(place: str, between: Mapping[tuple[str, str], bool]) -> str:
    names = [_marked(to, types) for (source, to), types in between.items() if source == place]
    return ", ".join(names) or "nothing"


def _shown(one: Import) -> str:
    arrow = f"{room(one.source)} -> {room(one.target)}"
    return f"{arrow}: {one.source}:{one.line} imports {_marked(one.target, one.types)}"


def _marked(name: str, types: bool) -> str:
    return f"{name} (types)" if types else name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tree", nargs="?", type=Path, default=ROOT, help="root of a checkout")
    parser.add_argument("--layers", type=Path, help="file with one layer a line")
    asked = parser.parse_args()
    print(report(asked.tree, read_layers(asked.layers or asked.tree / "pyproject.toml")))


if __name__ == "__main__":
    main()
