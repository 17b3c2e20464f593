"""Jinja2 environments for the templates of this folder."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def make_environment(**options: Any) -> Environment:
    """Return an environment in which a missing value is an error. options: of jinja2.Environment."""
    loader = PackageLoader("mirl_dist.tickets.report")
    return Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options)
