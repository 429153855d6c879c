"""Text generation through transformers' ``generate``, many callers' prompts in one batch."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from backend.adapters import footprint
from backend.adapters.base import Batch, Entry, Feed, Prediction, too_late
from backend.adapters.completion import Completion
from backend.adapters.continuous import ContinuousBatch, Text
from backend.adapters.decoding import Ending, Sampling, sampling
from backend.adapters.grammar import Form, Grammar, Grammars
from backend.adapters.numbers import scored_in_numbers
from backend.adapters.packing import Packing
from backend.adapters.prefixes import Prefixes
from backend.adapters.slot_trial import layout_of
from backend.adapters.transformers_base import TransformersAdapter
from backend.errors import CraneError, InvalidRequest
from backend.replies import Reply
from backend.tasks.text import OF_TOKENS

if TYPE_CHECKING:
    import torch


# Of the memory that is free: for the texts that are being written, as it is when they begin, and
# for the beginnings of prompts that are kept, as it is when the model loads.
CACHE_OF_FREE, PREFIXES_OF_FREE = 0.5, 0.05
NOT_IN_ONE_GO = "cannot be set for this model, whose texts are written in one go"


class Generator(TransformersAdapter):
    """What decoder-only and encoder-decoder generators share."""

    pads_left = False
    kept_tokens: Collection[int] = ()  # special ones that are text to a reply

    def reply(self, value: Any, prompt: list[int]) -> Reply | None:
        """What takes apart what is written for an input; None where all of it is the output."""
        return None

    def form(self, value: Any, options: Mapping[str, Any]) -> Form | None:
        """What the text for an input is kept to; raises ``InvalidRequest``."""
        wanted = options.get("response_format")
        if wanted is None:
            return None
        return Form(wanted.get("schema", {"type": "object"}), "options.response_format")

    def encode(self, value: Any, options: Mapping[str, Any], **how: Any) -> list[int]:
        """An input's tokens; raises ``InvalidRequest``."""
        ids: list[int] = self.tokenizer(self.readable(value), verbose=False, **how)["input_ids"]
        return ids

    def longest_prompt(self, options: Mapping[str, Any]) -> int:
        """To how many tokens a prompt is cut that does not fit."""
        assert self.window is not None
        return self.window

    def room(self, prompt: list[int], options: Mapping[str, Any]) -> int:
        """How many tokens may be written after a prompt."""
        raise NotImplementedError

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        if beyond := [n for n, idle in OF_TOKENS.items() if batch.options.get(n, idle) != idle]:
            return [InvalidRequest.of({f"options.{beyond[0]}": NOT_IN_ONE_GO})] * len(batch)
        results: dict[int, Prediction | CraneError] = {}
        prompts: dict[int, list[int]] = {}
        cut: set[int] = set()
        for index, value in enumerate(batch.inputs):
            if batch.cancelled(index):
                results[index] = too_late()
                continue
            read = self.read(value, batch.options)
            if isinstance(read, CraneError):
                results[index] = read
                continue
            if form := self.form(value, batch.options):
                results[index] = form.refused(NOT_IN_ONE_GO)
                continue
            prompts[index], was_cut = read
            if was_cut:
                cut.add(index)
        written = self._generate(list(prompts.values()), list(prompts), batch) if prompts else []
        for place, prediction in zip(prompts, written, strict=True):
            if place in cut:
                prediction.facts["truncated"] = True
            results[place] = prediction
        return [results[index] for index in range(len(batch))]

    def read(self, value: Any, options: Mapping[str, Any]) -> tuple[list[int], bool] | CraneError:
        """An input's tokens, and whether they were cut to fit; or why it cannot be read."""
        try:
            ids, cut = self.encode(value, options), False
            if self.room(ids, options) < 1 or len(ids) > (self.window or len(ids)):
                if not options["truncate"]:
                    return self.too_long(len(ids))
                most = self.longest_prompt(options)
                ids, cut = self.encode(value, options, truncation=True, max_length=most), True
        except InvalidRequest as error:
            return error
        if not ids:
            return InvalidRequest.of({"input": "has no token that this model knows"})
        return ids, cut

    def _generate(
        self, prompts: list[list[int]], places: list[int], batch: Batch
    ) -> list[Prediction]:
        """Write after each prompt; ``places[row]`` is the row's place in the batch."""
        input_ids, mask = self._padded(prompts)
        return self.write(
            {"input_ids": input_ids, "attention_mask": mask},
            places,
            batch,
            prompts=[len(prompt) for prompt in prompts],
            room=[self.room(prompt, batch.options) for prompt in prompts],
            replies=[
                self.reply(batch.inputs[place], prompt)
                for place, prompt in zip(places, prompts, strict=True)
            ],
            start=1 if self.model.config.is_encoder_decoder else input_ids.shape[1],
        )

    def write(
        self,
        inputs: Mapping[str, Any],
        places: list[int],
        batch: Batch,
        *,
        prompts: list[int],
        room: list[int],
        start: int,
        replies: Sequence[Reply | None] = (),
    ) -> list[Prediction]:
        """Write a text for each row; ``places[row]`` is its place in the batch.

        ``prompts`` has each row's tokens, ``room`` how many may follow, and ``start`` is the column
        where writing begins; ``replies`` take the texts apart.
        """
        import torch

        options = batch.options
        beams = options["num_beams"] > 1
        replies = replies or [None] * len(places)
        completions = [
            self.completion(
                options,
                prompt_tokens=prompt,
                room=most,
                # Which of several beams the text will be is not known before its end.
                tell=None if beams or not batch.listens(place) else partial(batch.tell, place),
                reply=reply,
            )
            for place, prompt, most, reply in zip(places, prompts, room, replies, strict=True)
        ]
        ending = Ending(
            completions,
            start=start,
            room=room,
            # Beams are searched on where a text may go on after one: in what the model thinks.
            stop=[] if any(replies) else options["stop"],
            decode=lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True),
            cancelled=lambda row: batch.cancelled(places[row]),
        )
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                generation_config=self.config(options, max(room)),
                logits_processor=[
                    scored_in_numbers(),
                    *sampling(options, [batch.seeds[place] for place in places], self.device),
                ],
                stopping_criteria=[ending.criterion()],
            )
        if beams:
            for completion, row in zip(completions, output.tolist(), strict=True):
                self._take_beam(completion, row[start:])
        return [completion.prediction() for completion in completions]

    def completion(self, options: Mapping[str, Any], **about: Any) -> Completion:
        """A text that is to be written; the arguments are those of ``Completion``."""
        return Completion(
            self.tokenizer, ends=self.ends, stop=options["stop"], kept=self.kept_tokens, **about
        )

    @property
    def ends(self) -> set[int]:
        """The tokens that end a text."""
        ends = self.model.generation_config.eos_token_id
        return set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def _take_beam(self, completion: Completion, ids: list[int]) -> None:
        """Take the best of a row's beams, which end on their own and are padded to the longest."""
        while ids and ids[-1] == (self.tokenizer.pad_token_id or 0) and ids[-1] not in self.ends:
            ids = ids[:-1]
        for token in ids:
            if not completion.ended:
                completion.take(token)

    def _padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts as one tensor, and the mask of what is no padding.

        Not the tokenizer's own padding, which needs a token for it: any will do, for nothing
        reads what is masked.
        """
        import torch

        width = max(map(len, prompts))
        rows, mask = [], []
        for prompt in prompts:
            gap = width - len(prompt)
            padding = [self.tokenizer.pad_token_id or 0] * gap
            ones, zeros = [1] * len(prompt), [0] * gap
            rows.append(padding + prompt if self.pads_left else prompt + padding)
            mask.append(zeros + ones if self.pads_left else ones + zeros)
        device = self.model.device
        return torch.tensor(rows, device=device), torch.tensor(mask, device=device)

    def config(self, options: dict[str, Any], max_new_tokens: int) -> Any:
        """The checkpoint's own generation settings, with the caller's options in their place."""
        config = copy.deepcopy(self.model.generation_config)
        config.max_length = config.min_length = None
        config.max_new_tokens = max_new_tokens
        config.min_new_tokens = min(options["min_tokens"], max_new_tokens)
        # Drawing is done row by row: do_sample would share one random state.
        config.do_sample = False
        config.temperature, config.top_p, config.top_k = None, None, None
        config.num_beams = options["num_beams"]
        config.num_return_sequences = 1
        config.return_dict_in_generate = False
        config.repetition_penalty = options["repetition_penalty"]
        config.pad_token_id = self.tokenizer.pad_token_id or 0
        return config


class CausalGenerator(Generator):
    """A decoder-only model: what it writes goes on from the prompt."""

    auto_class = "AutoModelForCausalLM"
    spares_cores = False
    pads_left = True  # so that every row's next token is in the same place

    def load(self) -> None:
        super().load()
        self.tokenizer.truncation_side = "left"  # a prompt's end is what the text goes on from
        self._layout = layout_of(self.model)
        self._grammars = Grammars(self.tokenizer, self.ends)
        self._prefixes = Prefixes(
            int(footprint.free(self.device) * PREFIXES_OF_FREE), shared=self.spec.share_prefixes
        )
        if self.window is not None:
            self.model.register_forward_pre_hook(_keep_within(self.window), with_kwargs=True)

    def pack(self) -> None:
        self._packing = Packing(self.model)  # which is told how many texts each run is of

    def longest_prompt(self, options: Mapping[str, Any]) -> int:
        assert self.window is not None
        return max(self.window - int(options["max_tokens"]), (self.window + 1) // 2)

    def room(self, prompt: list[int], options: Mapping[str, Any]) -> int:
        most: int = options["max_tokens"]
        return most if self.window is None else min(most, self.window - len(prompt))

    def joins(self, options: Mapping[str, Any]) -> bool:
        return self._layout is not None and options["num_beams"] == 1

    def roll(self, feed: Feed, most: int) -> None:
        import torch

        assert self._layout is not None  # or nothing joins
        with torch.inference_mode():
            ContinuousBatch(
                self.model,
                self._layout,
                self._prefixes,
                self._begin,
                self.tokenizer.decode,
                before_run=self._packing.before_run,
                most_texts=most,
                most_tokens=self._most_tokens(),
            ).run(feed)

    def _begin(self, entry: Entry) -> Text | CraneError | Future[Grammar]:
        """Make of an input what is to be written for it, or wait for its grammar."""
        if entry.cancelled():
            return too_late()
        options = entry.options
        try:
            form = self.form(entry.input, options)
            compiled = self._grammars.compile(form, entry) if form else None
        except InvalidRequest as error:
            return error
        if compiled is not None and not compiled.done():
            return compiled
        read = self.read(entry.input, options)
        if isinstance(read, CraneError):
            return read
        prompt, cut = read
        room = self.room(prompt, options)
        try:
            constraint = self._grammars.start(compiled, form, room) if compiled and form else None
        except CraneError as error:
            return error
        return Text(
            entry=entry,
            prompt=prompt,
            room=room,
            cut=cut,
            completion=self.completion(
                options,
                prompt_tokens=len(prompt),
                room=room,
                tell=entry.tell if entry.listens else None,
                # What is kept to a format is all of it content.
                reply=None if options["response_format"] else self.reply(entry.input, prompt),
            ),
            sampling=Sampling(
                options,
                entry.seed,
                prompt=prompt,
                ends=self.ends,
                device=self.device,
                constraint=constraint,
            ),
        )

    def _most_tokens(self) -> int:
        """How many tokens the memory that is free has keys and values for."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        each: int = 2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize
        return int(footprint.free(self.device) * CACHE_OF_FREE) // each


def _keep_within(window: int) -> Any:
    """Keep positions in the model's table: a row that has ended is carried on with its batch."""

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions = kwargs.get("position_ids")
        if positions is not None:
            kwargs = {**kwargs, "position_ids": positions.clamp(max=window - 1)}
        return args, kwargs

    return hook
