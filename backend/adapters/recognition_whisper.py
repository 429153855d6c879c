"""Speech to text, and translation to English, with Whisper: 30 seconds at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from backend.adapters.base import Batch, Prediction, too_late
from backend.adapters.decoding import leaving
from backend.adapters.numbers import scored_in_numbers
from backend.adapters.recognition_text import Sound, Writer
from backend.errors import CraneError, did_you_mean, echoed

if TYPE_CHECKING:
    import numpy as np
    import torch


class WhisperListener:
    """Answers as ``generate`` does; a long sound is read window by window, as the authors do.

    The windows of all sounds of a batch run together. A sound's next window begins where the model
    says that it heard a segment's end, and what is past a sound's end is not read.
    """

    auto_class: ClassVar[str] = "AutoModelForSpeechSeq2Seq"

    def __init__(self, pipeline: Any) -> None:
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        self._pipeline = pipeline
        self._model = pipeline.model
        self._rate: int = pipeline.feature_extractor.sampling_rate
        # Two frames of features are a position; a time stamp is a position's.
        self._window: int = 2 * self._model.config.max_source_positions
        self._frame_s: float = pipeline.feature_extractor.hop_length / self._rate
        settings = self._model.generation_config
        settings.max_new_tokens = None  # each call sets max_length
        # Every window by itself, so that a sound's text does not depend on its batch; and none is
        # skipped or tried again, which the library cannot where it reads a single window.
        settings.condition_on_prev_tokens = False
        for doubt in ("no_speech_threshold", "logprob_threshold", "compression_ratio_threshold"):
            setattr(settings, doubt, None)
        self._heads = getattr(settings, "alignment_heads", None)
        multilingual = getattr(settings, "is_multilingual", True)
        ids = getattr(settings, "lang_to_id", {}) if multilingual else {}
        # "<|de|>" is the token of "de".
        self._codes: dict[int, str] = {token: name[2:-2] for name, token in ids.items()}
        self._languages = {code: code for code in self._codes.values()}
        self._languages |= {
            name: code for name, code in TO_LANGUAGE_CODE.items() if code in self._languages
        }
        self._writer = Writer(pipeline, self._codes)
        self._tasks = set(getattr(settings, "task_to_id", ())) if multilingual else set()

    def faults(self, options: Mapping[str, Any]) -> dict[str, str]:
        faults = {}
        language, task, times = (options[k] for k in ("language", "task", "return_timestamps"))
        if language is not None and not self._languages:
            faults["language"] = "cannot be chosen: this model knows one language only"
        elif language is not None and language.lower() not in self._languages:
            known = did_you_mean(language.lower(), list(self._languages))
            faults["language"] = (
                f"is {echoed(language)}, which is no language of this model; {known}"
            )
        if task != "transcribe" and task not in self._tasks:
            faults["task"] = f"is {task!r}, and this model can only transcribe"
        if times != "none" and self._writer.unstamped is None:
            faults["return_timestamps"] = "must be 'none': this model's settings name no times"
        elif times == "words" and not self._heads:
            faults["return_timestamps"] = (
                "is 'words', and this model's settings do not have the alignment_heads that tell "
                "when a word is spoken; it can do 'segments'"
            )
        return faults

    def fault(self, samples: np.ndarray, options: Mapping[str, Any]) -> str | None:
        most = self._pipeline.feature_extractor.n_samples
        if self._writer.unstamped is not None or len(samples) <= most:
            return None
        return (
            f"lasts {len(samples) / self._rate:.1f} s, and this model, whose settings name no "
            f"times, reads at most {most / self._rate:g} s"
        )

    def listen(
        self, sounds: Mapping[int, np.ndarray], batch: Batch
    ) -> Mapping[int, Prediction | CraneError]:
        heard = [
            self._sound(place, samples)
            for place, samples in sounds.items()
            if not batch.cancelled(place)
        ]
        times = batch.options["return_timestamps"]
        if times == "words":
            # One by one: in a batch the library aligns a row's padding with it.
            with self._aligning():
                for sound in heard:
                    self._read([sound], batch, timed=True)
        else:
            # What does not fit a window needs to be told where the next one begins.
            long = [sound for sound in heard if times != "none" or sound.frames > self._window]
            self._read([sound for sound in heard if sound not in long], batch, timed=False)
            self._read(long, batch, timed=True)
        return {sound.place: self._prediction(sound, batch) for sound in heard}

    def _sound(self, place: int, samples: np.ndarray) -> Sound:
        [made] = self._pipeline.preprocess(samples)
        frames = int(made["attention_mask"].sum())
        return Sound(place, len(samples) / self._rate, made["input_features"], frames)

    def _read(self, sounds: list[Sound], batch: Batch, *, timed: bool) -> None:
        """Read each sound to its end, a window of each at a time."""
        while True:
            left = [
                sound
                for sound in sounds
                if sound.read < sound.frames and not batch.cancelled(sound.place)
            ]
            if not left:
                return
            done = sum(min(sound.read, sound.frames) for sound in sounds)
            batch.progress(done, sum(sound.frames for sound in sounds))
            for sound, segments in zip(left, self._generate(left, batch, timed), strict=True):
                self._take(sound, segments)

    def _generate(self, sounds: list[Sound], batch: Batch, timed: bool) -> list[Any]:
        """The segments of each sound's next window."""
        import torch

        options = batch.options
        windows, mask = self._windows(sounds)
        with torch.inference_mode():
            # Once, though the library would encode again what it has told a language of.
            encoded = self._encode(windows)
            how: dict[str, Any] = {}
            if self._codes:
                self._tell_languages(sounds, options["language"], encoded)
                how["language"] = [sound.language for sound in sounds]
            if self._tasks:
                how["task"] = options["task"]
            if options["return_timestamps"] == "words":
                how["return_token_timestamps"] = True
            segments: list[Any] = self._model.generate(
                windows,
                encoder_outputs=encoded,
                attention_mask=mask,
                generation_config=self._config(options),
                return_timestamps=timed,
                return_segments=True,
                force_unique_generate_call=True,
                logits_processor=[scored_in_numbers()],
                stopping_criteria=[leaving(batch, [sound.place for sound in sounds])],
                **how,
            )["segments"]
        return segments

    def _encode(self, windows: torch.Tensor) -> Any:
        """The encoder's output for all windows, which it reads in full, however short the sound."""
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        encoder = self._model.get_encoder()
        if windows.device.type != "cpu":
            return encoder(windows)
        # A CPU's caches hold what becomes of two windows: eight at once took whisper-tiny 1.4 times
        # as long in float32, and 1.2 times in bfloat16.
        states = [encoder(part).last_hidden_state for part in windows.split(2)]
        return BaseModelOutput(last_hidden_state=torch.cat(states))

    def _windows(self, sounds: list[Sound]) -> tuple[torch.Tensor, torch.Tensor]:
        """Each sound's next frames, and the mask of those that are not after its end."""
        import torch
        from torch.nn.functional import pad

        rows, mask = [], torch.zeros(len(sounds), self._window, dtype=torch.long)
        for row, sound in enumerate(sounds):
            window = sound.features[:, :, sound.read : sound.read + self._window]
            rows.append(pad(window, (0, self._window - window.shape[-1])))
            # Words cannot be aligned with less than a position.
            mask[row, : max(2, sound.frames - sound.read)] = 1
        device = self._model.device
        return torch.cat(rows).to(device), mask.to(device)

    def _tell_languages(self, sounds: list[Sound], wanted: str | None, encoded: Any) -> None:
        """Set each sound's language: the caller's, or what the model hears in its beginning."""
        if wanted is not None:
            for sound in sounds:
                sound.language = self._languages[wanted.lower()]
        elif any(sound.language is None for sound in sounds):
            ids = self._model.detect_language(encoder_outputs=encoded)
            for sound, token in zip(sounds, ids.tolist(), strict=True):
                sound.language = sound.language or self._codes[token]

    def _config(self, options: Mapping[str, Any]) -> Any:
        """The checkpoint's own generation settings, with the caller's options in their place."""
        config = copy.deepcopy(self._model.generation_config)
        # To which the library adds the prompt, up to the model's own most.
        config.max_length = options["max_tokens"] or self._model.config.max_target_positions
        config.num_beams = options["num_beams"]
        return config

    def _take(self, sound: Sound, segments: list[dict[str, Any]]) -> None:
        """Keep what was written down of a window, and move to where the next one begins."""
        result = segments[0]["result"]
        row = result["sequences"] if isinstance(result, dict) else result
        ids = row[segments[0]["idxs"][0] :].tolist()
        end = self._model.generation_config.eos_token_id
        sound.cut = sound.cut or end not in ids
        sound.written += ids.index(end) + 1 if end in ids else len(ids)
        before = sound.read * self._frame_s
        for segment in segments:
            kept = {
                "tokens": segment["tokens"],
                # The silence after a sound may be taken for a part of it.
                "start": min(before + float(segment["start"]), sound.seconds),
                "end": min(before + float(segment["end"]), sound.seconds),
            }
            if "token_timestamps" in segment:
                kept["at"] = segment["token_timestamps"].double() + before
            sound.segments.append(kept)
        last = segments[-1]["tokens"][-2:].tolist()
        if len(last) == 2 and all(self._writer.is_stamp(token) for token in last):
            # Between two stamps a segment ends and another begins, which was not finished.
            assert self._writer.unstamped is not None
            sound.read += 2 * (last[0] - self._writer.unstamped - 1) or self._window
        else:
            sound.read += self._window

    def _prediction(self, sound: Sound, batch: Batch) -> Prediction | CraneError:
        if batch.cancelled(sound.place):
            return too_late()
        output = self._writer.output(sound, batch.options["return_timestamps"])
        usage = {"audio_seconds": round(sound.seconds, 3), "output_tokens": sound.written}
        facts = {"finish_reason": "length" if sound.cut else "stop"}
        language = {"language": sound.language} if sound.language else {}
        return Prediction(output, usage, facts | language, language)

    @contextmanager
    def _aligning(self) -> Iterator[None]:
        """Undo what ``generate`` does to the model for good where it aligns words."""
        config = self._model.model.config
        before = config._attn_implementation
        try:
            yield
        finally:
            config._attn_implementation = before
