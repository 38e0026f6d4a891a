"""Personal data and secrets in texts: found by their shapes and check digits, counted, and never shown whole.

What has a check digit (cards, IBANs) or a parser (IP addresses) is held against it; secrets have the marks that their issuers
gave them. Phone numbers are found in international notation and as North America writes them. Names, postal addresses and
numbers without a mark are not found.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Private(NamedTuple):
    """Something private in a text, from `begin` to `end`."""

    kind: str
    begin: int
    end: int


class _Kind(NamedTuple):
    """What is private: how it is called, what its shape is, what must stand in a text that holds it, and a closer look."""

    what: str
    shape: re.Pattern[str]
    marks: tuple[str, ...]
    holds: Callable[[str], bool] = lambda _: True


def _is_card(text: str) -> bool:
    """Tell whether digits end in the check digit of Luhn (ISO/IEC 7812), and aren't one digit again and again."""
    digits = [int(sign) for sign in text if sign.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """Tell whether the check digits of an IBAN hold (ISO 13616: 1 modulo 97)."""
    signs = text.replace(" ", "")
    return 15 <= len(signs) <= 34 and int("".join(str(int(sign, 36)) for sign in signs[4:] + signs[:4])) % 97 == 1


def _is_address(text: str) -> bool:
    """Tell whether this is the address of some machine, and not of this one or of none."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_multicast)


def _is_phone(text: str) -> bool:
    """Tell whether there are as many digits as a number has (ITU-T E.164: at most 15)."""
    return 8 <= sum(map(str.isdigit, text)) <= 15


DIGITS = tuple("0123456789")
# In this order: of what overlaps, the first kind is it.
KINDS: dict[str, _Kind] = {
    "private_key": _Kind(
        "a private key",
        re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z ]+-----|\Z)", re.DOTALL),
        ("PRIVATE KEY",),
    ),
    "jwt": _Kind(
        "a JSON web token",
        re.compile(r"(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*", re.ASCII),
        ("eyJ",),
    ),
    "api_key": _Kind(
        "an API key",
        re.compile(
            r"(?<![A-Za-z0-9])(?:(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"  # AWS
            r"|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,}"  # GitHub
            r"|xox[abeoprs]-[A-Za-z0-9-]{10,}"  # Slack
            r"|sk-(?=[\w-]*\d)[A-Za-z0-9_-]{20,}"  # OpenAI, Anthropic
            r"|[rs]k_live_[A-Za-z0-9]{16,}|AIza[A-Za-z0-9_-]{35}|hf_[A-Za-z0-9]{30,})",  # Stripe, Google, Hugging Face
        ),
        ("AKIA", "ASIA", "gh", "github_pat_", "xox", "sk-", "k_live_", "AIza", "hf_"),
    ),
    "email": _Kind(
        "an email address",
        re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])"),
        ("@",),
    ),
    "iban": _Kind(
        "an IBAN",
        re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])"),
        DIGITS,
        _is_iban,
    ),
    "card": _Kind(
        "a card number",
        re.compile(r"(?<![\w.+-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-])"),
        DIGITS,
        _is_card,
    ),
    "ip_address": _Kind(
        "an IP address",
        re.compile(
            r"(?<![\w.:-])(?:(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)"
            r"|(?=(?:[0-9A-Fa-f]*:){3})[0-9A-Fa-f:]{6,39}(?![\w:]))",
            re.ASCII,
        ),
        (".", ":"),
        _is_address,
    ),
    "phone": _Kind(
        "a phone number",
        re.compile(
            r"(?<![\w.+-])(?:(?:\+|00)[1-9](?:[ ./-]?\(?\d\)?){7,14}|(?:\([2-9]\d\d\) ?|[2-9]\d\d[-. ])[2-9]\d\d[-. ]\d{4})(?![\w-])",
            re.ASCII,
        ),
        DIGITS,
        _is_phone,
    ),
}


def find_private(text: str) -> list[Private]:
    """Return what is private in a text, in its order; nothing twice."""
    found: list[Private] = []
    for name, kind in KINDS.items():
        if any(mark in text for mark in kind.marks):
            for match in kind.shape.finditer(text):
                free = all(match.end() <= other.begin or other.end <= match.start() for other in found)
                if free and kind.holds(match[0]):
                    found.append(Private(name, match.start(), match.end()))
    return sorted(found, key=lambda item: item.begin)


def masked(text: str, item: Private) -> str:
    """Return what may be shown of something private: two characters, and how many there are."""
    return f"{text[item.begin : item.begin + 2]}..., {item.end - item.begin} characters"


def redact(value: Any, counts: dict[str, int]) -> Any:
    """Return a value with what is private in its texts replaced by `[EMAIL]` and the like; `counts` says how much of each kind.

    Names of fields stay, and so do numbers, which are no texts.
    """
    if isinstance(value, str):
        return _redact_text(value, counts)
    if isinstance(value, dict):
        return {name: redact(inner, counts) for name, inner in value.items()}
    return [redact(inner, counts) for inner in value] if isinstance(value, list) else value


def redacted_notes(counts: Mapping[str, int]) -> list[str]:
    """Return what there is to tell of what was replaced."""
    named = ", ".join(f"{count:,} x [{kind.upper()}]" for kind, count in sorted(counts.items()))
    return [f"private data replaced: {named}"] if named else []


def _redact_text(text: str, counts: dict[str, int]) -> str:
    parts, done = [], 0
    for item in find_private(text):
        parts += [text[done : item.begin], f"[{item.kind.upper()}]"]
        done = item.end
        counts[item.kind] = counts.get(item.kind, 0) + 1
    return "".join([*parts, text[done:]])
