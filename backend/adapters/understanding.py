"""Labels, spans and scores from encoder models, through transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from backend.adapters.base import Batch, Prediction
from backend.adapters.transformers_base import TransformersAdapter
from backend.errors import CraneError, InvalidRequest, ModelUnavailable

if TYPE_CHECKING:
    import torch


class PipelineAdapter(TransformersAdapter):
    """A task that transformers has a pipeline for: ours are the window and the output's shape."""

    pipeline_task: ClassVar[str]

    def load(self) -> None:
        import transformers

        super().load()
        self._pipeline = transformers.pipeline(
            self.pipeline_task, model=self.model, tokenizer=self.tokenizer
        )

    def unload(self) -> None:
        del self._pipeline
        super().unload()

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        texts = [self.text(value) for value in batch.inputs]
        tokens = self.count_tokens(texts)
        results: dict[int, Prediction | CraneError] = {}
        run: list[int] = []
        for index, count in enumerate(tokens):
            over = self.window is not None and count > self.window
            if fault := self.fault(texts[index]):
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

    def fault(self, text: str) -> CraneError | None:
        """Why the model cannot take a text, if it cannot."""
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
            texts, batch_size=len(texts), top_k=options["top_k"], truncation=True
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

    def text(self, value: str) -> str:
        mask: str = self.tokenizer.mask_token
        return re.sub(r"\[MASK\]|<mask>", lambda _: mask, value)

    def fault(self, text: str) -> CraneError | None:
        # A mask past the window would be cut off, so it has to be within.
        ids = self.tokenizer(text, truncation=self.window is not None, verbose=False)["input_ids"]
        if self.tokenizer.mask_token_id in ids:
            return None
        where = "" if self.tokenizer.mask_token not in text else " within the model's window"
        return InvalidRequest.of({"input": f"must have a mask, written [MASK],{where}"})

    def run(self, texts: list[str], options: dict[str, Any]) -> Sequence[Any]:
        outputs: Sequence[Any] = self._pipeline(
            texts,
            batch_size=len(texts),
            top_k=options["top_k"],
            tokenizer_kwargs={"truncation": self.window is not None},
        )
        return outputs

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


class ZeroShotClassifier(TransformersAdapter):
    """Scores labels by whether the text entails a sentence with the label in it.

    Not through transformers' pipeline, which takes one set of labels for a whole batch: here the
    pairs of all callers run together.
    """

    auto_class = "AutoModelForSequenceClassification"

    def load(self) -> None:
        super().load()
        labels = {name.lower(): index for name, index in self.model.config.label2id.items()}
        entails = [index for name, index in labels.items() if name.startswith("entail")]
        if not entails:
            raise ModelUnavailable("It has no label 'entailment', so it cannot judge new labels.")
        self._entailment = entails[0]
        self._contradiction = 0 if self._entailment else -1

    def size(self, value: Any) -> int:
        return super().size(value["text"]) * len(value["labels"])

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        template = batch.options["hypothesis_template"]
        results: list[Prediction | CraneError] = []
        premises: list[str] = []
        hypotheses: list[str] = []
        for value in batch.inputs:
            premises += [value["text"]] * len(value["labels"])
            # Not str.format, which would follow a template's {0.__class__} into our objects.
            hypotheses += [template.replace("{}", label) for label in value["labels"]]
        tokens = self.count_tokens(premises, hypotheses)
        logits = self._logits(premises, hypotheses)
        start = 0
        for value in batch.inputs:
            span = slice(start, start := start + len(value["labels"]))
            longest = max(tokens[span])
            cut = self.window is not None and longest > self.window
            if cut and not batch.options["truncate"]:
                results.append(self.too_long(longest, "input.text"))
                continue
            scores = self._scores(logits[span], batch.options["multi_label"])
            ranked = sorted(zip(value["labels"], scores, strict=True), key=lambda pair: -pair[1])
            used = sum(min(count, self.window or count) for count in tokens[span])
            results.append(
                Prediction(
                    [{"label": label, "score": score} for label, score in ranked],
                    {"input_tokens": used},
                    {"truncated": True} if cut else {},
                )
            )
        return results

    def _logits(self, premises: list[str], hypotheses: list[str]) -> Any:
        import torch

        rows = []
        step = self.spec.max_batch_size
        for start in range(0, len(premises), step):
            features = self.tokenizer(
                premises[start : start + step],
                hypotheses[start : start + step],
                padding=True,
                truncation="only_first" if self.window else False,
                return_tensors="pt",
            ).to(self.device)
            with torch.inference_mode():
                rows.append(self.model(**features).logits.float())
        return torch.cat(rows)

    def _scores(self, logits: Any, multi_label: bool) -> list[float]:
        if multi_label or len(logits) == 1:
            pair = logits[:, [self._contradiction, self._entailment]]
            scores: list[float] = pair.softmax(dim=1)[:, 1].tolist()
        else:
            scores = logits[:, self._entailment].softmax(dim=0).tolist()
        return scores


