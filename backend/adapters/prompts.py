"""What adapters of pipelines that read a prompt share: what may be asked, and how long it is."""

from __future__ import annotations

from typing import Any

from backend.adapters.diffusers_base import DiffusersAdapter
from backend.adapters.long_texts import or_more, readable
from backend.errors import InvalidRequest

NOT_ASKED = "is not something this model can be asked"


class PromptedAdapter(DiffusersAdapter):
    """A pipeline with a prompt; what it cannot be asked is refused by name."""

    def takes(self, name: str) -> bool:
        if name == "negative_prompt" and "true_cfg_scale" in self.parameters:
            # FLUX takes one and ignores it, as its own guidance is distilled into the weights.
            return bool(self.parameters["true_cfg_scale"].default > 1)
        return name in self.parameters

    def not_taken(self, options: dict[str, Any], names: tuple[str, ...]) -> dict[str, str]:
        """Faults of those options that are set and that the pipeline does not know."""
        return {
            f"options.{name}": NOT_ASKED
            for name in names
            if options.get(name) is not None and not self.takes(name)
        }

    def negative_prompt(self, value: dict[str, Any], options: dict[str, Any]) -> str | None:
        """An input's negative prompt, or else the options', as ``_fitted`` has it.

        Raises ``InvalidRequest`` where the pipeline has none, and where it is too long.
        """
        at = "input" if value["negative_prompt"] is not None else "options"
        negative: str | None = (value if at == "input" else options)["negative_prompt"]
        if negative is not None and not self.takes("negative_prompt"):
            raise InvalidRequest.of({f"{at}.negative_prompt": NOT_ASKED})
        return self._fitted(f"{at}.negative_prompt", negative, options)

    def prompt(self, value: dict[str, Any], options: dict[str, Any]) -> str | None:
        """An input's prompt, as ``_fitted`` has it."""
        return self._fitted("input.prompt", value["prompt"], options)

    def _fitted(self, at: str, text: str | None, options: dict[str, Any]) -> str | None:
        """A text, or the beginning of a long one that is as good to all encoders of the model.

        Raises ``InvalidRequest`` for one that no encoder reads to its end, but with ``truncate``.
        """
        if text is None:
            return None
        lengths, parts = [], []
        for name, tokenizer in self.pipeline.components.items():
            if not name.startswith("tokenizer") or tokenizer is None:
                continue
            window = tokenizer.model_max_length
            if "CLIP" not in type(tokenizer).__name__ and "max_sequence_length" in self.parameters:
                window = self.parameters["max_sequence_length"].default
            parts.append(readable(text, window, tokenizer, at=at))
            lengths.append((window, len(tokenizer(parts[-1], verbose=False)["input_ids"])))
        window, tokens = max(lengths, default=(0, 0))
        if tokens > window and not options["truncate"]:
            fault = f"has {or_more(tokens, window)} tokens and the model reads {window}; "
            raise InvalidRequest.of({at: f"{fault}shorten it, or set options.truncate to true"})
        return max(parts, key=len, default=text)
