"""YAML as settings need it: what a text says twice, or in a way that no setting can have, is an error and not a guess."""

from typing import Any

import yaml

from cvdd_ray.errors import ConfigError

MAX_BYTES = 2 << 20
MAX_VALUES = 100_000
"""Values of a text, those that aliases repeat counted each time: a short text can stand for billions."""

_KINDS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
_TEXT = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def read_yaml(content: str | bytes, name: str, advice: str = "") -> Any:
    """Return what a YAML text says, in plain values; `name` is used in messages, `advice` ends that about YAML as such.

    Raises ConfigError: not UTF-8, not YAML, too large or nested too deep, a key twice or not text, control characters, values
    of other kinds than text, numbers, true and false, null, lists and mappings (a Python object above all).
    """
    if isinstance(content, bytes):
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{name}: is larger than {MAX_BYTES >> 20} MiB, which no settings are; give a YAML text")
        try:
            content = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{name}: byte {error.start} is not UTF-8; give a YAML text, saved in the encoding UTF-8"
            ) from None
    loader = None
    try:
        loader = yaml.SafeLoader(content)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, name, "\n" in content.strip())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: cannot be read as YAML ({_reason(error)}){advice and f'; {advice}'}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ConfigError(f"{name}: cannot be read as YAML ({str(error).partition(';')[0]})") from None
    except RecursionError:
        raise ConfigError(f"{name}: lists or mappings are nested too deep; settings have a few levels") from None
    finally:
        if loader is not None:
            loader.dispose()


def _reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def _check(root: yaml.Node, name: str, has_lines: bool) -> None:
    """Raise ConfigError for a part of the text that is no setting."""
    waiting, seen = [root], 0
    while waiting:
        node, seen = waiting.pop(), seen + 1
        line = f"{name}, line {node.start_mark.line + 1}" if has_lines else name
        if seen > MAX_VALUES:
            raise ConfigError(
                f"{name}: stands for more than {MAX_VALUES:,} values, aliases (*name) followed; write out what is meant"
            )
        if node.tag not in _KINDS:
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise ConfigError(
                f"{line}: {_short(node)} is of the kind {kind!r}; settings are text, numbers, true or false, null, lists and "
                f"mappings: put text in quotes"
            )
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag not in _TEXT:
                    raise ConfigError(
                        f"{line}: {_short(key)} is a key, but not text; put it in quotes, or mend the indentation"
                    )
                if key.value in keys:
                    raise ConfigError(f"{line}: the key {key.value!r} is there twice in one place; keep one of them")
                keys.add(key.value)
                waiting += [key, value]
        elif any((ord(c) < 32 and c not in "\t\n\r") or 0xD800 <= ord(c) < 0xE000 for c in node.value):
            raise ConfigError(f"{line}: {node.value!r} has a control character or half a character; write it without")


def _short(node: yaml.Node) -> str:
    """Return a value in few words for a message."""
    if not isinstance(node, yaml.ScalarNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
    return repr(node.value if len(node.value) <= 60 else f"{node.value[:60]}...")
