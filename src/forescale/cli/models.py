"""``forescale models add|list|show|alias``."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forescale.cli import options
from forescale.cli.console import console, print_json, table
from forescale.cli.units import size
from forescale.core.errors import InvalidInput

if TYPE_CHECKING:
    from forescale.api.client import Client

models = typer.Typer(
    no_args_is_help=True,
    epilog=options.examples(
        "forescale models add digits model.pt2 --metric accuracy=0.97",
        "forescale models add digits models:/digits/3",
        "forescale models list",
        "forescale models show digits",
        "forescale models alias digits production 3",
    ),
    help="The models that a server knows: add versions, look at them, name them.",
)

Name = Annotated[str, typer.Argument(metavar="NAME")]
Format = Annotated[
    str | None,
    typer.Option(help="pt2, onnx, safetensors or factory. Default: what the file's name ends in."),
]
Pairs = Annotated[list[str] | None, typer.Option(metavar="NAME=NUMBER", help="A figure to keep with it.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="What the format has to know besides."),
]
SignatureFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json", help="Inputs and outputs, for formats whose files do not say it."),
]
Commit = Annotated[str | None, typer.Option(metavar="ID", help="Of the code that made it.")]
Reference = Annotated[
    str | None, typer.Argument(metavar="[VERSION]", help="Number, or another alias. Default: show all.")
]
Remove = Annotated[bool, typer.Option("--remove", help="Take the alias away.")]


@models.command()
def add(  # noqa: PLR0913, PLR0917 - typer takes the options from the signature
    name: Name,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Or models:/NAME/VERSION of MLflow.")],
    format: Format = None,  # noqa: A002 - the option's name
    metric: Pairs = None,
    option: Options = None,
    signature: SignatureFile = None,
    commit: Commit = None,
    url: options.Url = None,
    json: options.Json = False,
) -> None:
    """Adds a file as a model's next version."""
    metrics = {key: _number(key, value) for key, value in map(_pair, metric or ())}
    values = {key: _value(value) for key, value in map(_pair, option or ())}
    declared = None if signature is None else _json_of(signature)
    with connect(url) as client:
        added = client.add_model(
            name,
            file,
            format=format,
            options=values,
            signature=declared,
            metrics=metrics,
            commit=commit,
        )
    if json:
        print_json(added)
        return
    console().print(
        f"{name}@{added['version']}: {added['format']}, {size(added['size_bytes'])}, "
        f"{_tensors(added['inputs'])} -> {_tensors(added['outputs'])}",
        markup=False,
        soft_wrap=True,
    )


@models.command("list")
def list_models(url: options.Url = None, json: options.Json = False) -> None:
    """All models."""
    with connect(url) as client:
        found = client.models()
    if json:
        print_json({"models": found})
        return
    shown = table("Models", "model", ">versions", ">newest", "aliases", ">deployed")
    for model in found:
        versions = model["versions"]
        aliases = ", ".join(f"{alias}={number}" for alias, number in model["aliases"].items())
        shown.add_row(
            model["name"], str(len(versions)), str(versions[-1]), aliases, str(model["deployed"] or "")
        )
    console().print(shown)


@models.command()
def show(name: Name, url: options.Url = None, json: options.Json = False) -> None:
    """A model's versions, newest first."""
    with connect(url) as client:
        model = client.model(name)
    if json:
        print_json(model)
        return
    shown = table(
        name, ">version", "added", "by", "format", ">size", "sha256", "inputs", "outputs", "metrics"
    )
    for version in reversed(model["versions"]):
        shown.add_row(
            str(version["version"]),
            _time(version["created_at_s"]),
            version["created_by"],
            version["format"],
            size(version["size_bytes"]),
            version["sha256"][:12],
            _tensors(version["inputs"]),
            _tensors(version["outputs"]),
            ", ".join(f"{key}={value:g}" for key, value in version["metrics"].items()),
        )
    console().print(shown)
    if model["aliases"]:
        _show_aliases(model)


@models.command()
def alias(
    name: Name,
    alias: Annotated[str | None, typer.Argument(metavar="[ALIAS]")] = None,
    version: Reference = None,
    remove: Remove = False,
    url: options.Url = None,
    json: options.Json = False,
) -> None:
    """Lets an alias point to a version, takes it away, or shows all aliases and where they pointed."""
    if alias is not None and remove == (version is not None):
        raise typer.BadParameter("say which version the alias is to point to, or --remove")
    with connect(url) as client:
        if alias is not None and version is not None:
            client.set_alias(name, alias, version)
        elif alias is not None:
            client.remove_alias(name, alias)
        model = client.model(name)
    if json:
        print_json({"aliases": model["aliases"], "history": model["alias_history"]})
        return
    _show_aliases(model)
    if alias is None:
        shown = table("History", "when", "by", "alias", ">version")
        for change in reversed(model["alias_history"]):
            shown.add_row(
                _time(change["at_s"]), change["by"], change["alias"], str(change["version"] or "removed")
            )
        console().print(shown)


def connect(url: str | None) -> Client:
    """The server that the user means.

    Raises:
        InvalidInput: the packages for it are not installed.
    """
    try:
        from forescale.api.client import Client
    except ModuleNotFoundError as error:
        raise InvalidInput(f"this needs {error.name}: pip install 'forescale[serve]'") from error
    return Client(url)


def _show_aliases(model: dict[str, Any]) -> None:
    shown = table("Aliases", "alias", ">version")
    for name, number in model["aliases"].items():
        shown.add_row(name, str(number))
    console().print(shown)


def _tensors(specs: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{spec['name']} {spec['datatype']}[{','.join('*' if n < 0 else str(n) for n in spec['shape'])}]"
        for spec in specs
    )


def _time(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"{text!r} is not of the form NAME=VALUE")
    return key, value


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{name} is {text!r}, not a number") from error


def _json_of(path: Path) -> dict[str, Any]:
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidInput(f"{path} must hold a JSON object with inputs and outputs")
    return found


def _value(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except ValueError:
        return text
