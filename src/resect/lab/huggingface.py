"""Models of transformers by name (``hf:llama``, ``hf:FOLDER``, ``hf:ORGANISATION/NAME``), and their examples."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from resect.errors import InputError, check_all, unknown

# Whose class is built where a configuration names none: the first that knows it.
AUTO = ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq", "AutoModelForMaskedLM", "AutoModelForCausalLM",
        "AutoModelForImageTextToText", "AutoModelForImageClassification", "AutoModelForVideoClassification",
        "AutoModelForCTC", "AutoModelForAudioClassification", "AutoModel")  # fmt: skip
LENGTH = 8  # tokens
MEMORY = 0.5  # of what is free may be weights


def build_transformers(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Build the model of transformers that ``name`` means, with random weights unless ``pretrained=True``.

    Parameters
    ----------
    name: a type (``llama``, with its default configuration), a folder with a ``config.json``, or a model of the
        hub, whose configuration alone is fetched.
    options: values that replace those of the configuration; ``architecture`` names another class of
        transformers (``BertModel``); ``pretrained=True`` loads the weights too.

    Raises
    ------
    InputError: transformers is missing, the model or an option is unknown, or the weights do not fit in memory.
    """
    if importlib.util.find_spec("transformers") is None:
        raise InputError(f"hf:{name} needs transformers: pip install transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    values = dict(options)
    architecture, pretrained = values.pop("architecture", None), values.pop("pretrained", False)
    plain = _config(name, {})
    known = {"architecture", "pretrained", *plain.to_dict(), *plain.attribute_map}
    wrong = [option for option in values if option not in known]
    check_all((str(unknown("option", option, known)) for option in wrong), f"Model 'hf:{name}'")
    try:
        config = _config(name, values)
        kind = _class(config, architecture)
        if pretrained:
            return kind.from_pretrained(name, config=config)
        with torch.device("meta"):
            _check_memory(name, kind._from_config(config))
        return kind._from_config(config)
    except InputError:
        raise
    except Exception as error:  # configurations and models refuse values each in their own way
        given = f" with {dict(options)}" if options else ""
        raise InputError(f"Model 'hf:{name}' cannot be built{given}: {_said(error)}") from error


def example_for(model: Any) -> dict[str, Tensor]:
    """Return keyword arguments that a model of transformers runs with: tokens, pixels or sound, two samples of it.

    Raises ``InputError`` if none of the usual ones will do.
    """
    takes = inspect.signature(model.forward).parameters
    said = ""
    for example in _examples(model):
        if not set(example) <= set(takes):
            continue
        try:
            with torch.no_grad():
                model(**example)
        except Exception as error:
            said = said or f"{type(error).__name__}: {_said(error)}"
            continue
        return example
    raise InputError(
        f"No example could be made for {type(model).__name__}{f' ({said})' if said else ''}. "
        "From Python, give your own: resect.find_blocks(model, {'input_ids': …})."
    )


def _config(name: str, values: Mapping[str, Any]) -> Any:
    """The configuration of a folder, of a type, or of a model on the hub, with ``values`` in it."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(f"{name!r} holds no config.json: it is no model saved by transformers.")
    if not folder.exists() and name in CONFIG_MAPPING:
        return AutoConfig.for_model(name, **values)
    if not folder.exists() and difflib.get_close_matches(name, list(CONFIG_MAPPING), n=1):
        raise unknown("model", f"hf:{name}", [f"hf:{known}" for known in CONFIG_MAPPING])
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"The configuration of 'hf:{name}' could not be read: {_said(error)} "
            "Give a type (hf:llama), a folder with a config.json, or a model of the hub, with a network."
        ) from error
    return _changed(config, values) if values else config


def _changed(config: Any, values: Mapping[str, Any]) -> Any:
    """A configuration with other values; where it gets fewer layers, so do its lists of one item a layer."""
    there = config.to_dict()
    layers = getattr(config, "num_hidden_layers", None)
    fewer = values.get("num_hidden_layers", layers)
    for key, value in there.items():
        if isinstance(value, list) and len(value) == layers and fewer < layers:
            there[key] = value[:fewer]
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(there.get(key), dict)
        there[key] = {**there[key], **value} if both else value
    return type(config).from_dict(there)


def _class(config: Any, architecture: str | None) -> Any:
    """The model class that is asked for, that the configuration names, or that fits it best."""
    import transformers

    wanted = architecture or next(iter(config.architectures or ()), None)
    if wanted is not None:
        if not hasattr(transformers, wanted):
            raise unknown("architecture", wanted, [n for n in dir(transformers) if n.startswith(wanted[:2])])
        return getattr(transformers, wanted)
    two = hasattr(config, "text_config") and hasattr(config, "vision_config")
    for auto in AUTO:
        if two and auto == "AutoModelForImageClassification":  # its vision half alone
            continue
        found = getattr(transformers, auto)._model_mapping.get(type(config), None)
        if found is not None:
            return found[0] if isinstance(found, (tuple, list)) else found
    raise ValueError(f"transformers has no model for a {type(config).__name__}")


def _check_memory(name: str, model: nn.Module) -> None:
    """Raise ``InputError`` if the weights of a model (on the meta device) do not fit in what memory is free."""
    number = sum(parameter.numel() for parameter in model.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size > MEMORY * psutil.virtual_memory().available:
        raise InputError(
            f"Model 'hf:{name}' has {number / 1e9:.1f} billion parameters ({size / 2**30:.0f} GiB), too many for this "
            "machine. Take fewer of the same layers: -o num_hidden_layers=2 (or what its configuration calls them). Or "
            'find the blocks of all of them without any memory, in Python: docs/finding.md, "Models too large to hold".'
        )


def _examples(model: Any) -> Iterator[dict[str, Tensor]]:
    """Mappings of arguments, the likeliest first."""
    config, main = model.config, model.main_input_name
    make = {"input_ids": _tokens, "pixel_values": _pixels, "input_values": _sound, "input_features": _features}
    first = {main: make.get(main, _tokens)(config)}
    decoder = {"decoder_input_ids": _tokens(config)}
    if getattr(config, "is_encoder_decoder", False):
        yield first | decoder
    yield first
    yield first | decoder
    if main == "input_ids":
        yield first | {"pixel_values": _pixels(config)}
    yield {"pixel_values": _pixels(config)}
    yield {"pixel_values": _pixels(config, video=True)}


def _part(config: Any, *names: str) -> Any:
    """The configuration inside ``config`` that speaks of this: its own, or a nested one."""
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), config)


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _tokens(config: Any) -> Tensor:
    """(2, LENGTH) token numbers, the first few left out, which are often special."""
    text = _part(config, "text_config", "decoder", "text_encoder")
    size = getattr(text, "vocab_size", None) or 100
    length = min(LENGTH, getattr(text, "max_position_embeddings", None) or LENGTH)
    return torch.randint(min(10, size - 1), size, (2, length), generator=_random())


def _pixels(config: Any, video: bool = False) -> Tensor:
    """(2, C, H, W), or (2, frames, C, H, W) for a video."""
    vision = _part(config, "vision_config", "backbone_config")
    side = getattr(vision, "image_size", None) or 224
    height, width = (side, side) if isinstance(side, int) else tuple(side)[-2:]
    frames = [getattr(vision, "num_frames", None) or 8] * (video or hasattr(vision, "num_frames"))
    shape = (2, *frames, getattr(vision, "num_channels", None) or 3, height, width)
    return torch.randn(shape, generator=_random())


def _sound(config: Any) -> Tensor:
    """(2, samples) of a wave, 0.25 s at 16 kHz."""
    return torch.randn(2, 4000, generator=_random())


def _features(config: Any) -> Tensor:
    """(2, mel bands, frames) of a spectrogram."""
    frames = 2 * (getattr(config, "max_source_positions", None) or 50)
    return torch.randn(2, getattr(config, "num_mel_bins", None) or 80, frames, generator=_random())


def _said(error: BaseException) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
