"""The conventions that no linter checks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "forescale"
MODULES = sorted(SOURCE.rglob("*.py"))

MAX_LINES = 400
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
FORBIDDEN_CLASS_ENDINGS = ("Manager", "Helper", "Handler", "Base")

QUANTITIES = {
    *("age", "bandwidth", "deadline", "delay", "duration", "energy", "frequency", "interval", "latency"),
    *("memory", "pause", "period", "power", "rate", "size", "speed", "throughput", "time", "timeout"),
}
UNITS = re.compile(r"_(s|bytes|flops|watts|joules|hz|per_[a-z]+|fraction|ratio)$")
UNITLESS_ON_PURPOSE = {
    ("Device", "speed"): "relative to the nominal speed of its kind",
    ("Peers", "world_size"): "torch.distributed's word for a number of processes",
}

HEAVY = ("torch", "transformers", "matplotlib", "scipy")

# A user's or a build machine's folders, and the host names of package registries: neither belongs in a file.
MACHINE_PATH = re.compile(r"(?<![\w.}$])/(?:home|root|Users|work|tmp/[\w.-]+)/\w|[A-Z]:\\Users")
REGISTRY_HOST = re.compile(r"pypi\.org|pythonhosted\.org|registry\.npmjs\.org|download\.pytorch\.org")


def module_id(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def classes(path: Path) -> Iterator[ast.ClassDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            yield node


def is_dataclass(definition: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in definition.decorator_list)


def lacks_unit(field: str) -> bool:
    """Whether a number's name says that it is a quantity but not in what unit."""
    without_axes = re.sub(r"_[A-Z]+$", "", field)
    return bool(QUANTITIES & set(without_axes.split("_"))) and not UNITS.search(without_axes)


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_module_is_short_and_documented(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    assert ast.get_docstring(ast.parse(text)), "a module starts with a docstring"


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_names_say_what_is_inside(path: Path) -> None:
    assert not FORBIDDEN_NAMES & {*path.relative_to(SOURCE).with_suffix("").parts}
    assert [c.name for c in classes(path) if c.name.endswith(FORBIDDEN_CLASS_ENDINGS)] == []


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_fields_carry_their_unit(path: Path) -> None:
    missing = [
        f"{definition.name}.{field.target.id}"
        for definition in classes(path)
        if is_dataclass(definition)
        for field in definition.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if re.fullmatch(r"(int|float)( \| None)?", ast.unparse(field.annotation))
        if lacks_unit(field.target.id) and (definition.name, field.target.id) not in UNITLESS_ON_PURPOSE
    ]
    assert missing == []


def test_the_unit_rule_tells_good_names_from_bad() -> None:
    assert all(map(lacks_unit, ["latency", "batch_size", "step_time", "memory_DO", "link_rate"]))
    assert not any(
        map(lacks_unit, ["latency_s", "memory_bytes_D", "link_rate_bytes_per_s", "steps", "times"])
    )


def test_public_dataclasses_are_frozen() -> None:
    """Values never change; what a module changes while it works is private to it."""
    thawed = [
        f"{module_id(path)}: {definition.name}"
        for path in MODULES
        for definition in classes(path)
        if is_dataclass(definition)
        and not definition.name.startswith("_")
        and not any("frozen=True" in ast.unparse(decorator) for decorator in definition.decorator_list)
    ]
    assert thawed == []


def loaded_modules(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after running ``code``."""
    script = f"import sys\n{code}\nprint('\\n' + ' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import forescale",
        "from forescale.cli.main import app\ntry:\n    app(['--help'])\nexcept SystemExit:\n    pass",
    ],
    ids=["import forescale", "forescale --help"],
)
def test_start_is_light(code: str) -> None:
    loaded = loaded_modules(code)
    assert "forescale" in loaded
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "module", ["model", "size", "cost", *(p.stem for p in SOURCE.glob("graph/json*.py"))]
)
def test_planning_data_loads_without_torch(module: str) -> None:
    assert "torch" not in loaded_modules(f"import forescale.graph.{module}")


def test_public_names_are_all_there() -> None:
    """In a fresh interpreter, so that no other test has imported them already."""
    code = "import forescale as fs\nfor name in fs.__all__:\n    getattr(fs, name)"
    assert "forescale.engine.train" in loaded_modules(code)


def test_every_command_is_in_the_readme() -> None:
    from forescale.cli.main import app  # noqa: PLC0415 - only this test needs the command line

    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    assert group.commands
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in group.commands if f"`forescale {name}" not in readme] == []


def drawn_parents(drawing: str) -> dict[str, str | None]:
    """Reads a tree of box characters: name -> the name it hangs under."""
    parents: dict[str, str | None] = {}
    open_branches: list[tuple[int, str]] = []
    for line in drawing.splitlines():
        drawn = re.match(r"[ │├└─]*([A-Z]\w+)(?:  |$)", line)
        if drawn is None:
            continue
        column = drawn.start(1)
        while open_branches and open_branches[-1][0] >= column:
            open_branches.pop()
        parents[drawn[1]] = open_branches[-1][1] if open_branches else None
        open_branches.append((column, drawn[1]))
    return parents


def test_the_drawn_error_tree_is_the_real_one() -> None:
    path = SOURCE / "core" / "errors.py"
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    bases = {definition.name: ast.unparse(definition.bases[0]) for definition in classes(path)}
    real = {name: base if base in bases else None for name, base in bases.items()}
    assert drawn_parents(docstring) == real


def project_files() -> list[Path]:
    """Every text file that is, or would be, under version control."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    text_files = {"", ".md", ".py", ".toml", ".txt", ".json", ".html", ".svg", ".yml", ".yaml", ".typed"}
    return [
        path
        for line in listing.stdout.splitlines()
        if (path := ROOT / line).suffix in text_files and path.is_file()
    ]


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY_HOST], ids=["machine paths", "registry hosts"])
def test_nothing_of_one_machine_is_in_the_files(pattern: re.Pattern[str]) -> None:
    files = project_files()
    assert ROOT / "LICENSE" in files
    found = {
        str(path.relative_to(ROOT)): match.group()
        for path in files
        if (match := pattern.search(path.read_text(encoding="utf-8")))
    }
    assert found == {}
