"""A file of options: TOML, or YAML as vLLM has it."""

import tomllib
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError


def read_config(path: str) -> dict[str, Any]:
    """The file's options as written, with `_` for `-` in their names. Raises `ConfigError`."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from None
    if file.suffix not in _READERS:
        raise ConfigError(f"the config file {path} must end in .toml, .yaml or .yml")
    content = _READERS[file.suffix](text, path)
    if not isinstance(content, dict):
        raise ConfigError(f"the config file {path} must hold lines of the form option: value")
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in options:
            raise ConfigError(f"{name} stands twice in the config file {path}")
        options[name] = value
    return options


def _toml(text: str, path: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the config file {path} is not TOML: {error}") from None


def _yaml(text: str, path: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"the config file {path} is not YAML: {error}") from None


_READERS = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml}
