"""Keeps what a model writes to JSON, or to a JSON schema, to the last token of its room."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from backend.adapters import compiler
from backend.adapters.base import Entry
from backend.adapters.compiler import Abandoned, SchemaRefused
from backend.errors import InvalidRequest
from backend.schema_faults import in_words
from backend.schema_process import build

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("crane.engine")

# Grammars of a model, and their bytes; an ordinary one takes some milliseconds and kilobytes.
MAX_KEPT, MAX_KEPT_BYTES = 16, 64 * 2**20
MOST_ENDING = 1024  # tokens that a document may need at least
# Seconds of the CPU to find a grammar's shortest document, beside the model's thread.
MAX_ENDING_S = 2.0
# Seconds of the model's thread that a document's grammar may take: at its start, and for each token
# on top. An ordinary one takes 0.2 ms a token. One that takes more is ended the shortest way.
ALLOWANCE_S, TOKEN_ALLOWANCE_S = 0.25, 0.002
# How a document ends soonest, the first that is allowed: it is closed, what must be in it is as
# short as can be, and a text that has to be so long is letters.
CLOSERS = ("}", "]", '"', ",", ":", "0", "1", "n", "t", "[", "{", "a")
WITHIN_TEXT = 3  # where each of the first ones may follow, it is a text that has to be closed


@dataclass(frozen=True)
class Form:
    """What a text is kept to, and the field of the call that asks for it."""

    schema: Mapping[str, Any]
    at: str

    def refused(self, fault: str) -> InvalidRequest:
        return InvalidRequest.of({self.at: fault})


@dataclass(frozen=True)
class Grammar:
    """A compiled schema: its matcher in the initial state, and the tokens of a short document."""

    matcher: Any
    ending: list[int]
    size: int  # bytes


class Grammars:
    """The grammars of one model, compiled beside its thread; the last used are kept."""

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        """``ends`` are the tokens that end a text."""
        self._tokenizer = tokenizer
        self.ends = sorted(ends)
        self.closers: list[int] = []
        self._library: Any = None
        self._kept: OrderedDict[bytes, Future[Grammar]] = OrderedDict()
        self._lock = threading.Lock()  # so that no two threads change what is kept

    def compile(self, form: Form, entry: Entry) -> Future[Grammar]:
        """The grammar of an entry's form, which it may have waited for before; ``start`` takes it.

        Raises ``InvalidRequest`` where the model cannot be kept to any.
        """
        waited_for: Future[Grammar] | None = entry.prepared
        if waited_for is not None and not isinstance(waited_for.exception(), Abandoned):
            return waited_for
        if self._library is None:
            self._library = self._read_tokens(form)
        schema = orjson.dumps(form.schema)
        future = self._kept.get(schema)
        if future is None or not _is_final(future):
            future = compiler.submit(
                schema.decode(),
                partial(self._build, schema.decode()),
                caller=entry.caller,
                wanted=lambda: not entry.cancelled(),
            )
            future.add_done_callback(lambda _: self._drop_oldest())
        with self._lock:
            self._kept[schema] = future
            self._kept.move_to_end(schema)
        self._drop_oldest()
        return future

    def _drop_oldest(self) -> None:
        """Keep no more than may be; also in the compiler's threads, as a size becomes known."""
        with self._lock:
            sizes = {schema: _size(future) for schema, future in self._kept.items()}
            while len(sizes) > MAX_KEPT or sum(sizes.values()) > MAX_KEPT_BYTES:
                oldest = next(iter(sizes))
                del sizes[oldest], self._kept[oldest]

    def start(self, compiled: Future[Grammar], form: Form, room: int) -> Constraint:
        """Keep a text to a compiled form.

        Raises ``InvalidRequest`` for one that cannot be kept to, also not in so many tokens.
        """
        try:
            grammar = compiled.result(timeout=0)
        except SchemaRefused as error:
            raise form.refused(str(error)) from None
        if len(grammar.ending) > room:
            fault = f"is too few for {form.at}, which needs {len(grammar.ending)}"
            raise InvalidRequest.of({"options.max_tokens": fault})
        return Constraint(self, grammar, room)

    def _build(self, schema: str, size: int) -> Grammar:
        """Compile a schema that was tried out; in a thread of ``Compiler``."""
        matcher = build(self._library, schema)
        until = time.thread_time() + MAX_ENDING_S
        ending = shortest(matcher.deep_copy(), self.closers, MOST_ENDING, until)
        if matcher.is_error():
            raise SchemaRefused(in_words(matcher.get_error()))
        if ending is None:
            raise SchemaRefused(
                f"has no document of less than {MOST_ENDING} tokens that is found in "
                f"{MAX_ENDING_S:g} s; lower its minItems, minLength and required properties"
            )
        return Grammar(matcher, ending, size)

    def _read_tokens(self, form: Form) -> Any:
        """The library's view of the vocabulary: 0.3 s, once, in the model's thread."""
        import llguidance.hf
        from llguidance import LLTokenizer, TokenizerWrapper

        if not self.ends:
            raise form.refused("is not for a model that has no token for the end")
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        try:
            if type(getattr(backend, "decoder", None)).__name__ == "Metaspace":
                # Which the library does not know by itself.
                pieces = TokenizerWrapper(_Pieces(self._tokenizer, self.ends))
                library = LLTokenizer(pieces, eos_token=self.ends)
            else:
                library = llguidance.hf.from_tokenizer(self._tokenizer, eos_token=self.ends)
            self.closers = [token for text in CLOSERS for token in library.tokenize_str(text)[:1]]
        except ValueError:
            fault = "is not for a model whose tokens are no pieces of text"
            raise form.refused(fault) from None
        return library


