"""Which modules a list of names, globs and regular expressions means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

PackedModules = Mapping[str, Sequence[str]]
"""Last component of a fused module -> its parts: `{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}`. Routed experts that
run as one module fit in as well: `{"experts": ["experts.0.gate_proj", "experts.0.up_proj", "experts.0.down_proj"]}`."""


@lru_cache(maxsize=1024)
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)


def check_pattern(pattern: str) -> str:
    """`pattern` itself; ValueError if it is empty or a `re:` expression that does not compile."""
    if not pattern.removeprefix("re:").strip():
        raise ValueError(f"{pattern!r} is empty")
    if pattern.startswith("re:"):
        try:
            _compiled(pattern[3:])
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` means the module `name` (dotted).

    `re:...` is matched from the start of the name, as compressed-tensors does; a pattern with `*`, `?` or `[` is a
    glob over the whole name, as ModelOpt writes them; any other pattern is a name and also means the modules beneath it
    and those that end in it, by whole components: `lm_head`, `model.layers.0`, `mlp.gate` (never `mlp.gate_proj`).
    """
    if pattern.startswith("re:"):
        return _compiled(pattern[3:]).match(name) is not None
    if any(character in pattern for character in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def parts_of(name: str, packed: PackedModules | None) -> list[str]:
    """The checkpoint's names of the modules that run as `name`: `[name]` where it is not a fused one."""
    parent, _, last = name.rpartition(".")
    if not packed or last not in packed:
        return [name]
    return [f"{parent}.{part}" if parent else part for part in packed[last]]


def matches_any(patterns: Iterable[str], name: str, packed: PackedModules | None = None) -> bool:
    """Whether any pattern means `name`, or, of a fused module, each of its parts; ValueError as from `matches_parts`."""
    patterns = tuple(patterns)
    return any(matches(pattern, name) for pattern in patterns) or matches_parts(patterns, name, parts_of(name, packed))


def matches_parts(patterns: Sequence[str], name: str, parts: Sequence[str]) -> bool:
    """Whether the patterns mean each of the `parts` of the fused module `name`.

    Raises ValueError where they mean some of the parts and not others: it is one matrix and cannot be half quantized.
    """
    meant = [part for part in parts if any(matches(pattern, part) for pattern in patterns)]
    if meant and len(meant) != len(parts):
        others = [part for part in parts if part not in meant]
        raise ValueError(
            f"the patterns {', '.join(patterns)} mean {first_names(meant)} but not {first_names(others)}, which run as one "
            f"fused layer {name}: name all of them or none"
        )
    return bool(meant)


def first_names(names: Sequence[str]) -> str:
    """The first of `names` and how many more, for a message: routed experts have hundreds of parts."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def unmatched(patterns: Iterable[str], names: Iterable[str], packed: PackedModules | None = None) -> list[str]:
    """The patterns that mean none of `names` nor any part of a fused one, in their order."""
    every = {part for name in names for part in (name, *parts_of(name, packed))}
    return [pattern for pattern in patterns if not any(matches(pattern, name) for name in every)]
