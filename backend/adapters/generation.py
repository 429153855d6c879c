"""Text generation through transformers' ``generate``, many callers' prompts in one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from backend.adapters.base import Batch, Prediction
from backend.adapters.transformers_base import TransformersAdapter
from backend.errors import CraneError, InvalidRequest, ModelUnavailable

if TYPE_CHECKING:
    import torch


class Generator(TransformersAdapter):
    """What decoder-only and encoder-decoder generators share."""

    def prompts(self, batch: Batch) -> list[str | CraneError]:
        """The text that the tokenizer gets for each input."""
        return list(batch.inputs)

    def encode(self, prompts: list[str], options: dict[str, Any]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(prompts, verbose=False)["input_ids"]
        return ids

    def fit(self, ids: list[int], options: dict[str, Any]) -> list[int]:
        """Cut a prompt's tokens to the window."""
        raise NotImplementedError

    def new_tokens(self, row: list[int], prompt_length: int) -> list[int]:
        """The written tokens of a row that ``generate`` returned."""
        raise NotImplementedError

    def ceiling(self) -> int | None:
        """The most tokens that a row may have altogether."""
        return self.window

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        results: dict[int, Prediction | CraneError] = {}
        prompts: dict[int, list[int]] = {}
        cut: set[int] = set()
        texts = self.prompts(batch)
        known = [text for text in texts if isinstance(text, str)]
        encoded = iter(self.encode(known, batch.options) if known else [])
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                results[index] = text
                continue
            ids = next(encoded)
            if not ids:
                results[index] = InvalidRequest.of({"input": "has no token that this model knows"})
                continue
            if self.window is not None and len(ids) > self.longest_prompt():
                if not batch.options["truncate"]:
                    results[index] = self.too_long(len(ids))
                    continue
                cut.add(index)
                ids = self.fit(ids, batch.options)
            prompts[index] = ids
        if prompts:
            written = self._generate(list(prompts.values()), list(prompts), batch)
            for index, prediction in zip(prompts, written, strict=True):
                if index in cut:
                    prediction.facts["truncated"] = True
                results[index] = prediction
        return [results[index] for index in range(len(batch))]

    def longest_prompt(self) -> int:
        return self.window or 0

    def _generate(
        self, prompts: list[list[int]], places: list[int], batch: Batch
    ) -> list[Prediction]:
        """Write after each prompt; ``places[row]`` is the row's place in the batch."""
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        options = batch.options
        padded = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.device)
        length = padded["input_ids"].shape[1]
        ceiling = self.ceiling()
        room = [
            options["max_tokens"] if ceiling is None else min(options["max_tokens"], ceiling - used)
            for used in self.used(prompts)
        ]
        stop = _stopping(
            room=torch.tensor(room, device=self.device),
            start=length if self.padding_side else 1,
            cancelled=lambda: [batch.cancelled(place) for place in places],
            num_beams=options["num_beams"],
        )
        kwargs: dict[str, Any] = {}
        if options["stop"]:
            kwargs["tokenizer"] = self.tokenizer
        with torch.inference_mode():
            output = self.model.generate(
                **padded,
                **kwargs,
                generation_config=self.config(options, max(room)),
                logits_processor=LogitsProcessorList(
                    _sampling(options, [batch.seeds[place] for place in places], self.device)
                ),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        return [
            self._prediction(self.new_tokens(row, length), len(prompt), most, options)
            for row, prompt, most in zip(output.tolist(), prompts, room, strict=True)
        ]

    def used(self, prompts: list[list[int]]) -> list[int]:
        """How many tokens of the ceiling each row has used before anything is written."""
        raise NotImplementedError

    def config(self, options: dict[str, Any], max_new_tokens: int) -> Any:
        """The checkpoint's own generation settings, with the caller's options in their place."""
        config = copy.deepcopy(self.model.generation_config)
        config.max_length = config.min_length = None
        config.max_new_tokens = max_new_tokens
        config.min_new_tokens = min(options["min_tokens"], max_new_tokens)
        # Drawing is done by _Draw, row by row: do_sample would share one random state.
        config.do_sample = False
        config.temperature, config.top_p, config.top_k = None, None, None
        config.num_beams = options["num_beams"]
        config.repetition_penalty = options["repetition_penalty"]
        config.stop_strings = options["stop"] or None
        config.pad_token_id = self.tokenizer.pad_token_id
        return config

    def _prediction(
        self, ids: list[int], prompt_tokens: int, most: int, options: dict[str, Any]
    ) -> Prediction:
        ids, ended = self._until_end(ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if places := [at for stop in options["stop"] if (at := text.find(stop)) >= 0]:
            text, ended = text[: min(places)], True
        usage = {"input_tokens": prompt_tokens, "output_tokens": len(ids)}
        reason = "length" if not ended and len(ids) >= most else "stop"
        return Prediction(text, usage, {"finish_reason": reason})

    def _until_end(self, ids: list[int]) -> tuple[list[int], bool]:
        """A row's tokens up to and with its end token, without padding; whether it has one."""
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        for place, token in enumerate(ids):
            if token in ends:
                return ids[: place + 1], True
        while ids and ids[-1] == self.tokenizer.pad_token_id:
            ids = ids[:-1]
        return ids, False


class CausalGenerator(Generator):
    """A decoder-only model: what it writes goes on from the prompt."""

    auto_class = "AutoModelForCausalLM"
    padding_side = "left"  # so that every row's next token is in the same place

    def longest_prompt(self) -> int:
        return (self.window or 0) - 1  # one token at least has to be written

    def fit(self, ids: list[int], options: dict[str, Any]) -> list[int]:
        # The end of a prompt is what the text goes on from.
        assert self.window is not None
        return ids[-max(1, self.window - options["max_tokens"]) :]

    def used(self, prompts: list[list[int]]) -> list[int]:
        return [len(prompt) for prompt in prompts]

    def new_tokens(self, row: list[int], prompt_length: int) -> list[int]:
        return row[prompt_length:]


class Chat(CausalGenerator):
    """A decoder-only model with a chat template."""

    def load(self) -> None:
        super().load()
        if not self.tokenizer.chat_template:
            raise ModelUnavailable("It has no chat template, so it cannot serve type chat.")

    def prompts(self, batch: Batch) -> list[str | CraneError]:
        return [
            self._prompt(index, value["messages"], batch)
            for index, value in enumerate(batch.inputs)
        ]

    def encode(self, prompts: list[str], options: dict[str, Any]) -> list[list[int]]:
        # The template has written the special tokens already.
        ids: list[list[int]] = self.tokenizer(prompts, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return ids

    def _prompt(self, index: int, messages: list[dict[str, str]], batch: Batch) -> str | CraneError:
        import jinja2

        try:
            prompt: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            # The model's own rule in its own words, such as "roles must alternate".
            return InvalidRequest.of({"input.messages": f"do not suit this model: {error}"})
        return prompt

    def size(self, value: Any) -> int:
        return sum(super(Chat, self).size(message["content"]) for message in value["messages"])


class Seq2SeqGenerator(Generator):
    """An encoder-decoder model: it reads the whole input, then writes."""

    auto_class = "AutoModelForSeq2SeqLM"

    def prompts(self, batch: Batch) -> list[str | CraneError]:
        return [batch.options["prefix"] + text for text in batch.inputs]

    def fit(self, ids: list[int], options: dict[str, Any]) -> list[int]:
        # The start of a text, and the special tokens that close every input of this model.
        assert self.window is not None
        closing = len(ids) - 1 if ids[-1] in self.tokenizer.all_special_ids else len(ids)
        return ids[: self.window - (len(ids) - closing)] + ids[closing:]

    def ceiling(self) -> int | None:
        positions: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return positions

    def used(self, prompts: list[list[int]]) -> list[int]:
        return [1] * len(prompts)  # the decoder's start token

    def new_tokens(self, row: list[int], prompt_length: int) -> list[int]:
        return row[1:]


class Translator(Seq2SeqGenerator):
    """Also speaks to multilingual models, whose tokenizers want the languages by code."""

    def prompts(self, batch: Batch) -> list[str | CraneError]:
        for option in ("source_language", "target_language"):
            code = batch.options[option]
            if code is not None and self._language(code) is None:
                fault = f"is {code!r}, which is not a language code of this model"
                return [InvalidRequest.of({f"options.{option}": fault})] * len(batch)
        return super().prompts(batch)

    def encode(self, prompts: list[str], options: dict[str, Any]) -> list[list[int]]:
        if options["source_language"] is not None:
            self.tokenizer.src_lang = options["source_language"]
        return super().encode(prompts, options)

    def config(self, options: dict[str, Any], max_new_tokens: int) -> Any:
        config = super().config(options, max_new_tokens)
        if options["target_language"] is not None:
            config.forced_bos_token_id = self._language(options["target_language"])
        return config

    def _language(self, code: str) -> int | None:
        """The id of a language's token; None for a code that the tokenizer does not know."""
        if not hasattr(self.tokenizer, "src_lang"):
            return None
        if hasattr(self.tokenizer, "lang_code_to_token"):  # M2M100 writes "de" as "__de__"
            code = self.tokenizer.lang_code_to_token.get(code, "")
        token: int | None = self.tokenizer.get_added_vocab().get(code)
        return token


def _sampling(options: dict[str, Any], seeds: list[int | None], device: str) -> list[Any]:
    """The warpers that ``do_sample`` would use, then a draw from each row's own generator."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if options["temperature"] == 0:
        return []
    steps: list[Any] = []
    if options["temperature"] != 1:
        steps.append(TemperatureLogitsWarper(options["temperature"]))
    if options["top_k"]:
        steps.append(TopKLogitsWarper(options["top_k"]))
    if options["top_p"] < 1:
        steps.append(TopPLogitsWarper(options["top_p"]))
    return [*steps, _draw(seeds, device)]


def _draw(seeds: list[int | None], device: str) -> Callable[..., torch.Tensor]:
    """Make a logits processor after which the greedy choice is an exact draw for each row.

    Gumbel's trick: the highest of ``logits + noise`` is distributed as the softmax of the logits.
    Each row's noise comes from its own generator, so a seed gives the same text in any batch.
    """
    import torch
    from transformers import LogitsProcessor

    generators = [torch.Generator(device).manual_seed(seed or 0) for seed in seeds]

    class Draw(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            noise = torch.empty_like(scores, dtype=torch.float32)
            for row, generator in zip(noise, generators, strict=True):
                row.exponential_(generator=generator)
            tiny = torch.finfo(
                torch.float32
            ).tiny  # exponential_ may give 0, whose log is not finite
            return scores.float() - noise.clamp_min_(tiny).log_()

    return Draw()


def _stopping(
    *,
    room: torch.Tensor,
    start: int,
    cancelled: Callable[[], list[bool]],
    num_beams: int,
) -> Any:
    """Make a stopping criterion: a row ends at its own room, or when nobody waits for it."""
    import torch
    from transformers import StoppingCriteria

    class Stopping(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
        def __call__(
            self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
        ) -> torch.Tensor:
            gone = torch.tensor(cancelled(), device=input_ids.device)
            if num_beams > 1:  # rows are beams, which only end together
                return gone.all().expand(input_ids.shape[0])
            return gone | (input_ids.shape[1] - start >= room)

    return Stopping()
