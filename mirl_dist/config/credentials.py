"""Checks credentials of the environment before their use, and masks secrets in every form that a library prints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from urllib.parse import quote, quote_plus

from mirl_dist.errors import UserError

_SHORTEST = 4  # characters; masking shorter ones would garble ordinary words


def check_variables(names: Iterable[str], *, is_encoded: bool = False) -> None:
    """Raise UserError for a variable with white space, a line end or another unprintable or non-ASCII character.

    is_encoded: the library encodes the value, so that only a line end at its end is a mistake.

    HTTP headers cannot carry these. Libraries quote the value in their error, or send a request that no server accepts.
    """
    for name in names:
        value = os.environ.get(name, "")
        refused = next((c for c in value if (c in "\r\n" if is_encoded else not ("!" <= c <= "~"))), None)
        if refused is not None:
            kinds = {"\r": "a line end", "\n": "a line end"}
            what = kinds.get(refused, "white space" if refused.isspace() else "a character outside ASCII")
            raise UserError(
                f"{name}: found {what} in its value, of {len(value)} characters. Set it again without (a file's last "
                "line end is a common cause)."
            )


def written_forms(secrets: Iterable[str]) -> list[str]:
    """Return how texts may spell secrets: as they are, without white space around them, escaped, quoted for a URL.

    Longest first, as one may contain another.
    """
    forms = {form for secret in secrets for form in _forms(secret) if len(form) >= _SHORTEST}
    return sorted(forms, key=len, reverse=True)


def mask(text: str, forms: Iterable[str]) -> str:
    """Replace the forms of secrets (`written_forms`) by ***."""
    for form in forms:
        text = text.replace(form, "***")
    return text


def _forms(secret: str) -> set[str]:
    plain = {secret, secret.strip()}
    written = (lambda one: repr(one)[1:-1], lambda one: json.dumps(one)[1:-1], quote, quote_plus)
    return plain | {write(one) for one in plain for write in written} | {quote(one, safe="") for one in plain}
