"""The README's commands run as written.

Its ``bash`` and ``python`` blocks run in order, in one empty folder, offline. An HTML comment above
a block may change that:

- ``<!-- not run: needs your own data -->``: not run; the reason must be in ``NOT_RUN``.
- ``<!-- test adds: train.rounds=1 -->``: added to each ``fedvlm run`` and ``compare``.

Lines that call ``make`` are not run, but their targets must exist. A ``yaml`` block that begins
with a comment such as ``# my.yaml`` is a configuration file. Later blocks find it by that name.
"""

from __future__ import annotations

import os
import re
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from fedvlm.cli.app import app
from fedvlm.config import load
from forked import Warm

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MOST_LINES = 100
SECONDS = 300

# The reason of every block that is not run, in order. A block missing here fails the test below.
NOT_RUN = ["installs packages from an index"]

SHELL = ("bash", "sh", "shell", "console")
pytestmark = pytest.mark.waits("readme")  # its blocks need one worker, in order

NEEDS_NETWORK = re.compile(r"\b(git clone|pip install|curl|wget|huggingface-cli|hf download)\b")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: the word after the fence.
        text: the contents, without the fences.
        line: number of the line that opens it.
        not_run: the reason, where the comment above says that it is not run.
        adds: overrides that the comment above adds.
    """

    language: str
    text: str
    line: int
    not_run: str | None = None
    adds: str = ""

    def __str__(self) -> str:
        return f"{self.language}-line-{self.line}"

    @property
    def file(self) -> str | None:
        """The file that a block of configuration names in its first line."""
        found = re.match(r"#\s*([\w./-]+\.ya?ml)\b", self.text)
        return found[1] if found and self.language == "yaml" else None


def parse(markdown: str) -> list[Block]:
    """Every fenced block, with the comment on the last non-blank line above it."""
    blocks: list[Block] = []
    above, body, opened = "", [], None
    for number, line in enumerate(markdown.splitlines(), 1):
        fence = re.match(r"\s*```\s*([\w+-]*)", line)
        if opened is None and fence:
            opened, body = (fence[1], number), []
        elif opened is not None and line.strip() == "```":
            text = textwrap.dedent("\n".join(body)).strip() + "\n"
            not_run, adds = _comment("not run", above), _comment("test adds", above)
            blocks.append(Block(opened[0], text, opened[1], not_run, adds or ""))
            opened, above = None, ""
        elif opened is not None:
            body.append(line)
        elif line.strip():
            above = line
    assert opened is None, f"the block that opens in line {opened[1]} is not closed"
    return blocks


def _comment(head: str, line: str) -> str | None:
    found = re.search(rf"<!--\s*{head}:\s*(.+?)\s*-->", line)
    return found[1] if found else None


def commands(block: Block) -> list[str]:
    """A shell block's commands: continued lines joined, prompts and comments dropped."""
    text = re.sub(r"\\\n\s*", "", block.text)
    lines = [re.sub(r"^\s*\$ ", "", line).strip() for line in text.splitlines()]
    lines = [re.sub(r"\s+#\s.*$", "", line) for line in lines]
    return [line for line in lines if line and not line.startswith("#")]


def make_targets(markdown: str) -> list[str]:
    """Targets of ``make`` in shell blocks and in inline code; none for a bare ``make``."""
    calls = [c for block in parse(markdown) if block.language in SHELL for c in commands(block)]
    calls += re.findall(r"`(make(?: [^`]+)?)`", markdown)
    found: list[str] = []
    for call in calls:
        for part in re.split(r"&&|;|\|\|", call):
            words = part.split()
            if words[:1] == ["make"]:
                found += [w for w in words[1:] if "=" not in w and not w.startswith("-")]
    return list(dict.fromkeys(found))


def named_commands(markdown: str) -> set[tuple[str, str]]:
    """Pairs of words after ``fedvlm``, in fenced and indented blocks and in inline code."""
    calls = [c for block in parse(markdown) if block.language in SHELL for c in commands(block)]
    calls += re.findall(r"`(fedvlm [^`]+)`", markdown)
    calls += re.findall(r"^ {4}(fedvlm .+)", markdown, re.MULTILINE)
    words = re.compile(r"(?:\S+/)?fedvlm ([a-z][a-z-]*)(?: ([a-z-]+)(?=\s|$))?")
    return {(found[1], found[2] or "") for call in calls if (found := words.match(call))}


def script(block: Block) -> str:
    """The commands of a shell block that run: without ``make``, with the overrides for tests."""
    lines = []
    for command in commands(block):
        if re.match(r"make\b", command):
            continue
        adds = block.adds if re.match(r"fedvlm (run|compare)\b", command) else ""
        lines.append(f"{command} {adds}".strip())
    return "\n".join(lines)


