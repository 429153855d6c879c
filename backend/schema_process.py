"""Tries out JSON schemas as grammars, in a process that may be ended at any time.

Run as ``python -m backend.schema_process``, with a socket as its standard input and output. A
request is a schema as JSON, behind its length (``LENGTH``); the answer is an ``ANSWER`` and what is
wrong with the schema, or nothing. It ends with its parent, whose end of the socket closes, and by
itself where a schema takes too long or too much memory: a library that computes cannot be
interrupted otherwise.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from backend.schema_faults import BEYOND, in_words

# To compile one schema. Ordinary ones take milliseconds; an enum of 20,000 texts takes 0.1 s.
CPU_S = 1.0
WALL_S = 15.0  # where others use the cores too: it yields to them
MEMORY = 256 * 2**20  # bytes, at most
MAX_KEPT = 32 * 2**20  # bytes, once it is compiled: each model keeps some
# Bytes of leftovers of earlier schemas after which another process takes over.
MAX_LEFT = 64 * 2**20
NICE = 5

# What may stand between two parts of a document: else a model may write blanks without end.
BLANKS = r"[ ]?|\n[ ]{0,20}"
# Of 1 to 2 kB each, and shared by all who use a grammar; ordinary ones need some hundreds. The
# other limits are the library's own: each step of 14 ms for its lexer and 3 ms for its parser.
MAX_LEXER_STATES = 10_000

LENGTH = struct.Struct(">I")
ANSWER = struct.Struct(">II")  # bytes that the grammar takes, and of what is wrong


def build(library: Any, schema: str) -> Any:
    """The ``LLMatcher`` of a schema, which may be in an error state, with a limit on each step."""
    from llguidance import LLMatcher, LLParserLimits

    grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": BLANKS})
    limits = LLParserLimits(
        max_lexer_states=MAX_LEXER_STATES,
        precompute_large_lexemes=False,  # else the time depends on the vocabulary too
        verbose_errors=False,
    )
    return LLMatcher(library, grammar, log_level=0, limits=limits)


class _Bytes:
    """A vocabulary of all bytes and an end: the time to compile a schema does not depend on it."""

    eos_token_id, bos_token_id = 256, None
    special_token_ids = (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _try(library: Any, schema: str) -> tuple[int, str]:
    """The bytes that a grammar takes, and what is wrong with it; nothing if it can be used."""
    before = _memory()[1]
    try:
        matcher = build(library, schema)
        if not matcher.is_error():
            matcher.compute_bitmask()
    except (ValueError, RecursionError) as error:
        return 0, in_words(str(error))
    except MemoryError:
        return 0, too_much()
    if matcher.is_error():
        return 0, in_words(matcher.get_error())
    size = max(0, _memory()[1] - before)
    return size, too_large() if size > MAX_KEPT else ""


def too_slow() -> str:
    return _beyond(f"takes more than {CPU_S:g} s to compile")


def too_much() -> str:
    return _beyond(f"takes more than {MEMORY >> 20} MiB of memory to compile")


def too_large() -> str:
    return _beyond(f"takes more than {MAX_KEPT >> 20} MiB of memory")


def _beyond(limit: str) -> str:
    return f"{limit}; {BEYOND}"


def _memory() -> tuple[int, int]:
    """Bytes of addresses and of pages that this process uses; 0 where the system does not tell."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # or pages that an earlier schema has left would hide those of the next
    try:
        size, resident, *_ = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0, 0
    page = resource.getpagesize()
    return int(size) * page, int(resident) * page


def _read(count: int) -> bytes:
    return sys.stdin.buffer.read(count)


def main() -> None:
    from llguidance import LLTokenizer, TokenizerWrapper

    # Ctrl-C is for the parent, which ends this process by closing its socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError):
        os.nice(NICE)
    library = LLTokenizer(TokenizerWrapper(_Bytes()))
    size, resident = _memory()
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    while header := _read(LENGTH.size):
        schema = _read(LENGTH.unpack(header)[0]).decode()
        # Their signals end the process, whatever the library is doing.
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        signal.setitimer(signal.ITIMER_REAL, WALL_S)
        size, fault = _try(library, schema)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        text = fault.encode()
        sys.stdout.buffer.write(ANSWER.pack(size, len(text)) + text)
        sys.stdout.buffer.flush()
        if _memory()[1] - resident > MAX_LEFT:
            return


if __name__ == "__main__":
    main()
