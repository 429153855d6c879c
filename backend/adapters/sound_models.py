"""The kinds of models that make sound: how each is loaded, what it can be asked, how it is called.

Each draws from the global random state; ``own_draws`` is what gives each input its own.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from backend.adapters.long_texts import readable
from backend.adapters.transformers_base import MAX_TOKENS
from backend.adapters.vocoder import decode_in_windows, decode_one_by_one
from backend.errors import InvalidRequest, ModelUnavailable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text as a model reads it; ``tokens`` is how many it has, before it is ``cut``."""

    text: str
    ids: list[int]
    tokens: int
    cut: bool


class SoundModel(ABC):
    """One loaded model. ``check`` raises once no caller waits for its run."""

    class_name: ClassVar[str]
    takes: ClassVar[frozenset[str]] = frozenset()  # options that not every kind has
    batches: ClassVar[bool] = False  # else inputs run one by one

    def __init__(
        self,
        weights: str,
        revision: dict[str, Any],
        dtype: torch.dtype,
        device: str,
        kwargs: dict[str, Any],
        check: Callable[[], None],
    ) -> None:
        import transformers

        self.device, self.check = device, check
        self.voices: list[str] = []
        trust = {k: v for k, v in kwargs.items() if k == "trust_remote_code"}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(weights, **revision, **trust)
        model_class = getattr(transformers, self.class_name)
        how = {"dtype": dtype, **revision, **self.prepare(kwargs, dtype)}
        self.model = model_class.from_pretrained(weights, **how).to(device).eval()
        self.config = self.model.config
        self.rate: int = 0
        known = self.tokenizer.model_max_length
        self.window: int | None = known if known < 10**9 else MAX_TOKENS
        self.settle(weights, revision)

    def prepare(self, kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Take from an entry's ``load`` what is not ``from_pretrained``'s."""
        return kwargs

    @abstractmethod
    def settle(self, weights: str, revision: dict[str, Any]) -> None:
        """Set ``rate``, and ``voices`` and ``window`` where there are any."""

    @abstractmethod
    def make(self, prompts: list[Prompt], options: dict[str, Any]) -> list[np.ndarray]:
        """The samples of each prompt: float32 ``(n,)``, or ``(n, 2)``."""

    def faults(self, options: dict[str, Any]) -> dict[str, str]:
        """What is wrong with options that it does take."""
        return {}

    def own(self) -> dict[str, Any]:
        """What its options are where they are left to it."""
        return {}

    def steps(self, options: dict[str, Any]) -> int:
        """How many tokens a run has, of a model that batches."""
        return 0

    def max_inputs(self, options: dict[str, Any]) -> int | None:
        """How many inputs run at once, at most; None where nothing bounds them."""
        return None if self.batches else 1

    def prompt(self, text: str, options: dict[str, Any]) -> Prompt:
        text = readable(text, self.window, self.tokenizer)
        ids = self.encode(text)
        if self.window is None or len(ids) <= self.window:
            return Prompt(text, ids, len(ids), cut=False)
        return Prompt(
            text, self.encode(text, truncation=True, max_length=self.window), len(ids), cut=True
        )

    def encode(self, text: str, **how: Any) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False, **how)["input_ids"]
        return ids

    def tensor(self, ids: list[int]) -> torch.Tensor:
        import torch

        return torch.tensor([ids], device=self.device)


def wave(samples: torch.Tensor) -> np.ndarray:
    array: np.ndarray = samples.float().cpu().numpy()
    return array


class Vits(SoundModel):
    """VITS and MMS. A batch is padded, and padding changes the end of a sound: one by one."""

    class_name = "VitsModel"
    takes = frozenset(("speed",))
    most_tokens = 2048  # it has no window, but attends to all of a text at once; a minute or two
    # Of a text. The matrices, of which it makes five, have a number for each frame and token.
    max_seconds, max_matrix = 300, 2**24

    def settle(self, weights: str, revision: dict[str, Any]) -> None:
        self.rate = self.config.sampling_rate
        self.window = min(self.window or self.most_tokens, self.most_tokens)
        self._speaking_rate = 1.0
        self.model.duration_predictor.register_forward_hook(self._check_duration)
        decode_in_windows(self.model.decoder, self.check)
        if self.config.num_speakers > 1:
            self.voices = [str(speaker) for speaker in range(self.config.num_speakers)]
        for flag, package in (("phonemize", "phonemizer"), ("is_uroman", "uroman")):
            if getattr(self.tokenizer, flag, False) and not importlib.util.find_spec(package):
                raise ModelUnavailable(f"Its tokenizer needs the package {package}.")

    def own(self) -> dict[str, Any]:
        return {"speed": 1.0} | ({"voice": "0"} if self.voices else {})

    def make(self, prompts: list[Prompt], options: dict[str, Any]) -> list[np.ndarray]:
        [prompt] = prompts
        ids = self.tensor(prompt.ids)
        speaker = int(options["voice"] or 0) if self.voices else None
        self._speaking_rate = self.model.speaking_rate * (options["speed"] or 1.0)
        output = self.model(
            input_ids=ids,
            attention_mask=ids.new_ones(ids.shape),
            speaker_id=speaker,
            speaking_rate=self._speaking_rate,
        )
        return [wave(output.waveform[0])]

    def _check_duration(self, _: Any, __: Any, log_durations: torch.Tensor) -> None:
        """Refuse a text once it is known how long it gets, before that takes time and memory."""
        durations = (log_durations.exp() / self._speaking_rate).ceil()
        seconds_per_frame = math.prod(self.config.upsample_rates) / self.rate
        seconds = float(durations.sum()) * seconds_per_frame
        tokens = log_durations.shape[-1]
        most = min(self.max_seconds, self.max_matrix / tokens * seconds_per_frame)
        if seconds > most:
            fault = (
                f"is {seconds:.0f} s of speech, and {most:.0f} s are the most of a text of this "
            )
            fault += "length; shorten it, or raise options.speed"
            raise InvalidRequest.of({"input": fault})


VOCODER = "microsoft/speecht5_hifigan"


class SpeechT5(SoundModel):
    """SpeechT5, and the vocoder that makes sound of its spectrograms.

    An entry's ``load`` may name another ``vocoder``, and a folder of ``speakers``: one NumPy file
    ``NAME.npy`` for each voice. It drops out at random, for all of a batch alike: one by one.
    """

    class_name = "SpeechT5ForTextToSpeech"

    def prepare(self, kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        import transformers

        vocoder = kwargs.pop("vocoder")
        self._speakers = kwargs.pop("speakers", None)
        loaded = transformers.SpeechT5HifiGan.from_pretrained(vocoder, dtype=dtype)
        self._vocoder = loaded.to(self.device).eval()
        decode_in_windows(self._vocoder, self.check, frames_dim=-2)
        return kwargs

    def settle(self, weights: str, revision: dict[str, Any]) -> None:
        import torch

        self.rate = self._vocoder.config.sampling_rate
        positions = self.config.max_text_positions
        self.window = min(self.window or positions, positions)
        width = self.config.speaker_embedding_dim
        # Without a speaker: the silent one of transformers' own example.
        self._vectors = {"": torch.zeros(width)}
        if self._speakers is not None:
            files = sorted(Path(self._speakers).glob("*.npy"))
            self.voices = [file.stem for file in files]
            if not files:
                raise ModelUnavailable("The folder load.speakers of its entry has no .npy file.")
            self._vectors = {}
            for file in files:
                vector = torch.from_numpy(np.load(file, allow_pickle=False)).flatten()
                if len(vector) != width:
                    fault = f"has {len(vector)} numbers, and the model wants {width}"
                    raise ModelUnavailable(f"Its speaker {file.name} {fault}.")
                self._vectors[file.stem] = vector
        how = {"device": self.device, "dtype": self.model.dtype}
        self._vectors = {name: v.to(**how)[None] for name, v in self._vectors.items()}

    def own(self) -> dict[str, Any]:
        return {"voice": self.voices[0]} if self.voices else {}

    def make(self, prompts: list[Prompt], options: dict[str, Any]) -> list[np.ndarray]:
        [prompt] = prompts
        ids = self.tensor(prompt.ids)
        # By itself it ends after 20 frames a token, for which it may not have the positions.
        max_frames = self.config.max_speech_positions * self.config.reduction_factor
        sound = self.model.generate(
            ids,
            attention_mask=ids.new_ones(ids.shape),
            speaker_embeddings=self._vectors[options["voice"] or next(iter(self._vectors))],
            maxlenratio=min(20.0, max_frames / len(prompt.ids)),
            vocoder=self._vocoder,
        )
        return [wave(sound)]


class Bark(SoundModel):
    """Bark writes tokens three times over; how many depends on the text: one by one."""

    class_name = "BarkModel"
    takes = frozenset(("max_tokens", "temperature", "top_k"))

    def settle(self, weights: str, revision: dict[str, Any]) -> None:
        from transformers import BarkProcessor
        from transformers.utils import cached_file

        known = cached_file(
            weights,
            "speaker_embeddings_path.json",
            **revision,
            _raise_exceptions_for_missing_entries=False,
        )
        path = None if known is None else Path(known).name
        self._processor = BarkProcessor.from_pretrained(
            weights, speaker_embeddings_dict_path=path, **revision
        )
        self.voices = self._processor.available_voice_presets
        self.rate = self.model.generation_config.sample_rate
        self._semantic = self.model.generation_config.semantic_config
        self.window = self._semantic["max_input_semantic_length"]

    def encode(self, text: str, **how: Any) -> list[int]:
        return super().encode(text, add_special_tokens=False, **how)

    def faults(self, options: dict[str, Any]) -> dict[str, str]:
        most = self._semantic["max_new_tokens"]
        if (options["max_tokens"] or 0) > most:
            fault = f"is {options['max_tokens']}, and this model writes at most {most}"
            return {"options.max_tokens": fault}
        return {}

    def own(self) -> dict[str, Any]:
        return {"max_tokens": self._semantic["max_new_tokens"]}

    def make(self, prompts: list[Prompt], options: dict[str, Any]) -> list[np.ndarray]:
        [prompt] = prompts
        room = self.window or 0
        gap = room - len(prompt.ids)
        inputs = {
            "input_ids": self.tensor(prompt.ids + [self.tokenizer.pad_token_id or 0] * gap),
            "attention_mask": self.tensor([1] * len(prompt.ids) + [0] * gap),
        }
        if options["voice"] is not None:
            # The processor is asked for the voice alone: with one, it takes no word about cutting.
            preset = self._processor("", voice_preset=options["voice"], max_length=room)
            inputs["history_prompt"] = preset["history_prompt"].to(self.device)
        asked = sampling(options)
        how = {f"{part}_{k}": v for part in ("semantic", "coarse") for k, v in asked.items()}
        if options["temperature"] == 0:
            how["fine_temperature"] = 1.0  # which is its word for greedy
        if options["max_tokens"] is not None:
            how["semantic_max_new_tokens"] = options["max_tokens"]
        return [wave(self.model.generate(**inputs, **how)[0])]


class MusicGen(SoundModel):
    """MusicGen writes as many tokens for every text of a batch, so nothing is padded."""

    class_name = "MusicgenForConditionalGeneration"
    takes = frozenset(("duration", "guidance_scale", "temperature", "top_k"))
    batches = True
    # Bytes of a run's KV cache. Only on a CPU: a GPU that has no memory left runs fewer at once.
    max_cache = 2**32

    def settle(self, weights: str, revision: dict[str, Any]) -> None:
        codec, decoder = self.config.audio_encoder, self.config.decoder
        decode_one_by_one(self.model.audio_encoder.decoder, self.check)
        self.rate = codec.sampling_rate
        self._per_second: int = codec.frame_rate
        books = decoder.num_codebooks // decoder.audio_channels
        self._delay: int = books - 1  # each codebook is written a step after the one before
        self._positions = decoder.max_position_embeddings

    def faults(self, options: dict[str, Any]) -> dict[str, str]:
        if options["duration"] is None or self.steps(options) < self._positions:
            return {}
        most = (self._positions - 1 - self._delay) / self._per_second
        fault = f"is {options['duration']:g}, and this model makes at most {most:.1f} s"
        return {"options.duration": fault}

    def own(self) -> dict[str, Any]:
        own = self.model.generation_config
        frames = self.steps({"duration": None}) - self._delay
        return {"duration": frames / self._per_second, "guidance_scale": own.guidance_scale}

    def steps(self, options: dict[str, Any]) -> int:
        if options["duration"] is None:
            own = self.model.generation_config
            return int(own.max_new_tokens or own.max_length)
        seconds: float = options["duration"]
        return math.ceil(seconds * self._per_second) + self._delay

    def max_inputs(self, options: dict[str, Any]) -> int | None:
        if self.device != "cpu":
            return None
        decoder = self.config.decoder
        position: int = (
            2 * decoder.num_hidden_layers * decoder.hidden_size * self.model.dtype.itemsize
        )
        guided = 2  # one with the prompt, and one without
        return max(1, self.max_cache // (guided * self.steps(options) * position))

    def make(self, prompts: list[Prompt], options: dict[str, Any]) -> list[np.ndarray]:
        padded = self.tokenizer.pad(
            {"input_ids": [prompt.ids for prompt in prompts]}, return_tensors="pt"
        )
        how = sampling(options)
        if options["guidance_scale"] is not None:
            how["guidance_scale"] = options["guidance_scale"]
        if options["duration"] is not None:
            how["max_new_tokens"] = self.steps(options)
        sounds = self.model.generate(
            input_ids=padded["input_ids"].to(self.device),
            attention_mask=padded["attention_mask"].to(self.device),
            **how,
        )
        end = None if options["duration"] is None else round(options["duration"] * self.rate)
        # Channels last; of one, none.
        return [wave(sound[:, :end].T if len(sound) > 1 else sound[0, :end]) for sound in sounds]


def sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The options as ``generate`` calls them; what is left to the model is left out."""
    heat, top_k = options["temperature"], options["top_k"]
    if heat == 0:
        return {"do_sample": False}
    how: dict[str, Any] = {}
    if heat is not None:
        # Colder than this is greedy, and would only make the scores overflow.
        how |= {"do_sample": True, "temperature": max(heat, 1e-6)}
    if top_k is not None:
        how |= {"do_sample": True, "top_k": top_k}
    return how
