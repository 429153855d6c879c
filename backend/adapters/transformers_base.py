"""What every transformers adapter shares: a tokenizer, a model, and the model's window."""

from __future__ import annotations

from typing import Any, ClassVar

from backend.adapters.base import Adapter
from backend.adapters.hub import pick_device
from backend.adapters.long_texts import or_more, readable
from backend.adapters.memory import dtype_name, quantize
from backend.adapters.packing import keep_packed
from backend.adapters.words import bound_words
from backend.errors import InvalidRequest

# Of a model that names no limit. It compares each with each other one: of these, T5's 8 heads make
# 2 GB of scores; of a million characters it would be terabytes.
MAX_TOKENS = 2**13


class TransformersAdapter(Adapter):
    """Loads ``auto_class`` and its tokenizer from the entry's weights."""

    auto_class: ClassVar[str]
    memory_ways = frozenset(("quantize",))

    def load(self) -> None:
        import transformers

        quiet()
        weights, revision = self.weights
        self.device = pick_device(self.device)
        trust = {k: v for k, v in self.spec.load_kwargs.items() if k == "trust_remote_code"}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(weights, **revision, **trust)
        bound_words(self.tokenizer)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        how = {"dtype": self.wanted_dtype(self.device), **revision, **self.spec.load_kwargs}
        model = getattr(transformers, self.auto_class).from_pretrained(weights, **how)
        quantize([model], self.spec.memory, self.device)
        # A device map in the entry's `load` has placed the model already.
        self.model = model if "device_map" in how else model.to(self.device)
        self.model.eval()
        self.dtype = dtype_name(self.model.dtype, self.spec.memory)
        # A classifier on a decoder finds a text's last token by the padding after it.
        config = self.model.config.get_text_config()
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        self.window = model_window(self.model, self.tokenizer)
        if self.window is not None:
            self.tokenizer.model_max_length = self.window
        self.pack()

    def pack(self) -> None:
        """Have the linear layers as a processor's kernels want them."""
        keep_packed(self.model)

    def unload(self) -> None:
        del self.model, self.tokenizer

    def readable(self, text: str, at: str = "input") -> str:
        """A text, or as much of a long one as tells that it does not fit; see ``long_texts``."""
        from_end = self.tokenizer.truncation_side == "left"
        return readable(text, self.window, self.tokenizer, at=at, from_end=from_end)

    def count_tokens(self, texts: list[str], pairs: list[str] | None = None) -> list[int]:
        encoded = self.tokenizer(texts, pairs, add_special_tokens=True, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def too_long(self, tokens: int, what: str = "input") -> InvalidRequest:
        return too_long(tokens, self.window or 0, what)


def too_long(tokens: int, window: int, what: str = "input") -> InvalidRequest:
    """The refusal of an input that does not fit the model's window."""
    return InvalidRequest.of(
        {
            what: f"has {or_more(tokens, window)} tokens and the model's window is {window}; "
            "shorten it, or set options.truncate to true"
        }
    )


def model_window(model: Any, tokenizer: Any) -> int:
    """The most tokens the model reads.

    The tokenizer's limit and the number of positions, whichever is lower, or ``MAX_TOKENS`` where
    it names neither; RoBERTa and its kin begin to count positions after the padding id, and lose
    those.
    """
    limits = []
    if tokenizer.model_max_length < 10**9:  # else "unknown", which transformers writes as 1e30
        limits.append(tokenizer.model_max_length)
    config = model.config.get_text_config()
    names = ("max_encoder_position_embeddings", "max_position_embeddings")
    if positions := next((n for name in names if (n := getattr(config, name, None))), None):
        base = getattr(model.base_model, "embeddings", None)
        table = getattr(base, "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        limits.append(positions if padding is None else positions - padding - 1)
    return min(limits, default=MAX_TOKENS)


def quiet() -> None:
    """Keep progress bars out of the log."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
