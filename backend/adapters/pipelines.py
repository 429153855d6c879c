"""Labels and spans through the pipelines that transformers still has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from backend.adapters.base import Batch, Prediction, too_late
from backend.adapters.numbers import check_numbers
from backend.adapters.transformers_base import TransformersAdapter
from backend.errors import CraneError, InvalidRequest, ModelUnavailable

if TYPE_CHECKING:
    pass


class PipelineAdapter(TransformersAdapter):
    """A task that transformers has a pipeline for: ours are the window and the output's shape."""

    pipeline_task: ClassVar[str]
    max_cpu_tokens = 4096

    def load(self) -> None:
        import transformers

        super().load()
        self.check()
        # Without a device the pipeline would move the model to the first GPU.
        placed = hasattr(self.model, "hf_device_map")
        device = {} if placed else {"device": self.model.device}
        self._pipeline = transformers.pipeline(
            self.pipeline_task, model=self.model, tokenizer=self.tokenizer, **device
        )
        # It would leave out of a mean what is no number, say.
        self.model.register_forward_hook(lambda _, __, out: check_numbers(out.logits[..., 0]))

    def check(self) -> None:
        """Raise ``ModelUnavailable`` for a checkpoint that cannot do the task."""

    def unload(self) -> None:
        del self._pipeline
        super().unload()

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        whole = [self.text(value) for value in batch.inputs]
        results: dict[int, Prediction | CraneError] = {}
        texts = [""] * len(whole)
        for index in batch.pending(range(len(batch))):
            try:
                texts[index] = self.readable(whole[index])
            except InvalidRequest as error:
                results[index] = error
        tokens = self.count_tokens(texts)
        run: list[int] = []
        for index, count in enumerate(tokens):
            over = self.window is not None and count > self.window
            if index in results:
                continue
            if batch.cancelled(index):
                results[index] = too_late()
            elif fault := self.fault(texts[index], whole[index], batch.options):
                results[index] = fault
            elif over and not batch.options["truncate"]:
                results[index] = self.too_long(count)
            else:
                run.append(index)
        outputs = self.run([texts[index] for index in run], batch.options) if run else []
        for index, output in zip(run, outputs, strict=True):
            used = min(tokens[index], self.window or tokens[index])
            facts = {"truncated": True} if used < tokens[index] else {}
            results[index] = Prediction(self.shape(output), {"input_tokens": used}, facts)
        return [results[index] for index in range(len(batch))]

    def text(self, value: str) -> str:
        return value

    def fault(self, text: str, whole: str, options: dict[str, Any]) -> CraneError | None:
        """Why the model cannot take a text, the beginning of the ``whole``, if it cannot."""
        return None

    def run(self, texts: list[str], options: dict[str, Any]) -> Sequence[Any]:
        """Call the pipeline on all texts as one batch."""
        raise NotImplementedError

    def shape(self, output: Any) -> Any:
        """The pipeline's output for one text, as the task promises it."""
        return output


class TextClassifier(PipelineAdapter):
    auto_class = "AutoModelForSequenceClassification"
    pipeline_task = "text-classification"

    def run(self, texts: list[str], options: dict[str, Any]) -> Sequence[Any]:
        outputs: Sequence[Any] = self._pipeline(
            texts, batch_size=len(texts), top_k=options["top_k"], truncation=self.window is not None
        )
        return outputs


class TokenClassifier(PipelineAdapter):
    auto_class = "AutoModelForTokenClassification"
    pipeline_task = "token-classification"

    def run(self, texts: list[str], options: dict[str, Any]) -> Sequence[Any]:
        outputs: Sequence[Any] = self._pipeline(
            texts, batch_size=len(texts), aggregation_strategy=options["aggregation"]
        )
        return outputs

    def shape(self, output: Any) -> Any:
        return [
            {
                # One token's label is called "entity", a joined entity's "entity_group".
                "label": entity.get("entity_group", entity.get("entity")),
                "score": float(entity["score"]),
                "text": entity["word"],
                "start": entity["start"],
                "end": entity["end"],
            }
            for entity in output
        ]


class MaskFiller(PipelineAdapter):
    """Fills ``[MASK]`` or ``<mask>``, whichever of the two the model itself calls it."""

    auto_class = "AutoModelForMaskedLM"
    pipeline_task = "fill-mask"

    most_guesses = 10_000  # each of them is a whole text

    def check(self) -> None:
        if self.tokenizer.mask_token is None:
            raise ModelUnavailable("Its tokenizer has no mask token, so it cannot fill one.")

    def text(self, value: str) -> str:
        mask: str = self.tokenizer.mask_token
        return re.sub(r"\[MASK\]|<mask>", lambda _: mask, value)

    def fault(self, text: str, whole: str, options: dict[str, Any]) -> CraneError | None:
        # A mask past the window would be cut off, so it has to be within.
        ids = self.tokenizer(text, truncation=self.window is not None, verbose=False)["input_ids"]
        masks = ids.count(self.tokenizer.mask_token_id)
        if masks * options["top_k"] > self.most_guesses:
            fault = f"has {masks} masks, which with options.top_k are over {self.most_guesses}"
            return InvalidRequest.of({"input": f"{fault} guesses; lower either"})
        if masks:
            return None
        where = "" if self.tokenizer.mask_token not in whole else " within the model's window"
        return InvalidRequest.of({"input": f"must have a mask, written [MASK]{where}"})

    def run(self, texts: list[str], options: dict[str, Any]) -> Sequence[Any]:
        outputs: Sequence[Any] = self._pipeline(
            texts,
            batch_size=len(texts),
            top_k=min(options["top_k"], self.model.config.get_text_config().vocab_size),
            tokenizer_kwargs={"truncation": self.window is not None},
        )
        return outputs if len(texts) > 1 else [outputs]  # of one text it gives the bare answer

    def shape(self, output: Any) -> Any:
        # The pipeline gives one list for one mask, and a list of lists for several.
        masks = [output] if output and isinstance(output[0], dict) else output
        return [
            {
                "mask": place,
                "token": guess["token_str"],
                "score": guess["score"],
                "text": guess["sequence"],
            }
            for place, guesses in enumerate(masks)
            for guess in guesses
        ]
