"""Keeps what a model writes to JSON, or to a JSON schema, to the last token of its room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from backend.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

MOST_KEPT = 16  # grammars of a model; an ordinary one takes some milliseconds to make
MOST_ENDING = 1024  # tokens that a document may need at least
# What may stand between two parts of a document: else a model may write blanks without end.
BLANKS = r"[ ]?|\n[ ]{0,20}"
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


class Grammars:
    """The grammars of one model: what its tokens spell is read once, when first needed."""

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        """``ends`` are the tokens that end a text."""
        self._tokenizer = tokenizer
        self.ends = sorted(ends)
        self.closers: list[int] = []
        self._library: Any = None
        self._kept: OrderedDict[bytes, Any] = OrderedDict()

    def start(self, form: Form, room: int) -> Constraint:
        """Keep a text to a form.

        Raises ``InvalidRequest`` for one that cannot be kept to, also not in so many tokens.
        """
        from llguidance import LLMatcher

        key = orjson.dumps(form.schema)
        if key not in self._kept:
            grammar = LLMatcher.grammar_from_json_schema(
                dict(form.schema), overrides={"whitespace_pattern": BLANKS}
            )
            matcher = LLMatcher(self._known_tokens(form), grammar, log_level=0)
            if matcher.is_error():
                raise form.refused(f"cannot be kept to: {matcher.get_error()[:200]}")
            self._kept[key] = matcher
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return Constraint(self, self._kept[key].deep_copy(), form, room)

    def _known_tokens(self, form: Form) -> Any:
        import llguidance.hf
        from llguidance import LLTokenizer, TokenizerWrapper

        if self._library is not None:
            return self._library
        if not self.ends:
            raise form.refused("is not for a model that has no token for the end")
        decoder = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "decoder", None)
        try:
            if type(decoder).__name__ == "Metaspace":  # which the library does not know by itself
                pieces = TokenizerWrapper(_Pieces(self._tokenizer, self.ends))
                library = LLTokenizer(pieces, eos_token=self.ends)
            else:
                library = llguidance.hf.from_tokenizer(self._tokenizer, eos_token=self.ends)
            self.closers = [token for text in CLOSERS for token in library.tokenize_str(text)[:1]]
        except ValueError:
            fault = "is not for a model whose tokens are no pieces of text"
            raise form.refused(fault) from None
        self._library = library
        return library


class Constraint:
    """One text's document: ``mask`` the scores of its next token, then ``take`` what is chosen.

    A way to the end is known at any time, and never longer than the room that is left: a token
    after which it would be is not written, but the next one of that way.
    """

    def __init__(self, grammars: Grammars, matcher: Any, form: Form, room: int) -> None:
        self._ends = grammars.ends
        self._closers = grammars.closers
        self._matcher = matcher
        self._room = room
        self.done = False
        ending = self._shortest(matcher.deep_copy(), MOST_ENDING)
        if ending is None:
            raise form.refused(f"has no document of less than {MOST_ENDING} tokens")
        if len(ending) > room:
            fault = f"is too few for {form.at}, which needs {len(ending)}"
            raise InvalidRequest.of({"options.max_tokens": fault})
        self._ending = ending

    def mask(self, scores: torch.Tensor) -> None:
        """Set the scores, [vocabulary], of what may not follow to -inf."""
        import torch

        allowed = np.zeros(len(scores), dtype=bool)
        follows = self._follows(self._matcher)[: len(scores)]
        allowed[: len(follows)] = follows
        scores.masked_fill_(torch.from_numpy(~allowed).to(scores.device), -torch.inf)

    def take(self, token: int) -> int:
        """Go on with a token that ``mask`` allowed, or with another: that which is written."""
        if token in self._ends:
            self.done = True
            return token
        ending = self._ending_after(token)
        if ending is None or len(ending) >= self._room:
            if not self._ending:
                self.done = True
                return self._ends[0]
            token, *ending = self._ending
        self._matcher.consume_token(token)
        self._ending = ending
        self._room -= 1
        self.done = self._matcher.is_stopped() or not self._room
        return token

    def _ending_after(self, token: int) -> list[int] | None:
        """The way to the end after a token; None where it would be longer than the room."""
        if self._ending and self._ending[0] == token:
            return self._ending[1:]
        after = self._matcher.deep_copy()
        if not after.consume_token(token):
            return None
        as_before = after.deep_copy()  # as within a text, whatever is written there
        if as_before.consume_tokens(self._ending) and as_before.is_accepting():
            return self._ending
        return self._shortest(after, self._room)

    def _shortest(self, matcher: Any, most: int) -> list[int] | None:
        """A short way to the end in less than ``most`` tokens."""
        way: list[int] = []
        while not matcher.is_accepting():
            follows = self._follows(matcher)
            found = np.flatnonzero(follows)
            if len(way) >= most or not len(found):
                return None
            closers = [one for one in self._closers if follows[one]] or [int(found[0])]
            within = closers[:WITHIN_TEXT] == self._closers[:WITHIN_TEXT]
            token = closers[WITHIN_TEXT - 1 if within else 0]
            matcher.consume_token(token)
            way.append(token)
        return way

    def _follows(self, matcher: Any) -> np.ndarray[Any, Any]:
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            return np.zeros(8 * len(bits), dtype=bool)
        return np.unpackbits(bits, bitorder="little").astype(bool)


class _Pieces:
    """A tokenizer whose tokens are text with ▁ for a blank, as the library asks for one."""

    def __init__(self, tokenizer: Any, ends: list[int]) -> None:
        self.eos_token_id = ends[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = list({*tokenizer.all_special_ids, *ends})
        pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self.tokens = [piece.replace("▁", " ").encode() for piece in pieces]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._encode(text, add_special_tokens=False)
        return ids
