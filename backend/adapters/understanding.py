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
        # Without a device the pipeline would move the model to the first GPU.
        placed = hasattr(self.model, "hf_device_map")
        device = {} if placed else {"device": self.model.device}
        self._pipeline = transformers.pipeline(
            self.pipeline_task, model=self.model, tokenizer=self.tokenizer, **device
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
            if fault := self.fault(texts[index], batch.options):
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

    def fault(self, text: str, options: dict[str, Any]) -> CraneError | None:
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

    def load(self) -> None:
        super().load()
        if self.tokenizer.mask_token is None:
            raise ModelUnavailable("Its tokenizer has no mask token, so it cannot fill one.")

    def text(self, value: str) -> str:
        mask: str = self.tokenizer.mask_token
        return re.sub(r"\[MASK\]|<mask>", lambda _: mask, value)

    def fault(self, text: str, options: dict[str, Any]) -> CraneError | None:
        # A mask past the window would be cut off, so it has to be within.
        ids = self.tokenizer(text, truncation=self.window is not None, verbose=False)["input_ids"]
        masks = ids.count(self.tokenizer.mask_token_id)
        if masks * options["top_k"] > self.most_guesses:
            fault = f"has {masks} masks, which with options.top_k are over {self.most_guesses}"
            return InvalidRequest.of({"input": f"{fault} guesses; lower either"})
        if masks:
            return None
        where = "" if self.tokenizer.mask_token not in text else " within the model's window"
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
        results: list[Prediction | CraneError] = []
        pairs: list[tuple[str, str]] = []
        for value in batch.inputs:
            # Not str.format, which would follow a template's {0.__class__} into our objects.
            template = batch.options["hypothesis_template"]
            hypotheses = [template.replace("{}", label) for label in value["labels"]]
            result = self._fit(value["text"], hypotheses, batch.options["truncate"])
            results.append(result)
            if isinstance(result, Prediction):
                pairs += [(value["text"], hypothesis) for hypothesis in hypotheses]
        if not pairs:
            return results
        logits, start = self._logits(pairs), 0
        for value, result in zip(batch.inputs, results, strict=True):
            if isinstance(result, Prediction):
                span = slice(start, start := start + len(value["labels"]))
                scores = self._scores(logits[span], batch.options["multi_label"])
                ranked = sorted(zip(value["labels"], scores, strict=True), key=lambda p: -p[1])
                result.output = [{"label": label, "score": score} for label, score in ranked]
        return results

    def _fit(self, text: str, hypotheses: list[str], truncate: bool) -> Prediction | CraneError:
        """A prediction still without output, or why there can be none."""
        bare = [
            len(ids)
            for ids in self.tokenizer([text, *hypotheses], add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
        ]
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        tokens = [bare[0] + count + special for count in bare[1:]]
        if self.window is None or max(tokens) <= self.window:
            return Prediction(None, {"input_tokens": sum(tokens)})
        longest = max(range(len(hypotheses)), key=lambda i: bare[1 + i])
        if bare[1 + longest] + special >= self.window:
            fault = f"leaves no room for the text in the model's window of {self.window} tokens"
            return InvalidRequest.of({f"input.labels[{longest}]": fault})
        if not truncate:
            return self.too_long(max(tokens), "input.text")
        used = sum(min(count, self.window) for count in tokens)
        return Prediction(None, {"input_tokens": used}, {"truncated": True})

    def _logits(self, pairs: list[tuple[str, str]]) -> Any:
        import torch

        rows = []
        step = self.spec.max_batch_size
        for some in (pairs[start : start + step] for start in range(0, len(pairs), step)):
            features = self.tokenizer(
                *map(list, zip(*some, strict=True)),
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
            starts, ends = self._logits(features)
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

    def _logits(self, features: Any) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        starts, ends = [], []
        step = self.spec.max_batch_size  # one long context may have hundreds of windows
        for at in range(0, len(features["input_ids"]), step):
            some = {name: value[at : at + step].to(self.device) for name, value in features.items()}
            with torch.inference_mode():
                output = self.model(**some)
            starts.append(output.start_logits.float().cpu())
            ends.append(output.end_logits.float().cpu())
        return torch.cat(starts), torch.cat(ends)

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