def execute(block: Block, folder: Path, warm: Warm) -> None:
    """Runs a block in ``folder``; fails with its output. ``fedvlm`` begins with imports done."""
    if block.language in SHELL:
        argv = ["bash", "-euo", "pipefail", "-c", script(block)]
    else:
        (folder / "block.py").write_text(block.text, encoding="utf-8")
        argv = [str(warm.python), "block.py"]
    path = f"{warm.fedvlm.parent}{os.pathsep}{os.environ['PATH']}"
    env = warm.env | {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        argv,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if done.returncode != 0:
        output = (done.stdout + done.stderr)[-4000:]
        pytest.fail(f"{block} ended with {done.returncode}:\n{block.text}\n{output}", pytrace=False)


# --- the README ----------------------------------------------------------------------------------

needs_readme = pytest.mark.skipif(not README.exists(), reason="there is no README.md yet")
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
BLOCKS = parse(TEXT)
RUN = [b for b in BLOCKS if b.not_run is None and (b.language in (*SHELL, "python") or b.file)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("readme")


@needs_readme
@pytest.mark.parametrize("block", RUN, ids=str)
def test_block_runs(block, folder, warm):
    if block.file:
        (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
        (folder / block.file).write_text(block.text, encoding="utf-8")
        load(folder / block.file)
        return
    network = NEEDS_NETWORK.search(block.text)
    assert not network, f"{block} calls '{network and network[0]}': mark it 'not run'"
    execute(block, folder, warm)


@needs_readme
def test_blocks_that_are_not_run_are_listed_with_their_reason():
    assert [b.not_run for b in BLOCKS if b.not_run is not None] == NOT_RUN


@needs_readme
def test_every_block_names_its_language():
    assert not [f"line {b.line}" for b in BLOCKS if not b.language]


@needs_readme
def test_make_targets_exist():
    targets = make_targets(TEXT)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


@needs_readme
def test_every_command_that_a_page_names_exists():
    known, named = typer.main.get_command(app).commands, set()
    for page in (README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for name, second in named_commands(page.read_text(encoding="utf-8")):
            assert name in known, f"{page.name}: fedvlm {name}"
            group = getattr(known[name], "commands", None)
            assert not group or second in group, f"{page.name}: fedvlm {name} {second}"
            named.add(name)
    assert named == set(known), "every command is on some page"


@needs_readme
def test_readme_is_short():
    assert len(TEXT.splitlines()) <= MOST_LINES


@needs_readme
def test_local_links_lead_somewhere():
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)|src=\"([^\"]+)\"", TEXT)
    local = [link for pair in links for link in pair if link and "://" not in link]
    assert not [link for link in local if not (ROOT / link).exists()]


# --- the harness ---------------------------------------------------------------------------------

SAMPLE = """\
# Sample

Run `make demo`, or `make test PYTHON=python3.12`.

```bash
# a comment
make demo            # two minutes
$ fedvlm run \\
    train.rounds=2
echo a#b > out.txt
```

<!-- not run: needs your own data -->

```bash
git clone somewhere && cd fedvlm && make check
fedvlm run data.path=mine
```

<!-- test adds: train.rounds=1 eval.max_rows=4 -->
```bash
fedvlm run small.yaml
```

1. In a list:

   ```python
   if True:
       print("hello")
   ```

```yaml
# small.yaml
seed: 3
```
```text
not run
```
"""


def test_parser_finds_blocks_languages_and_comments():
    blocks = parse(SAMPLE)
    assert [b.language for b in blocks] == ["bash", "bash", "bash", "python", "yaml", "text"]
    assert [b.not_run for b in blocks] == [None, "needs your own data", None, None, None, None]
    assert blocks[2].adds == "train.rounds=1 eval.max_rows=4"
    assert blocks[3].text == 'if True:\n    print("hello")\n'
    assert [b.file for b in blocks] == [None, None, None, None, "small.yaml", None]
    assert blocks[0].line == 5


def test_parser_refuses_an_open_block():
    with pytest.raises(AssertionError, match="line 1 is not closed"):
        parse("```bash\nls\n")


def test_scripts_leave_out_make_and_add_what_the_readme_says():
    blocks = parse(SAMPLE)
    assert script(blocks[0]) == "fedvlm run train.rounds=2\necho a#b > out.txt"
    assert script(blocks[2]) == "fedvlm run small.yaml train.rounds=1 eval.max_rows=4"


def test_make_targets_are_found_in_blocks_and_in_the_text():
    assert make_targets(SAMPLE) == ["demo", "check", "test"]


def test_commands_are_found_in_blocks_and_in_the_text():
    text = SAMPLE + "As `fedvlm deploy run` does, and fedvlm itself:\n\n    fedvlm demo  # short\n"
    assert named_commands(text) == {("run", ""), ("deploy", "run"), ("demo", "")}


def test_blocks_are_executed_in_the_folder(tmp_path, warm):
    execute(Block("bash", "make demo\necho hello > said.txt\n", 1), tmp_path, warm)
    execute(Block("python", "assert open('said.txt').read() == 'hello\\n'\n", 1), tmp_path, warm)


def test_a_failing_command_fails_with_its_output(tmp_path, warm):
    with pytest.raises(pytest.fail.Exception, match="ended with 3") as failure:
        execute(Block("bash", "echo $((6 * 7))\nexit 3\necho not reached\n", 1), tmp_path, warm)
    assert "\n42\n" in str(failure.value)
