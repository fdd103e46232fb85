"""The documentation works: its Python runs, its commands and options exist."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeBlock:
    language: str
    options: str
    text: str
    line: int


def code_blocks(page: Path) -> list[CodeBlock]:
    text = page.read_text(encoding="utf-8")
    return [
        CodeBlock(
            language=match[2],
            options=match[3].strip(),
            text=textwrap.dedent(match[4]),
            line=text.count("\n", 0, match.start(4)),
        )
        for match in FENCE.finditer(text)
    ]


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands(block: CodeBlock) -> list[list[str]]:
    """The block's command lines as words, without prompts and comments."""
    joined = block.text.replace("\\\n", " ")
    lines = (line.removeprefix("$ ") for line in joined.splitlines())
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_names_its_language(page: Path) -> None:
    """Only bare names: no marker takes a block out of the tests."""
    known = {"python", "bash", "text", "toml", "json"}
    assert [
        (b.line, b.language, b.options) for b in code_blocks(page) if b.language not in known or b.options
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.language == "python" for b in code_blocks(p))], ids=page_id
)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # examples may write files
    shared: dict[str, Any] = {
        "__name__": "__main__"
    }  # one namespace per page, as for a reader who types along
    for block in code_blocks(page):
        if block.language == "python":
            code = "\n" * block.line + block.text  # so that a traceback names the page's own line
            exec(compile(code, str(page), "exec"), shared)


def test_commands_exist() -> None:
    from forescale.cli.main import app  # noqa: PLC0415 - only this test needs the command line

    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    faults: list[str] = []
    for page in PAGES:
        for block in code_blocks(page):
            for words in commands(block) if block.language == "bash" else []:
                where = f"{page_id(page)}:{block.line}: {shlex.join(words)}"
                faults += [f"{where}: {fault}" for fault in command_faults(words, group, targets)]
    assert faults == []


def command_faults(words: list[str], group: TyperGroup, targets: set[str]) -> list[str]:
    """What of a documented command line does not exist; programs that are not ours have no faults."""
    program, *rest = words
    if program == "make":
        return [f"no target {word}" for word in rest if "=" not in word and word not in targets]
    if program != "forescale" or not rest:
        return []
    command = group
    while isinstance(command, TyperGroup) and rest and not rest[0].startswith("-"):
        name, *rest = rest
        if name not in command.commands:
            return [f"no command {name}"]
        command = command.commands[name]
    known = {"--help"} | {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    return [f"no option {w}" for w in rest if w.startswith("-") and w.split("=")[0] not in known]


def test_wrong_documentation_is_noticed() -> None:
    app = typer.Typer()

    @app.callback()
    def main() -> None: ...

    @app.command()
    def plan(file: str, devices: int = 1) -> None: ...

    models = typer.Typer()
    app.add_typer(models, name="models")

    @models.command()
    def add(name: str, metric: str = "") -> None: ...

    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    assert command_faults(["forescale", "models", "add", "m", "--metric", "a=1"], group, set()) == []
    assert command_faults(["forescale", "models", "add", "m", "--figure"], group, set()) == [
        "no option --figure"
    ]
    assert command_faults(["forescale", "models", "drop"], group, set()) == ["no command drop"]
    assert command_faults(["forescale", "plan", "f.py", "--devices", "2"], group, set()) == []
    assert command_faults(["forescale", "plan", "--svg"], group, set()) == ["no option --svg"]
    assert command_faults(["forescale", "fly"], group, set()) == ["no command fly"]
    assert command_faults(["make", "demo", "test"], group, {"test"}) == ["no target demo"]