def _is_final(future: Future[Grammar]) -> bool:
    """Whether a schema's outcome would be the same another time, as far as it is known."""
    if not future.done():
        return True
    error = future.exception()
    return error is None or isinstance(error, SchemaRefused)


def _size(future: Future[Grammar]) -> int:
    return future.result().size if future.done() and not future.exception() else 0


class Constraint:
    """One text's document: ``mask`` the scores of its next token, then ``take`` what is chosen.

    A way to the end is known at any time, and never longer than the room that is left: a token
    after which it would be is not written, but the next one of that way. Where the grammar fails or
    takes too long, the rest of that way is all that is written.
    """

    def __init__(self, grammars: Grammars, grammar: Grammar, room: int) -> None:
        self._ends = grammars.ends
        self._closers = grammars.closers
        self._matcher: Any = grammar.matcher.deep_copy()  # None once only the ending is left
        self._room = room
        self._ending = grammar.ending
        self._allowance_s = ALLOWANCE_S
        self.done = False
        self.cut_short = False  # by its grammar, and not by the model

    def mask(self, scores: torch.Tensor) -> None:
        """Set the scores, [vocabulary], of what may not follow to -inf."""
        import torch

        if self._matcher is None:  # whatever is chosen, the next token is known
            return
        began = time.thread_time()
        allowed = np.zeros(len(scores), dtype=bool)
        follows = _follows(self._matcher)[: len(scores)]
        self._allowance_s -= time.thread_time() - began
        if self._matcher.is_error():  # a limit of its steps
            self._cut_short()
            return
        allowed[: len(follows)] = follows
        scores.masked_fill_(torch.from_numpy(~allowed).to(scores.device), -torch.inf)

    def take(self, token: int) -> int:
        """Go on with a token that ``mask`` allowed, or with another: that which is written."""
        if self._matcher is None:
            return self._end()
        if token in self._ends:
            self.done = True
            return token
        began = time.thread_time()
        ending = self._ending_after(token, began + self._allowance_s)
        if ending is None or len(ending) >= self._room:
            if not self._ending:
                self.done = True
                return self._ends[0]
            token, *ending = self._ending
        self._matcher.consume_token(token)
        self._ending = ending
        self._room -= 1
        self.done = self._matcher.is_stopped() or not self._room
        self._allowance_s += TOKEN_ALLOWANCE_S - (time.thread_time() - began)
        if not self.done and self._allowance_s < 0:
            self._cut_short()
        return token

    def _cut_short(self) -> None:
        logger.warning("a grammar took too long, and its document was ended the shortest way")
        self._matcher, self.cut_short = None, True

    def _end(self) -> int:
        """The next token of the ending."""
        if not self._ending:
            self.done = True
            return self._ends[0]
        token, *self._ending = self._ending
        self._room -= 1
        self.done = not self._ending
        return token

    def _ending_after(self, token: int, until: float) -> list[int] | None:
        """The way to the end after a token; None where it would be longer than the room."""
        if self._ending and self._ending[0] == token:
            return self._ending[1:]
        after = self._matcher.deep_copy()
        if not after.consume_token(token):
            return None
        as_before = after.deep_copy()  # as within a text, whatever is written there
        if as_before.consume_tokens(self._ending) and as_before.is_accepting():
            return self._ending
        return shortest(after, self._closers, self._room, until)


def shortest(matcher: Any, closers: list[int], most: int, until: float) -> list[int] | None:
    """A short way to the end in less than ``most`` tokens.

    None where there is none, or it is not found by ``until``, of ``time.thread_time()``.
    """
    way: list[int] = []
    while not matcher.is_accepting():
        follows = _follows(matcher)
        found = np.flatnonzero(follows)
        if len(way) >= most or not len(found) or time.thread_time() > until:
            return None
        may = [one for one in closers if follows[one]] or [int(found[0])]
        within = may[:WITHIN_TEXT] == closers[:WITHIN_TEXT]
        token = may[WITHIN_TEXT - 1 if within else 0]
        matcher.consume_token(token)
        way.append(token)
    return way


def _follows(matcher: Any) -> np.ndarray[Any, Any]:
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    if matcher.is_error():
        return np.zeros(8 * len(bits), dtype=bool)
    return np.unpackbits(bits, bitorder="little").astype(bool)


class _Pieces:
    """A tokenizer whose tokens are text with ▁ for a blank, as the library asks for one."""

    def __init__(self, tokenizer: Any, ends: list[int]) -> None:
        from tokenizers import Tokenizer

        self.eos_token_id = ends[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = list({*tokenizer.all_special_ids, *ends})
        pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self.tokens = [piece.replace("▁", " ").encode() for piece in pieces]
        # One of its own: schemas are compiled in other threads than the model's.
        self._own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._own.no_padding()
        self._own.no_truncation()

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._own.encode(text, add_special_tokens=False).ids
        return ids
