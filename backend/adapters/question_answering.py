"""Answers found in a text that the caller sends along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backend.adapters.base import Batch, Prediction, too_late
from backend.adapters.long_texts import check_all, or_more
from backend.adapters.numbers import check_numbers
from backend.adapters.transformers_base import TransformersAdapter
from backend.errors import CraneError, InvalidRequest

if TYPE_CHECKING:
    import torch


class QuestionAnswerer(TransformersAdapter):
    """Finds the likeliest span of the context; a long context is read in overlapping windows."""

    auto_class = "AutoModelForQuestionAnswering"
    stride = 128  # tokens that neighbouring windows share, so that an answer is whole in one

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        return super().size(value["question"] + value["context"], options)

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        import torch

        results: dict[int, Prediction | CraneError] = {}
        run: list[int] = []
        for index in batch.pending(range(len(batch))):
            try:
                question = self.readable(batch.inputs[index]["question"], "input.question")
                context = batch.inputs[index]["context"]
                check_all(context, self.window, self.tokenizer, at="input.context")
            except InvalidRequest as error:
                results[index] = error
                continue
            [length] = self.count_tokens([question])
            # Half the window at least is for the context.
            if self.window is not None and length > self.window // 2:
                most = self.window // 2
                count = or_more(length, self.window)
                fault = f"has {count} tokens and may have {most} with this model; shorten it"
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
            starts, ends = self._logits(features, batch, owners)
            for index in batch.pending(run):
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
        return [results.get(index) or too_late() for index in range(len(batch))]

    def _logits(
        self, features: Any, batch: Batch, owners: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each window; what its owner has left before is zeros."""
        import torch

        starts, ends = torch.zeros(2, *features["input_ids"].shape)
        # One long context may have hundreds of windows.
        for rows in batch.shares(owners, self.spec.max_batch_size):
            some = {name: value[rows].to(self.device) for name, value in features.items()}
            with torch.inference_mode():
                output = self.model(**some)
            check_numbers(output.start_logits, output.end_logits)
            starts[rows] = output.start_logits.float().cpu()
            ends[rows] = output.end_logits.float().cpu()
        return starts, ends

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
