"""What Whisper's tokens say, and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(slots=True, eq=False)
class Sound:
    """A sound on its way: what of it has been read, and what was written down."""

    place: int
    seconds: float
    features: torch.Tensor
    frames: int  # of the sound itself, without the silence after it
    read: int = 0
    language: str | None = None
    segments: list[dict[str, Any]] = field(default_factory=list)
    written: int = 0
    cut: bool = False


class Writer:
    """Makes texts of tokens; ``codes`` has the token of each language."""

    def __init__(self, pipeline: Any, codes: Mapping[int, str]) -> None:
        self._pipeline = pipeline
        self._codes = codes
        self._special = set(pipeline.tokenizer.all_special_ids)
        settings = pipeline.model.generation_config
        # The token before the first time stamp, if there are any.
        self.unstamped: int | None = getattr(settings, "no_timestamps_token_id", None)

    def output(self, sound: Sound, times: str) -> Any:
        """What a caller is told of a sound, with the ``times`` that were asked for."""
        text = self._text(sound.segments)
        if times == "segments":
            return {"text": text, "segments": self._segments(sound)}
        if times == "words":
            return {"text": text, "words": self._words(sound)}
        return text

    def is_stamp(self, token: int) -> bool:
        return self.unstamped is not None and token > self.unstamped

    def _text(self, segments: list[dict[str, Any]]) -> str:
        tokens = [token for segment in segments for token in segment["tokens"].tolist()]
        kept = [
            token for token in tokens if token not in self._special and not self.is_stamp(token)
        ]
        text: str = self._pipeline.tokenizer.decode(kept)
        return text.strip()  # a word's first token has the space before it

    def _segments(self, sound: Sound) -> list[dict[str, Any]]:
        return [
            {"text": text, "start": round(segment["start"], 2), "end": round(segment["end"], 2)}
            for segment in sound.segments
            if (text := self._text([segment]))
        ]

    def _words(self, sound: Sound) -> list[dict[str, Any]]:
        """What the pipeline makes of tokens and the time of each."""
        import torch

        tokens = torch.cat([segment["tokens"] for segment in sound.segments])
        at = torch.cat([segment["at"] for segment in sound.segments])
        codes = [token for token, code in self._codes.items() if code == sound.language]
        # Chinese has no spaces between words, so the language is told, as spoken at no time.
        tokens = torch.cat([torch.tensor(codes, dtype=torch.long), tokens.cpu()])
        at = torch.cat([torch.zeros(len(codes)), at.cpu()])
        heard = [{"tokens": tokens[None], "token_timestamps": at[None]}]
        chunks = self._pipeline.postprocess(heard, return_timestamps="word")["chunks"]
        return [
            {
                "text": chunk["text"].strip(),
                "start": round(min(start, sound.seconds), 2),
                "end": round(min(end, sound.seconds), 2),
            }
            for chunk in chunks
            for start, end in [chunk["timestamp"]]
            if chunk["text"].strip()
        ]
