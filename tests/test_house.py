"""The layers and the map match CONTRIBUTING.md, and scripts/house.py counts correctly."""

from __future__ import annotations

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import house

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TREE = {
    "__init__.py": "def load():\n    from fedvlm.roof.door import open_door\n",
    "roof/__init__.py": "",
    "roof/door.py": "from fedvlm.walls import brick\nfrom .key import turn\n",
    "roof/key.py": "import fedvlm.ground\nfrom fedvlm.roof import door\n",
    "walls/__init__.py": "",
    "walls/brick.py": """
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedvlm.ground import Sand
else:
    import fedvlm.walls.clay
""",
    "walls/clay.py": "def bake():\n    from fedvlm.roof.key import turn\n",
    "walls/nvflare/__init__.py": "from ..brick import lay\n",
    "ground.py": "import os\n",
    "assets/picture.txt": "",
}
LAYERS = [["roof"], ["walls"], ["ground"]]


@pytest.fixture
def tree(tmp_path):
    for name, text in TREE.items():
        path = tmp_path / "src" / "fedvlm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_rooms_are_top_level_files_and_folders_and_the_nvflare_folder(tree):
    assert house.rooms(tree) == ["__init__", "assets", "ground", "roof", "walls", "walls/nvflare"]


def test_arrows_include_imports_in_functions_and_mark_imports_for_types(tree):
    assert house.arrows(house.imports(tree)) == {
        ("__init__", "roof"): False,
        ("roof", "ground"): False,
        ("roof", "walls"): False,
        ("walls", "ground"): True,
        ("walls", "roof"): False,
        ("walls/nvflare", "walls"): False,
    }


def test_an_arrow_is_for_types_only_until_one_real_import_needs_it(tree):
    (tree / "src/fedvlm/walls/clay.py").write_text("import fedvlm.ground\n")
    assert house.arrows(house.imports(tree))["walls", "ground"] is False


def test_upward_imports_are_found_with_file_and_line(tree):
    wrong = house.upward(house.imports(tree), LAYERS)
    assert wrong == [house.Import("walls/clay.py", "roof/key.py", 2, types=False)]


def test_an_import_of_the_package_itself_points_upwards(tree):
    (tree / "src/fedvlm/ground.py").write_text("import fedvlm\n")
    wrong = house.upward(house.imports(tree), LAYERS)
    assert house.Import("ground.py", "__init__.py", 1, types=False) in wrong


def test_a_room_without_a_layer_is_refused(tree):
    with pytest.raises(SystemExit, match="room 'ground' is in no layer"):
        house.upward(house.imports(tree), LAYERS[:2])


def test_circles_are_the_strongly_connected_files_the_largest_first(tree):
    assert house.circles(house.imports(tree)) == [
        ["roof/door.py", "roof/key.py", "walls/brick.py", "walls/clay.py"]
    ]
    (tree / "src/fedvlm/walls/brick.py").write_text("import fedvlm.walls.nvflare\n")
    assert house.circles(house.imports(tree)) == [
        ["roof/door.py", "roof/key.py"],
        ["walls/brick.py", "walls/nvflare/__init__.py"],
    ]


def test_the_report_counts_rooms_arrows_circles_and_lines(tree):
    (tree / "src/fedvlm/ground.py").write_text("\n" * 401)
    text = house.report(tree, LAYERS)
    assert "rooms: 6\n" in text
    assert "arrows: 6, of which 1 for types only\n" in text
    assert "  walls -> ground (types), roof\n" in text
    assert "upward: 1 arrows, 1 imports\n" in text
    assert "circles: 1\n  4 files: roof/door.py, " in text
    assert "files: 9, lines: 417, median 2, longest 401 (ground.py), above 400: 1" in text


def test_layers_are_read_from_a_list_and_from_the_contract_of_import_linter(tmp_path):
    listed = tmp_path / "layers.txt"
    listed.write_text("# from the roof down\nroof\nwalls/nvflare walls\nground\n")
    assert house.read_layers(listed) == [["roof"], ["walls/nvflare", "walls"], ["ground"]]
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[[tool.importlinter.contracts]]\ntype = "forbidden"\n'
        '[[tool.importlinter.contracts]]\ntype = "layers"\n'
        'layers = ["roof", "walls.nvflare : walls", "ground"]\n'
    )
    assert house.read_layers(project) == house.read_layers(listed)
    with pytest.raises(SystemExit, match=r"none.toml' lists no layers: give a file with --layers"):
        house.read_layers(tmp_path / "none.toml")


def section(title):
    """The text of CONTRIBUTING.md below a heading of the second level."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_contributing_draws_the_layers_of_pyproject():
    drawn = re.findall(r"^- (`.+`): ", section("The house"), re.MULTILINE)
    layers = [re.findall(r"`([^`]+)`", line) for line in drawn]
    assert layers == house.read_layers(ROOT / "pyproject.toml")


def test_the_map_has_one_line_for_every_file():
    named = re.findall(r"^- `([^`]+\.py)`: \S", section("The map"), re.MULTILINE)
    package = ROOT / "src" / "fedvlm"
    empty = {f for f in house.files(ROOT) if (package / f).stat().st_size == 0}
    assert all(Path(file).name == "__init__.py" for file in empty)
    assert sorted(named) == sorted(house.files(ROOT).keys() - empty)


def test_nothing_imports_upwards_and_no_files_form_a_circle():
    found = house.imports(ROOT)
    assert len(found) > 300
    assert not house.upward(found, house.read_layers(ROOT / "pyproject.toml"))
    assert not house.circles(found)


def at_once(body):
    """The import statements that run when a file is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_once(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "handlers", "orelse", "finalbody"):
                yield from at_once(getattr(node, part, ()))


def needed(tree):
    """Module -> the modules of the package that its import imports; packages begin before both."""
    paths = {house._module(file): path for file, path in house.files(tree).items()}
    found = {}
    for module, path in paths.items():
        named = set()
        for node in at_once(ast.parse(path.read_text(encoding="utf-8")).body):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            else:
                base = module if path.name == "__init__.py" else module.rpartition(".")[0]
                above = base.rsplit(".", node.level - 1)[0] if node.level else ""
                home = ".".join(filter(None, (above, node.module)))
                named |= {home} | {f"{home}.{alias.name}" for alias in node.names}
        found[module] = {n for n in named & paths.keys() if not f"{module}.".startswith(f"{n}.")}
    return found


def test_any_module_may_be_imported_first():
    """Only in a circle of imports does it matter which module is first."""
    assert len(list(TopologicalSorter(needed(ROOT)).static_order())) > 100


def test_circles_of_imports_are_found(tree):
    door = tree / "src" / "fedvlm" / "roof" / "door.py"
    with pytest.raises(CycleError, match=r"fedvlm\.roof\.(door|key)"):
        list(TopologicalSorter(needed(tree)).static_order())
    door.write_text(f"def later():\n    {door.read_text().splitlines()[1]}\n")
    assert needed(tree)["fedvlm.walls.brick"] == {"fedvlm.walls.clay"}
    assert list(TopologicalSorter(needed(tree)).static_order())
