"""Stores configured by a config's `store` section."""

from __future__ import annotations

from mirl_dist.config import schema
from mirl_dist.storage import Options, Store, open_store


def options_of(section: schema.StoreSection) -> Options:
    """Return the options of a config's `store` section."""
    return Options(section.endpoint, section.encryption, section.kms_key, section.patience_seconds)


def open_configured(section: schema.StoreSection, address: str) -> Store:
    """Open the store at an address with the options of a config's `store` section. Raises as `open_store`."""
    return open_store(address, options_of(section))
