"""Texts that are written about pictures; captions are the plainest of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.adapters.base import Batch, Prediction, too_late
from backend.adapters.generation import Generator
from backend.adapters.vision_base import as_picture, of_one_shape, process, stack
from backend.errors import CraneError, InvalidRequest, ModelUnavailable

PICTURE_TOKENS = 256  # about what a picture is worth, until the model says more


class PictureWriter(Generator):
    """What the generators that see pictures share."""

    auto_class = "AutoModelForImageTextToText"

    def load(self) -> None:
        super().load()
        weights, revision = self.weights
        self.processor = self.load_processor(
            weights,
            {
                **revision,
                **{k: v for k, v in self.spec.load_kwargs.items() if k == "trust_remote_code"},
            },
        )

    def load_processor(self, weights: str, how: dict[str, Any]) -> Any:
        import transformers

        return transformers.AutoImageProcessor.from_pretrained(weights, **how)

    def unload(self) -> None:
        del self.processor
        super().unload()


class Captioner(PictureWriter):
    """Captions a picture by itself: an encoder of pictures and a decoder of texts, BLIP, GIT."""

    kinds = ("vision-encoder-decoder", "blip", "git")

    def load(self) -> None:
        super().load()
        config = self.model.config
        if config.model_type not in self.kinds:
            raise ModelUnavailable(
                f"It is a {config.model_type} model, which does not caption a picture without a "
                "prompt; type image-text-to-text may serve it."
            )
        text = getattr(config, "decoder", None) or config.get_text_config()
        self._positions: int | None = getattr(text, "max_position_embeddings", None)
        end_of_blip(self.model)

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        return PICTURE_TOKENS

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        results: dict[int, Prediction | CraneError] = {}
        features: dict[int, dict[str, Any]] = {}
        for place in batch.pending(range(len(batch))):
            try:
                picture = as_picture(batch.inputs[place], "input")
                features[place] = process(self.processor, picture, "input")
            except InvalidRequest as error:
                results[place] = error
        most = batch.options["max_tokens"]
        if self._positions is not None:
            most = min(most, self._positions - 1)  # the start's token takes one
        for group in of_one_shape(features):
            if not (places := batch.waited_for(group)):
                continue
            written = self.write(
                stack([features[place] for place in places], self.model),
                places,
                batch,
                prompts=[0] * len(places),
                room=[most] * len(places),
                start=1,
            )
            for place, prediction in zip(places, written, strict=True):
                prediction.usage = {**prediction.usage, "images": 1}
                results[place] = prediction
        return [results.get(place) or too_late() for place in range(len(batch))]


def end_of_blip(model: Any) -> None:
    """BLIP ends with a token that only its ``generate`` knows of."""
    if model.config.model_type == "blip":
        model.generation_config.eos_token_id = model.config.text_config.sep_token_id
