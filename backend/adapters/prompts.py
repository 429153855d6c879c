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
        """An input's negative prompt, or else the options'.

        Raises ``InvalidRequest`` where the pipeline has none, and where either prompt is too long.
        """
        at = "input" if value["negative_prompt"] is not None else "options"
        negative: str | None = (value if at == "input" else options)["negative_prompt"]
        if negative is not None and not self.takes("negative_prompt"):
            raise InvalidRequest.of({f"{at}.negative_prompt": NOT_ASKED})
        if not options["truncate"]:
            self._check_length("input.prompt", value["prompt"] or "")
            self._check_length(f"{at}.negative_prompt", negative or "")
        return negative

    def _check_length(self, at: str, text: str) -> None:
        """Refuse a text that no encoder of the model reads to its end."""
        lengths = []
        for name, tokenizer in self.pipeline.components.items():
            if not name.startswith("tokenizer") or tokenizer is None:
                continue
            window = tokenizer.model_max_length
            if "CLIP" not in type(tokenizer).__name__ and "max_sequence_length" in self.parameters:
                window = self.parameters["max_sequence_length"].default
            part = readable(text, window, tokenizer, at=at)
            lengths.append((window, len(tokenizer(part, verbose=False)["input_ids"])))
        window, tokens = max(lengths, default=(0, 0))
        if tokens > window:
            fault = f"has {or_more(tokens, window)} tokens and the model reads {window}; "
            raise InvalidRequest.of({at: f"{fault}shorten it, or set options.truncate to true"})
