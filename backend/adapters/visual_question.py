"""Questions about pictures: an answer that a model chooses (ViLT) or writes (BLIP)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.adapters.base import Batch, Prediction, too_late
from backend.adapters.decoding import leaving
from backend.adapters.numbers import scored_in_numbers
from backend.adapters.own_draws import own_draws
from backend.adapters.transformers_base import TransformersAdapter
from backend.adapters.vision_base import as_picture, of_one_shape, process, row_of, stack
from backend.adapters.vision_text import end_of_blip
from backend.errors import CraneError, InvalidRequest, ModelUnavailable


class VisualQuestionAnswerer(TransformersAdapter):
    """Runs questions of equal length together, for BLIP takes no notice of padding."""

    auto_class = "AutoModelForVisualQuestionAnswering"

    def load(self) -> None:
        import transformers

        super().load()
        kind = self.model.config.model_type
        if kind not in ("vilt", "blip"):
            raise ModelUnavailable(f"It is a {kind} model; type image-text-to-text may serve it.")
        self._writes = kind == "blip"
        end_of_blip(self.model)
        trust = {k: v for k, v in self.spec.load_kwargs.items() if k == "trust_remote_code"}
        weights, revision = self.weights
        self.processor = transformers.AutoImageProcessor.from_pretrained(
            weights, **revision, **trust
        )

    def unload(self) -> None:
        del self.processor
        super().unload()

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        return 256 + super().size(value["question"], options)

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        mine, other = ("max_tokens", "top_k") if self._writes else ("top_k", "max_tokens")
        if batch.options[other] is not None:
            does = "writes its answer" if self._writes else "chooses among the answers it knows"
            fault = InvalidRequest.of({f"options.{other}": f"is not for a model that {does}"})
            return [fault] * len(batch)
        most = batch.options[mine] or {"max_tokens": 20, "top_k": 5}[mine]
        results: dict[int, Prediction | CraneError] = {}
        features: dict[int, dict[str, Any]] = {}
        for place, value in enumerate(batch.inputs):
            if batch.cancelled(place):
                results[place] = too_late()
                continue
            try:
                text, results[place] = self._question(value["question"], batch.options["truncate"])
                picture = as_picture(value["image"], "input.image")
                seen = process(self.processor, picture, "input.image")
            except InvalidRequest as error:
                results[place] = error
            else:
                features[place] = {**text, **seen}
        for group in of_one_shape(features):
            if not (places := batch.waited_for(group)):
                continue
            inputs = stack([features[place] for place in places], self.model)
            if self._writes:
                answers = self._write(inputs, batch, places, most)
            else:
                answers = self._choose(inputs, len(places), most)
            for place, (answer, usage) in zip(places, answers, strict=True):
                prediction = results[place]
                assert isinstance(prediction, Prediction)
                prediction.output = answer
                prediction.usage = {**prediction.usage, **usage}
                prediction.applied = {mine: most}
        return [results[place] for place in range(len(batch))]

    def _question(self, question: str, truncate: bool) -> tuple[dict[str, Any], Prediction]:
        """A question's features, and its prediction still without output."""
        question = self.readable(question, "input.question")
        [tokens] = self.count_tokens([question])
        window = self.window or tokens
        if tokens > window and not truncate:
            raise self.too_long(tokens, "input.question")
        text = self.tokenizer(question, truncation=tokens > window, return_tensors="pt")
        facts = {"truncated": True} if tokens > window else {}
        usage = {"images": 1, "input_tokens": min(tokens, window)}
        return dict(text), Prediction(None, usage, facts)

    def _choose(
        self, inputs: dict[str, Any], rows: int, most: int
    ) -> list[tuple[list[dict[str, Any]], dict[str, int]]]:
        import torch

        # ViLT shuffles a picture's patches, or draws some of them: with no one's random state.
        with torch.inference_mode(), own_draws([0], str(self.model.device)):
            outputs = self.model(**inputs)
        names = self.model.config.id2label
        answers: list[tuple[list[dict[str, Any]], dict[str, int]]] = []
        for row in range(rows):
            scores = row_of(outputs, row, rows).logits[0].sigmoid()
            best = scores.topk(min(most, len(scores)))
            found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            answers.append(([{"answer": names[one], "score": score} for one, score in found], {}))
        return answers

    def _write(
        self, inputs: dict[str, Any], batch: Batch, places: list[int], most: int
    ) -> list[tuple[list[dict[str, Any]], dict[str, int]]]:
        import torch

        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                max_new_tokens=most,
                do_sample=False,
                logits_processor=[scored_in_numbers()],
                stopping_criteria=[leaving(batch, places)],
            )
        end, answers = self.model.generation_config.eos_token_id, []
        for row in output[:, 1:].tolist():
            ids = row[: row.index(end) + 1] if end in row else row
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            answers.append(([{"answer": text, "score": None}], {"output_tokens": len(ids)}))
        return answers
