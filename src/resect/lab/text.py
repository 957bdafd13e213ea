"""Plain text for language models: read, turned into tokens, cut into sequences of one length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resect.errors import FileError, InputError, check_all, unknown

LENGTH = 128  # tokens of a sequence, where the model takes as many
BYTES = 256


@dataclass(frozen=True)
class TextData:
    """Text as ``sequences`` of tokens, int64 (N, T); ``tokens`` says what a token is."""

    name: str
    sequences: Tensor
    tokens: str

    def batches(self, size: int, limit: int | None = None) -> list[dict[str, Tensor]]:
        """The first ``limit`` sequences, ``size`` at a time; a causal model shifts the ``labels`` by itself."""
        return [{"input_ids": part, "labels": part} for part in self.sequences[:limit].split(size)]


def open_text(place: str, model: Any, name: str, options: Mapping[str, Any]) -> TextData:
    """Read the text at ``place`` for ``model``, called ``name`` (``hf:…``).

    Tokens are those of the model's own tokenizer where transformers finds one on this machine, else bytes, where the
    model knows at least 256 tokens. ``options``: ``length``, tokens of a sequence (128, or as many as the model
    takes); what is left at the end is dropped.

    Raises
    ------
    InputError: an unknown option, a model that is no causal language model, or one that knows fewer tokens.
    FileError: no such file or folder, none of text in it, or too little.
    """
    check_all((str(unknown("option", option, ["length"])) for option in options if option != "length"), "Text")
    _check_causal(model, name)
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or LENGTH
    length = options.get("length", min(LENGTH, most))
    if not isinstance(length, int) or not 2 <= length <= most:
        raise InputError(f"Text: length must be a whole number from 2 to {most} tokens, not {length!r}.")
    text = _read(Path(place))
    tokens, kind = _tokens(text, name.removeprefix("hf:"), config.vocab_size)
    length = min(length, len(tokens))
    if length < 2:
        raise FileError(f"{place!r} holds {len(tokens)} tokens: too little text for a sequence of two.")
    whole = len(tokens) // length
    return TextData(f"text:{place}", torch.tensor(tokens[: whole * length]).view(whole, length), kind)


def _check_causal(model: Any, name: str) -> None:
    predicts = getattr(model, "can_generate", lambda: False)() and not model.config.is_encoder_decoder
    if not predicts or model.main_input_name != "input_ids":
        raise InputError(
            f"{name!r} is no causal language model of transformers, the only ones that text is for: hf:gpt2, hf:llama."
        )


def _read(path: Path) -> str:
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise FileError(f"There are no .txt files in {str(path)!r}.")
    try:
        return "\n".join(file.read_text(encoding="utf-8") for file in files)
    except FileNotFoundError:
        raise FileError(f"There is no text at {str(path)!r}: name a file, or a folder of .txt files.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{str(path)!r} cannot be read as text in UTF-8: {error}.") from error


def _tokens(text: str, name: str, known: int) -> tuple[list[int], str]:
    """The tokens of a text, and what they are."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception:  # there is none, or it needs a package that is missing: each says so in its own way
        tokenizer, tokens = None, list(text.encode())
    if tokenizer is not None and max(tokens, default=0) < known:
        return tokens, "tokens of its own tokenizer"
    if known < BYTES:
        raise InputError(f"'hf:{name}' has no tokenizer on this machine and knows {known} tokens, too few for bytes.")
    return list(text.encode()), "bytes, for want of its own tokenizer"
