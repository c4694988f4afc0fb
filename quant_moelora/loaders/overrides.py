"""What the quantisation config of a checkpoint says of one module: its overrides applied.

gptqmodel's "dynamic" (quantization/config.py): ordered regex -> overrides, matched by re.match on the whole module
name; the first match wins. The prefix "-:" means that the module is not quantised; "+:" or none, that the values
override bits, group_size, sym and so on. No values: it matches, and nothing is overridden.

auto-round's "extra_config" (as vLLM's inc/config_parser.py reads it): module name or regex -> overrides; the exact name
counts first, then a key that the name ends with, then the first key with a regex's characters that is found in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quant_moelora.core.errors import FormatError

EXCLUDE, INCLUDE = "-:", "+:"
_SPECIAL = frozenset(r"*+?^$()[]{}|\\")  # what tells a regex from a module name, whose dots would match anything


def module_config(module: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with the overrides of a quantised module, which its tensors must agree with.

    Raises:
        FormatError: the config says that the module is not quantised, or has a regex that is none.
    """
    dynamic, extra = (config.get(key) or {} for key in ("dynamic", "extra_config"))
    return {**config, **_dynamic(module, dynamic), **_extra(module, extra)}


def _dynamic(module: str, rules: Mapping[str, Mapping[str, Any] | None]) -> Mapping[str, Any]:
    for rule, values in rules.items():
        if not _pattern(rule.removeprefix(EXCLUDE).removeprefix(INCLUDE)).match(module):
            continue
        if rule.startswith(EXCLUDE):
            raise FormatError(
                f"quantised tensors of {module}",
                got=f"the rule {rule!r} of the quantization_config's dynamic",
                rule=f"no rule with {EXCLUDE}, which says that the module is not quantised",
                remedy="correct the config: another checkpoint's config.json may lie beside these weights",
            )
        return values or {}
    return {}


def _extra(module: str, rules: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if module in rules:
        return rules[module]
    for name, values in rules.items():
        if module.endswith(f".{name}"):
            return values
    for name, values in rules.items():
        if _SPECIAL & set(name) and _pattern(name).search(module):
            return values
    return {}


def _pattern(regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except re.error as error:
        raise FormatError(
            f"regex {regex!r} of the quantization_config",
            got=str(error),
            rule="a regular expression that Python reads",
            remedy="correct config.json",
        ) from error
