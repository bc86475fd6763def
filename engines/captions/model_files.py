"""The files of a text encoder: a directory in the format of Hugging Face, as google/gemma-2-2b-it is published."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.bundle import sha256
from engines.errors import ConfigError

MODEL_TYPE = "gemma2"
_CONFIG = "config.json"
_TOKENIZER = "tokenizer.json"
_TOKENIZER_OPTIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"  # of weights in several files
_ADAPTER = "adapter_config.json"  # changes the weights while they are loaded


@dataclass(frozen=True)
class ModelFiles:
    """Files of a text encoder.

    Attributes:
        directory: Where they are.
        config: Content of config.json.
        names: Names of all files that determine the embeddings.
    """

    directory: Path
    config: Mapping[str, Any]
    names: tuple[str, ...]

    @property
    def model_name(self) -> str:
        """Return the name of the model: that of the directory, or of the repository in a cache of Hugging Face."""
        path = self.directory.resolve()
        cached = re.fullmatch(r"models--.+--(.+)", path.parent.parent.name)
        return cached[1] if cached and path.parent.name == "snapshots" else path.name

    def identity(self, **options: Any) -> str:
        """Return a SHA-256 in hexadecimal of the content of all files, and of `options`. Reads every file once.

        Raises:
            ConfigError: A file cannot be read.
        """
        hashes = {}
        for name in self.names:
            try:
                hashes[name] = sha256(self.directory / name)
            except OSError as error:
                raise _unreadable(self.directory / name, error) from error
        return hashlib.sha256(json.dumps([hashes, options], sort_keys=True).encode()).hexdigest()


def find_model_files(directory: Path) -> ModelFiles:
    """Find the files of a Gemma-2 in a directory.

    Raises:
        ConfigError: The directory or a file is missing, or the model is not a Gemma-2 with unquantised weights.
    """
    if not directory.is_dir():
        raise ConfigError(f"The text encoder {directory} is not a directory.")
    config = _read_object(directory, _CONFIG)
    if config.get("model_type") != MODEL_TYPE:
        raise ConfigError(
            f"The text encoder {directory} is a model of type {config.get('model_type')!r}; the decoders need "
            f"{MODEL_TYPE!r}, such as google/gemma-2-2b-it."
        )
    if "quantization_config" in config:
        raise ConfigError(f"The text encoder {directory} has quantised weights; use the original ones in bfloat16.")
    if (directory / _ADAPTER).exists():
        raise ConfigError(f"The text encoder {directory} has an adapter, {_ADAPTER}; merge it into the weights.")
    names = [_CONFIG, _TOKENIZER, *_weight_files(directory)]
    for name in names:
        if not (directory / name).is_file():
            raise _missing(directory, name)
    names += [name for name in _TOKENIZER_OPTIONS if (directory / name).is_file()]
    return ModelFiles(directory, config, tuple(names))


def _weight_files(directory: Path) -> list[str]:
    if (directory / _WEIGHTS).exists() or not (directory / _INDEX).exists():
        return [_WEIGHTS]
    places = _read_object(directory, _INDEX).get("weight_map")
    names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ConfigError(f"{directory / _INDEX} is not an index of weights; download it again.")
    return names


def _read_object(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise _missing(directory, name) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object; download it again.")
    return content


def _missing(directory: Path, name: str) -> ConfigError:
    return ConfigError(
        f"The text encoder {directory} has no file {name}; it needs {_CONFIG}, {_TOKENIZER} and the weights as "
        "safetensors."
    )


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be read: {error.strerror}.")
