"""Weights as safetensors, for an architecture of ``transformers`` that the options name.

Options: ``architecture``, a class of transformers (``BertForSequenceClassification``), and ``config``, what
its ``config.json`` says, with ``model_type``. The signature names arguments of forward and fields of what
that returns. Neither file nor options hold code; what would fetch some from elsewhere is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import InvalidInput, UntrustedModel
from forescale.core.signature import Signature
from forescale.engine.serve.arrays import Array
from forescale.engine.serve.formats import LoadedModel, Order, declared_signature

if TYPE_CHECKING:
    from torch import Tensor, nn

# These name kernels, quantisers or classes that transformers would download and run.
_FETCHING = (
    "attn_implementation",
    "experts_implementation",
    "auto_map",
    "quantization_config",
    "custom_pipelines",
)


def inspect(order: Order) -> Signature:
    """The signature that was given: forward's arguments do not tell their shapes."""
    _config(order)
    return declared_signature(order)


def load(order: Order, device: Device) -> LoadedModel:
    """Build the architecture and fill in the weights; every weight must be there, and no other."""
    import torch

    declared = declared_signature(order)
    place = torch.device("cuda:0" if device.kind is DeviceKind.CUDA else "cpu")
    model = _model(order).eval().to(place)

    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        with torch.inference_mode():
            result = model(**{name: torch.from_numpy(array).to(place) for name, array in inputs.items()})
        return {spec.name: result[spec.name].cpu().numpy() for spec in declared.outputs}

    return LoadedModel(signature=declared, run=run)


def _config(order: Order) -> dict[str, Any]:
    architecture, config = order.options.get("architecture"), order.options.get("config")
    if not isinstance(architecture, str) or not isinstance(config, dict) or "model_type" not in config:
        raise InvalidInput(
            "safetensors need the options architecture (a class of transformers) and config (its config.json)"
        )
    if not order.trust:
        _refuse_fetching(cast(object, config))
    return cast(dict[str, Any], config)


def _refuse_fetching(config: object) -> None:
    if isinstance(config, Mapping):
        for key, value in cast(Mapping[str, object], config).items():
            if key.lstrip("_").startswith(_FETCHING):
                raise UntrustedModel(f"its config has {key}")
            _refuse_fetching(value)


def _model(order: Order) -> nn.Module:
    config = _config(order)
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: whatever else a config names, nothing is fetched
    try:
        import transformers
    except ImportError as error:
        raise InvalidInput("this format needs transformers: pip install transformers") from error
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    architecture = getattr(transformers, order.options["architecture"], None)
    if not isinstance(architecture, type) or not issubclass(architecture, transformers.PreTrainedModel):
        raise InvalidInput(f"{order.options['architecture']!r} is no model of transformers")
    try:
        settings = {key: value for key, value in config.items() if key != "model_type"}
        model = architecture(transformers.AutoConfig.for_model(config["model_type"], **settings))
        _fill(model, load_file(order.path))
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{order.path.name} is no safetensors file ({error})") from error
    return model


def _fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    try:
        absent, unknown = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # shapes
        raise InvalidInput(
            f"the weights do not fit the config: {str(error).splitlines()[-1].strip()}"
        ) from error
    # A tied weight is saved under one of its names.
    filled = {
        id(weight) for name, weight in model.named_parameters(remove_duplicate=False) if name in weights
    }
    tied = {name for name, weight in model.named_parameters(remove_duplicate=False) if id(weight) in filled}
    missing = [name for name in absent if name not in tied]
    if missing or unknown:
        raise InvalidInput(
            f"the weights do not fit the config: {len(missing)} are missing {missing[:3]}, "
            f"{len(unknown)} are unknown {unknown[:3]}"
        )
