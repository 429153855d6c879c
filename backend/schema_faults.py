"""What a grammar library finds wrong with a JSON schema, in a caller's words."""

from __future__ import annotations

import re

BEYOND = (
    "use fewer or simpler patterns, allOf, multipleOf, enums and bounds, or ask for json_object"
)
_END = (
    "give it an alternative that ends (anyOf), or make what repeats a property that is not required"
)
# Of each message of llguidance that a schema may come to, and what it means; the first that fits.
# All others are not for callers to read.
_MEANINGS = [
    (r"NoExtensionBias", f"has a $ref that leads back to itself and to nothing else; {_END}"),
    (
        r"circular references with sibling keys.*",
        "has a $ref that leads back to itself, and other keywords beside it; leave out either",
    ),
    (
        r"Schema intersection stack level exceeded",
        f"has an allOf whose parts refer to each other without end; {_END}",
    ),
    (r"Unimplemented keys: \[(.*)\]", "has keywords that are not supported: {}; leave them out"),
    (
        r"oneOf constraints are not supported.*",
        "has a oneOf of which more than one may hold; use anyOf",
    ),
    (
        r"Unsatisfiable schema: .*Regex is empty.*",
        "allows no document: its patterns and bounds contradict each other",
    ),
    (r"Unsatisfiable schema: (.*)", "allows no document: {}"),
    (r"Pointer '(.*)' does not exist", "has a $ref to {}, which is not in it"),
    (r"Resource '(.*)' is not present.*", "refers to {}, and none is fetched; put it under $defs"),
    (r"regex parse error:.*error: (.*)", "has a pattern that is not supported: {}"),
    (r"recursion limit exceeded.*", "is nested too deeply"),
    (r"invalid multiple of", "has a multipleOf that is not above 0"),
    (
        r"((?:Invalid type|Unknown format): .*|\S+ must be .*|Expected .* for '.*|"
        r"Value for '.*' has too many digits.*)",
        "is not a JSON schema that is supported: {}",
    ),
    (
        r"Unable to determine if regex is empty.*|.*\b(?:too (?:big|large|many|complex)|limit)\b.*",
        f"is too complex; {BEYOND}",
    ),
]
_UNKNOWN = "cannot be kept to; use type, properties, required, items, enum and anyOf alone"
MAX_QUOTED = 120  # characters of what the library quotes


def in_words(message: str) -> str:
    """What is wrong with a schema of which the library says ``message``, and what to do."""
    message = message.removesuffix("<non-verbose/>").strip()
    for pattern, meaning in _MEANINGS:
        if found := re.fullmatch(pattern, message, re.DOTALL):
            return meaning.format(*(quoted[:MAX_QUOTED] for quoted in found.groups()))
    return _UNKNOWN
