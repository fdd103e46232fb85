"""What a ``torch.export`` archive (``.pt2``) says about itself, read without torch and without trusting it.

``torch.export.load`` (torch 2.13) executes what an archive tells it to, in more ways than its warning names:

- ``data/sample_inputs``, and weights or constants marked ``use_pickle``, are unpickled; the first and older
  layouts with ``weights_only=True``, and if that fails without it;
- constants whose name begins with ``custom_obj`` or ``opaque_obj`` are unpickled;
- size expressions go through ``sympy.sympify`` and guards through ``exec``, both of which run any Python;
- names and targets of operators become Python source (``torch.fx``), and a target may be any function below
  ``torch`` (``torch.os.system``);
- ``data/aotinductor`` holds shared libraries that are loaded.

``checked_program`` lets through what a plain model consists of and refuses all else, so that
``formats/pt2.py`` can hand the rest to torch's deserializer, without any pickle being read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from forescale.core.errors import InvalidInput, UntrustedModel
from forescale.core.signature import Signature, TensorSpec

Program = dict[str, Any]

NAMES_FILE = "extra/signature.json"
"""Names of a model's tensors, ``{"inputs": [...], "outputs": [...]}``, in the order of arguments.

``torch.export.save(program, path, extra_files={"signature.json": ...})`` writes it.
"""

_DATATYPES = {
    1: "UINT8",
    2: "INT8",
    3: "INT16",
    4: "INT32",
    5: "INT64",
    6: "FP16",
    7: "FP32",
    8: "FP64",
    12: "BOOL",
    28: "UINT16",
    34: "UINT32",
    35: "UINT64",
}
"""By number of ``torch._export.serde.schema.ScalarType``."""

_OPERATOR = re.compile(r"torch\.ops\.(?:aten|prims)\.(?!from_file\b|save\b)\w+\.\w+")
_PYTHON = frozenset(
    [f"_operator.{name}" for name in ("getitem", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge", "and_")]
    + [f"_operator.{name}" for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "or_", "not_")]
    + [f"math.{name}" for name in ("ceil", "floor", "trunc", "sqrt")]
    + [f"torch.sym_{name}" for name in ("float", "int", "ite", "max", "min", "not", "sum", "sqrt")]
    + [
        f"torch.ops.higher_order.{name}"
        for name in ("wrap_with_set_grad_enabled", "wrap_with_autocast", "cond", "scan", "while_loop")
    ]
)
_NAME = re.compile(r"(?:[A-Za-z_]\w*)?", re.ASCII)
_PLAIN = re.compile(r"[\w.+-]*", re.ASCII)
_TEXT = re.compile(r"[\w .,:;<>=+*/()\[\]-]*", re.ASCII)  # of operators: "tanh", "bij,bjk->bik"
_WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SIGNS = re.compile(r"[\d \w.,()='+*/<>-]*", re.ASCII)
_ATOMS = ("Symbol", "Integer", "Rational", "Float", "precision", "positive", "nonnegative", "integer")
_SUMS = ("Add", "Mul", "Pow", "PowByNatural", "Max", "Min", "Mod", "PythonMod", "ModularIndexing")
_QUOTIENTS = ("FloorDiv", "CeilDiv", "CleanDiv", "IntTrueDiv")
_COMPARISONS = ("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan")
_TRUTHS = ("True", "False", "Eq", "Ne", "Lt", "Le", "Gt", "Ge")
_EXPRESSION_WORDS = frozenset([*_ATOMS, *_SUMS, *_QUOTIENTS, *_COMPARISONS, *_TRUTHS])
_SYMBOL = re.compile(r"(?:s|u|zuf|zf)\d+")
_CONTAINERS = frozenset([None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """How many rows the program takes at once: ``least`` to ``most`` (None: any number)."""

    least: int = 1
    most: int | None = None


def checked_program(program: Program) -> Program:
    """A program without what is not needed to run it, and with nothing that torch would execute blindly.

    Raises:
        UntrustedModel: it holds something that only code would need.
    """
    module = program["graph_module"]
    kept = {
        **program,
        "guards_code": [],  # inputs are checked against the signature instead
        "graph_module": {**module, "module_call_graph": module["module_call_graph"][:1], "metadata": {}},
    }
    return {key: _checked(key, value) for key, value in kept.items()}


def without_shapes(program: Program) -> Program:
    """A program that knows its inputs' shapes alone.

    Running needs no others, and torch spends most of the time of loading on them: each size is an expression
    that it parses, each value a tensor without memory that it makes.
    """
    module = program["graph_module"]
    graph = module["graph"]
    inputs = {argument["as_tensor"]["name"] for argument in graph["inputs"] if "as_tensor" in argument}
    shapeless = {"sizes": [], "strides": [], "storage_offset": {"as_int": 0}}
    values = {
        name: value if name in inputs else {**value, **shapeless}
        for name, value in graph["tensor_values"].items()
    }
    return {**program, "graph_module": {**module, "graph": {**graph, "tensor_values": values}}}


def checked_weights(config: Mapping[str, Any]) -> None:
    """Look through a list of weights or constants.

    Raises:
        UntrustedModel: some are pickled.
    """
    for name, payload in config["config"].items():
        _expect(_PLAIN, name, "a weight is called")
        if payload["use_pickle"] or not re.fullmatch(r"(?:weight|tensor)_\d+", payload["path_name"]):
            _refuse(f"{name} is pickled")


def signature(program: Program, names: Mapping[str, Sequence[str]] | None) -> tuple[Signature, Rows]:
    """What the program takes and gives, and how many rows at once.

    Args:
        names: of ``NAMES_FILE``; None: parameters' names, and keys of the dict that forward returns
            (``output`` or ``output_0``, ... when it returns something else).

    Raises:
        InvalidInput: something that is not a tensor of numbers, or that has no rows.
    """
    module = program["graph_module"]
    graph = module["graph"]
    inputs = _arguments(module["signature"]["input_specs"], "user_input")
    outputs = _arguments(module["signature"]["output_specs"], "user_output")
    known = names or {"inputs": inputs, "outputs": _output_names(module, len(outputs))}
    if [len(known["inputs"]), len(known["outputs"])] != [len(inputs), len(outputs)]:
        raise InvalidInput(
            f"{NAMES_FILE} names {len(known['inputs'])} inputs and {len(known['outputs'])} outputs of a "
            f"model that has {len(inputs)} and {len(outputs)}"
        )
    values = graph["tensor_values"]
    rows = _rows([values[name]["sizes"] for name in inputs], program["range_constraints"])
    return Signature(
        inputs=tuple(_spec(name, values[of]) for name, of in zip(known["inputs"], inputs, strict=True)),
        outputs=tuple(_spec(name, values[of]) for name, of in zip(known["outputs"], outputs, strict=True)),
    ), rows


def names_of(read: Callable[[str], bytes], entries: Sequence[str]) -> dict[str, list[str]] | None:
    """The archive's own names of its tensors, if it has any.

    Raises:
        InvalidInput: the file says something else.
    """
    if NAMES_FILE not in entries:
        return None
    try:
        fields = json.loads(read(NAMES_FILE))
        return {side: [str(name) for name in fields[side]] for side in ("inputs", "outputs")}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            f'{NAMES_FILE} is not of the form {{"inputs": [names], "outputs": [names]}}: {error!r}'
        ) from error


def _checked(key: str, value: Any) -> Any:
    """Look at every text below ``value``; the key it stands under says what it may be."""
    if isinstance(value, Mapping):
        # Stack traces and modules' names, of which running needs none.
        return {k: {} if k == "metadata" else _checked(k, v) for k, v in value.items()}
    if isinstance(value, list):
        return [_checked(key, v) for v in value]
    if isinstance(value, str):
        _check_text(key, value)
    return value


def _check_text(key: str, text: str) -> None:
    match key:
        case "target":
            if text not in _PYTHON and not _OPERATOR.fullmatch(text):
                _refuse(f"it calls {text[:100]!r}, which is no operator of torch itself")
        case "expr_str":
            _check_expression(text)
        case "in_spec" | "out_spec":
            _check_structure(json.loads(text)[1])
        case "name":
            _expect(_NAME, text, "a tensor is called")
        case "as_string":
            _expect(_TEXT, text, "an operator is given")
        case _:
            _expect(_PLAIN, text, f"its {key} is")


def _check_expression(text: str) -> None:
    words = _WORD.findall(text)
    unknown = [word for word in words if word not in _EXPRESSION_WORDS and not _SYMBOL.fullmatch(word)]
    # No attribute of anything: a point stands between digits only.
    if unknown or not _SIGNS.fullmatch(text) or re.search(r"[^\d]\.|\.[^\d]", text):
        _refuse(f"a size is {text[:100]!r}")


def _check_structure(spec: Mapping[str, Any]) -> None:
    if spec["type"] not in _CONTAINERS:
        _refuse(f"its arguments or results come in a {spec['type']!r}")
    for key in json.loads(spec["context"]) or [] if spec["type"] else []:
        _expect(_PLAIN, str(key), "an argument is called")
    for child in spec["children_spec"]:
        _check_structure(child)


def _expect(pattern: re.Pattern[str], text: str, what: str) -> None:
    if not pattern.fullmatch(text):
        _refuse(f"{what} {text[:100]!r}")


def _refuse(what: str) -> NoReturn:
    raise UntrustedModel(what)


def _arguments(specs: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    names: list[str] = []
    for spec in specs:
        if kind in spec:
            argument = spec[kind]["arg"]
            if "as_tensor" not in argument:
                raise InvalidInput(f"the model's {kind.removeprefix('user_')}s are not all tensors")
            names.append(argument["as_tensor"]["name"])
        elif "constant_input" in spec:
            raise InvalidInput(f"the model's input {spec['constant_input']['name']} is no tensor")
    return names


def _output_names(module: Mapping[str, Any], count: int) -> list[str]:
    structure = json.loads(module["module_call_graph"][0]["signature"]["out_spec"])[1]
    if structure["type"] == "builtins.dict":
        keys = [str(key) for key in json.loads(structure["context"])]
        if len(keys) == count:
            return keys
    return ["output"] if count == 1 else [f"output_{number}" for number in range(count)]


def _rows(sizes: Sequence[Sequence[Mapping[str, Any]]], ranges: Mapping[str, Mapping[str, Any]]) -> Rows:
    least, most = 1, None
    for axes in sizes:
        if not axes:
            raise InvalidInput("an input of the model has no axis of rows")
        if "as_int" in axes[0]:
            low = high = axes[0]["as_int"]
        else:
            symbol = re.fullmatch(r"Symbol\('(\w+)'.*\)|(\w+)", axes[0]["as_expr"]["expr_str"])
            if symbol is None:
                raise InvalidInput(
                    "the rows of an input are a multiple of something: export with a plain Dim"
                )
            limits = ranges.get(symbol[1] or symbol[2], {})
            low, high = limits.get("min_val") or 1, limits.get("max_val")
        least = max(least, low)
        most = high if most is None else min(most, most if high is None else high)
    return Rows(least=least, most=most)


def _spec(name: str, value: Mapping[str, Any]) -> TensorSpec:
    datatype = _DATATYPES.get(value["dtype"])
    if datatype is None:
        raise InvalidInput(f"{name} is of a type that the protocol does not know: cast it before exporting")
    tail = (axis.get("as_int") for axis in value["sizes"][1:])
    return TensorSpec(name=name, datatype=datatype, shape=(None, *tail) if value["sizes"] else ())