class QuestionAnswerer(TransformersAdapter):
    """Finds the likeliest span of the context; a long context is read in overlapping windows."""

    auto_class = "AutoModelForQuestionAnswering"
    stride = 128  # tokens that neighbouring windows share, so that an answer is whole in one

    def size(self, value: Any) -> int:
        return super().size(value["question"] + value["context"])

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        import torch

        results: dict[int, Prediction | CraneError] = {}
        run: list[int] = []
        lengths = self.count_tokens([value["question"] for value in batch.inputs])
        for index, length in enumerate(lengths):
            # Half the window at least is for the context.
            if self.window is not None and length > self.window // 2:
                most = self.window // 2
                fault = f"has {length} tokens and may have {most} with this model; shorten it"
                results[index] = InvalidRequest.of({"input.question": fault})
            else:
                run.append(index)
        if run:
            features = self._features([batch.inputs[index] for index in run])
            owners = [run[place] for place in features.pop("overflow_to_sample_mapping").tolist()]
            offsets = features.pop("offset_mapping").tolist()
            contexts = [
                [which == 1 for which in features.sequence_ids(row)] for row in range(len(owners))
            ]
            with torch.inference_mode():
                output = self.model(**features.to(self.device))
            starts, ends = output.start_logits.float().cpu(), output.end_logits.float().cpu()
            for index in run:
                rows = [row for row, owner in enumerate(owners) if owner == index]
                inside = torch.tensor([contexts[row] for row in rows])
                if not inside.any():
                    fault = "has no token that this model knows"
                    results[index] = InvalidRequest.of({"input.context": fault})
                    continue
                most = batch.options["max_answer_tokens"]
                score, window, first, last = best_span(starts[rows], ends[rows], inside, most)
                begin, end = offsets[rows[window]][first][0], offsets[rows[window]][last][1]
                answer = {
                    "answer": batch.inputs[index]["context"][begin:end],
                    "score": score,
                    "start": begin,
                    "end": end,
                }
                used = sum(int(features["attention_mask"][row].sum()) for row in rows)
                results[index] = Prediction(answer, {"input_tokens": used})
        return [results[index] for index in range(len(batch))]

    def _features(self, inputs: list[Any]) -> Any:
        windowed: dict[str, Any] = {"truncation": False}
        if self.window is not None:
            stride = min(self.stride, self.window // 4)
            windowed = {"truncation": "only_second", "max_length": self.window, "stride": stride}
        return self.tokenizer(
            [value["question"] for value in inputs],
            [value["context"] for value in inputs],
            **windowed,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=True,
            return_tensors="pt",
        )


def best_span(
    starts: torch.Tensor, ends: torch.Tensor, inside: torch.Tensor, most: int
) -> tuple[float, int, int, int]:
    """The likeliest ``(score, window, first, last)`` of ``[windows, tokens]`` logits.

    Only tokens ``inside`` the context count. A span's score is the product of its ends'
    probabilities over all windows together, and its length at most ``most`` tokens.
    """
    import torch

    shape = starts.shape
    first, last = (
        logits.masked_fill(~inside, -torch.inf).flatten().softmax(dim=0).view(shape)
        for logits in (starts, ends)
    )
    best = (-1.0, 0, 0, 0)
    for window in range(shape[0]):
        scores = torch.outer(first[window], last[window]).triu().tril(most - 1)
        place = int(scores.argmax())
        score = float(scores.flatten()[place])
        best = max(best, (score, window, place // shape[1], place % shape[1]))
    return best
