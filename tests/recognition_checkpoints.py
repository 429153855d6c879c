"""Tiny checkpoints with random weights that write down what they hear, however wrongly.

Weights are large, so that other sounds give other texts and no choice is a near-tie.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LANGUAGES = ("en", "de", "fr", "zh")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Small, and with windows of 6 s instead of 30: 600 frames, 300 positions and 301 time stamps.
_WHISPER: dict[str, Any] = {
    "max_source_positions": 300,
    "num_mel_bins": 16,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_target_positions": 40,
}


def whisper(folder: Path, **config: Any) -> None:
    _whisper(folder, _LANGUAGES, **config)


def whisper_english(folder: Path) -> None:
    """Knows one language, and so neither languages nor translation."""
    _whisper(folder, ())


def whisper_without_words(folder: Path) -> None:
    """Its settings do not say which heads tell when a word is spoken."""
    _whisper(folder, _LANGUAGES)
    _settings(folder, drop=("alignment_heads",))


def whisper_without_times(folder: Path) -> None:
    """Its settings do not name the time stamps, as those of old checkpoints."""
    _whisper(folder, _LANGUAGES)
    _settings(folder, drop=("alignment_heads", "no_timestamps_token_id"))


def whisper_with_habits(folder: Path) -> None:
    """The same weights, with settings for a way of reading that Crane does not follow."""
    _whisper(folder, _LANGUAGES)
    habits = {"condition_on_prev_tokens": True, "max_new_tokens": 3, "num_beams": 4}
    doubts = {"no_speech_threshold": 0.0, "logprob_threshold": 0.0}
    _settings(folder, **habits, **doubts, compression_ratio_threshold=0.1)


def whisper_stuck(folder: Path) -> None:
    """Writes one time stamp and nothing else, so that it never says where to go on."""
    _whisper(folder, _LANGUAGES)
    stamp = _whisper_tokenizer(_LANGUAGES, stamps=301).convert_tokens_to_ids("<|0.00|>")
    _settings(folder, suppress_tokens=[token for token in range(stamp + 301) if token != stamp])


def ctc(folder: Path) -> None:
    """As wav2vec2-large-960h-lv60-self: layer norms, and a mask of what is no padding."""
    _ctc(folder, feat_extract_norm="layer", do_stable_layer_norm=True)


def ctc_without_mask(folder: Path) -> None:
    """As wav2vec2-base-960h: its group norm hears the padding, and no mask keeps it from that."""
    _ctc(folder, feat_extract_norm="group", do_stable_layer_norm=False)


def hubert(folder: Path) -> None:
    _ctc(folder, "Hubert", feat_extract_norm="layer", do_stable_layer_norm=True)


def speech_to_text(folder: Path) -> None:
    """A speech model that is neither Whisper nor CTC."""
    from transformers import Speech2TextConfig

    Speech2TextConfig(architectures=["Speech2TextForConditionalGeneration"]).save_pretrained(folder)


BUILDERS = {
    builder.__name__: builder
    for builder in (
        whisper,
        whisper_english,
        whisper_without_words,
        whisper_without_times,
        whisper_with_habits,
        whisper_stuck,
        ctc,
        ctc_without_mask,
        hubert,
        speech_to_text,
    )
}


def _whisper(folder: Path, languages: tuple[str, ...], **changes: Any) -> None:
    import torch
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    sizes = {**_WHISPER, **changes}
    positions = sizes["max_source_positions"]
    tokenizer = _whisper_tokenizer(languages, stamps=positions + 1)
    ids = tokenizer.convert_tokens_to_ids
    end, start = ids("<|endoftext|>"), ids("<|startoftranscript|>")
    special = {
        "decoder_start_token_id": start,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        **sizes,
        **special,
        init_std=0.3,
        tie_word_embeddings=False,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(14)
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        # Found by trial: what is heard outweighs what was written before, texts of some length
        # come to an end, and the time stamps do not win over the letters by their number.
        for layer in model.model.decoder.layers:
            layer.encoder_attn.out_proj.weight *= 2
            layer.encoder_attn.q_proj.weight *= 6
        model.model.decoder.embed_tokens.weight *= 2
        model.proj_out.weight *= 3
        model.proj_out.weight[end + 1 :] *= 0.3
        model.proj_out.weight[end] *= 1.5
    settings = {
        "alignment_heads": [[0, 1], [1, 0]],
        "begin_suppress_tokens": [end],
        "is_multilingual": bool(languages),
        "max_length": sizes["max_target_positions"],
        "no_timestamps_token_id": ids("<|notimestamps|>"),
        "prev_sot_token_id": ids("<|startofprev|>"),
        "return_timestamps": False,
        "suppress_tokens": list(range(end + 1, ids("<|0.00|>"))),
    }
    if languages:
        settings["lang_to_id"] = {f"<|{code}|>": ids(f"<|{code}|>") for code in languages}
        settings["task_to_id"] = {name: ids(f"<|{name}|>") for name in ("transcribe", "translate")}
    model.generation_config = GenerationConfig(**special, **settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(
        feature_size=sizes["num_mel_bins"], chunk_length=positions // 50
    ).save_pretrained(folder)


def _whisper_tokenizer(languages: tuple[str, ...], *, stamps: int) -> Any:
    from transformers import AddedToken, WhisperTokenizer

    # A letter, and one with the space before it, which is a new word.
    pieces = [*_LETTERS, "Ġ", ",", "."]
    merges = [("Ġ", letter) for letter in _LETTERS]
    vocab = {piece: place for place, piece in enumerate([*pieces, *map("".join, merges)])}
    vocab["<|endoftext|>"] = len(vocab)
    special = ["startoftranscript", *languages, "translate", "transcribe", "startofprev"]
    special += ["nospeech", "notimestamps"]
    tokenizer = WhisperTokenizer(
        vocab=vocab,
        merges=merges,
        extra_special_tokens=[f"<|{name}|>" for name in special],
    )
    tokenizer.add_tokens(
        [AddedToken(f"<|{n * 0.02:.2f}|>", special=False, normalized=False) for n in range(stamps)]
    )
    return tokenizer


def _settings(folder: Path, *, drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Take some of the checkpoint's generation settings away, and set others."""
    path = folder / "generation_config.json"
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in drop}))


def _ctc(folder: Path, family: str = "Wav2Vec2", **norms: Any) -> None:
    import torch
    import transformers

    pieces = ["<pad>", "<s>", "</s>", "<unk>", "|", *_LETTERS.upper()]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = folder / "vocab.json"
    vocab.write_text(json.dumps({piece: place for place, piece in enumerate(pieces)}))
    transformers.Wav2Vec2CTCTokenizer(str(vocab)).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(
        return_attention_mask=norms["feat_extract_norm"] == "layer"
    ).save_pretrained(folder)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(32,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        initializer_range=0.6,
        **norms,
    )
    torch.manual_seed(4)
    model = getattr(transformers, f"{family}ForCTC")(config)
    with torch.no_grad():
        model.lm_head.bias[pieces.index("<pad>")] += 2  # most of speech is between letters
        model.lm_head.bias[pieces.index("|")] += 3
        model.lm_head.bias[1:4] -= 100
    model.save_pretrained(folder)
