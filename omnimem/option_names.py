"""Names of options that Python reserves: `lambda` in recipes, profiles and commands is the parameter `lambda_`."""

from __future__ import annotations

from keyword import iskeyword


def option_name(parameter: str) -> str:
    """Name of a parameter or field in recipes, profiles and commands."""
    return parameter.rstrip("_")


def parameter_name(option: str) -> str:
    """Name of an option as a Python parameter or field."""
    return f"{option}_" if iskeyword(option) else option
