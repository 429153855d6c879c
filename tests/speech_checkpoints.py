"""Tiny checkpoints with random weights that speak: one for each kind of model."""

from __future__ import annotations

import json
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz '"
_WAVES = {
    "upsample_initial_channel": 16,
    "resblock_kernel_sizes": (3,),
    "resblock_dilation_sizes": ((1, 3),),
}


def vits(folder: Path, **more) -> None:
    """MMS's: letters for tokens, blanks between them."""
    from transformers import VitsConfig, VitsModel, VitsTokenizer

    config = VitsConfig(
        vocab_size=len(LETTERS) + 1,
        hidden_size=16,
        num_hidden_layers=1,
        ffn_dim=32,
        flow_size=16,
        spectrogram_bins=9,
        **_WAVES,
        upsample_rates=(8, 4),
        upsample_kernel_sizes=(16, 8),
        duration_predictor_filter_channels=16,
        prior_encoder_num_flows=2,
        prior_encoder_num_wavenet_layers=2,
        posterior_encoder_num_wavenet_layers=1,
        **more,
    )
    with _seeded():
        model = VitsModel(config)
        _speak_up(model.decoder)
    with tempfile.TemporaryDirectory() as there:
        vocab = Path(there) / "vocab.json"
        pieces = ["<pad>", *LETTERS]
        vocab.write_text(json.dumps({piece: place for place, piece in enumerate(pieces)}))
        tokenizer = VitsTokenizer(str(vocab), phonemize=False, language="eng")
        tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def vits_of_two_speakers(folder: Path) -> None:
    vits(folder, num_speakers=2, speaker_embedding_size=4)


def vits_of_phonemes(folder: Path) -> None:
    """Needs a package that is not installed."""
    vits(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"phonemize": True}))


def speecht5(folder: Path, *, stop_bias: float = -2.5, **more) -> None:
    """With its vocoder in ``vocoder`` and two speakers in ``speakers``."""
    import torch
    from transformers import (
        SpeechT5Config,
        SpeechT5ForTextToSpeech,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
        SpeechT5Tokenizer,
    )

    with tempfile.TemporaryDirectory() as there:
        window = more.get("max_text_positions", 60)
        tokenizer = SpeechT5Tokenizer(_pieces(Path(there)), model_max_length=window)
        tokenizer.save_pretrained(folder)
    config = SpeechT5Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        num_mel_bins=8,
        speech_decoder_prenet_units=16,
        speaker_embedding_dim=4,
        speech_decoder_postnet_units=8,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        **{"max_text_positions": window, **more},
    )
    vocoder = SpeechT5HifiGanConfig(
        model_in_dim=8, **_WAVES, upsample_rates=(4, 4), upsample_kernel_sizes=(8, 8)
    )
    with _seeded():
        model, waves = SpeechT5ForTextToSpeech(config), SpeechT5HifiGan(vocoder)
        torch.nn.init.constant_(model.speech_decoder_postnet.prob_out.bias, stop_bias)
        _speak_up(waves)
    model.save_pretrained(folder)
    waves.save_pretrained(folder / "vocoder")
    (folder / "speakers").mkdir()
    for place, name in enumerate(("anna", "bert")):
        vector = np.random.default_rng(place).normal(size=(1, 4)).astype(np.float32)
        np.save(folder / "speakers" / f"{name}.npy", vector)


def speecht5_without_end(folder: Path) -> None:
    """Speaks until it has no positions left: 1,600 frames."""
    speecht5(folder, stop_bias=-1e3, max_text_positions=200, max_speech_positions=800)


def bark(folder: Path) -> None:
    """Draws like suno/bark-small: its semantic and coarse tokens, and its fine ones."""
    from transformers import (
        BarkCoarseConfig,
        BarkConfig,
        BarkFineConfig,
        BarkModel,
        BarkProcessor,
        BarkSemanticConfig,
    )
    from transformers.models.bark.generation_configuration_bark import (
        BarkCoarseGenerationConfig,
        BarkFineGenerationConfig,
        BarkGenerationConfig,
        BarkSemanticGenerationConfig,
    )

    tokenizer = _words()
    small = {"num_layers": 1, "num_heads": 2, "hidden_size": 16, "initializer_range": 0.5}
    semantic = {"input_vocab_size": 140, "output_vocab_size": 60, "block_size": 64, **small}
    coarse = {"input_vocab_size": 80, "output_vocab_size": 80, "block_size": 128, **small}
    fine = {"input_vocab_size": 17, "output_vocab_size": 17, "block_size": 64, **small}
    config = BarkConfig(
        semantic_config=BarkSemanticConfig(**semantic).to_dict(),
        coarse_acoustics_config=BarkCoarseConfig(**coarse).to_dict(),
        fine_acoustics_config=BarkFineConfig(**fine, n_codes_total=4).to_dict(),
        codec_config=_encodec(codebook_size=16, books=4).to_dict(),
        initializer_range=0.5,
    )
    generation = BarkGenerationConfig.from_sub_model_configs(
        BarkSemanticGenerationConfig(
            eos_token_id=40,
            semantic_pad_token=40,
            pad_token_id=40,
            semantic_vocab_size=40,
            text_encoding_offset=60,
            text_pad_token=138,
            semantic_infer_token=139,
            max_input_semantic_length=16,
            max_new_tokens=12,
            min_new_tokens=5,  # of fewer the codec makes no sound
            semantic_rate_hz=50,
            do_sample=True,
            temperature=0.9,
        ),
        BarkCoarseGenerationConfig(
            coarse_semantic_pad_token=78,
            coarse_infer_token=79,
            coarse_rate_hz=75,
            max_coarse_input_length=16,
            max_coarse_history=30,
            sliding_window_len=10,
            pad_token_id=78,
            do_sample=True,
        ),
        BarkFineGenerationConfig(
            temperature=0.5,
            max_fine_history_length=16,
            max_fine_input_length=32,
            n_fine_codebooks=4,
        ),
        sample_rate=24_000,
        codebook_size=16,
    )
    with _seeded():
        model = BarkModel(config)
        _tell_codes_apart(model)
    model.save_pretrained(folder)
    # BarkGenerationConfig cannot be saved by the library that it is of (transformers 5.23).
    (folder / "generation_config.json").write_text(json.dumps(generation.to_dict()))
    rng = np.random.default_rng(0)
    preset = {
        "semantic_prompt": rng.integers(0, 40, 12),
        "coarse_prompt": rng.integers(0, 16, (2, 18)),
        "fine_prompt": rng.integers(0, 16, (4, 18)),
    }
    voices = folder / "speaker_embeddings" / "v2"
    voices.mkdir(parents=True)
    files = {}
    for name, codes in preset.items():
        np.save(voices / f"en_speaker_6_{name}.npy", codes)
        files[name] = f"speaker_embeddings/v2/en_speaker_6_{name}.npy"
    known = {"repo_or_path": str(folder), "v2/en_speaker_6": files}
    (folder / "speaker_embeddings_path.json").write_text(json.dumps(known))
    BarkProcessor(tokenizer).tokenizer.save_pretrained(folder)


def musicgen(folder: Path, channels: int = 1) -> None:
    from transformers import (
        MusicgenConfig,
        MusicgenDecoderConfig,
        MusicgenForConditionalGeneration,
        T5Config,
    )

    from tests.diffusers_checkpoints import _t5_tokenizer

    tokenizer = _t5_tokenizer()
    tokenizer.model_max_length = 20
    text = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    decoder = MusicgenDecoderConfig(
        vocab_size=16,
        max_position_embeddings=64,
        num_hidden_layers=1,
        ffn_dim=32,
        num_attention_heads=2,
        hidden_size=16,
        num_codebooks=4 * channels,
        audio_channels=channels,
        initializer_factor=0.5,
        pad_token_id=16,
        bos_token_id=16,
    )
    config = MusicgenConfig(
        text_encoder=text.to_dict(),
        audio_encoder=_encodec(codebook_size=16, books=4).to_dict(),
        decoder=decoder.to_dict(),
    )
    with _seeded():
        model = MusicgenForConditionalGeneration(config)
        _tell_codes_apart(model)
    own = model.generation_config
    own.do_sample, own.guidance_scale, own.max_length = True, 3.0, 40
    own.decoder_start_token_id = own.bos_token_id = own.pad_token_id = 16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def musicgen_stereo(folder: Path) -> None:
    musicgen(folder, channels=2)


BUILDERS = {
    builder.__name__: builder
    for builder in (
        vits,
        vits_of_two_speakers,
        vits_of_phonemes,
        speecht5,
        speecht5_without_end,
        bark,
        musicgen,
        musicgen_stereo,
    )
}


@contextmanager
def _seeded():
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield


def _encodec(*, codebook_size: int, books: int):
    """Of 24,000 samples a second, 320 to a code."""
    from transformers import EncodecConfig

    rate = 24_000 // 320
    bits = codebook_size.bit_length() - 1
    return EncodecConfig(
        target_bandwidths=[rate * bits * books / 1000],
        hidden_size=8,
        num_filters=4,
        codebook_size=codebook_size,
        codebook_dim=8,
        num_lstm_layers=1,
    )


def _tell_codes_apart(model) -> None:
    """A new codec has zeros for every code, and one sound for all: that of its biases."""
    for name, buffer in model.named_buffers():
        if name.endswith("codebook.embed"):
            buffer.normal_(std=200.0)
    for module in model.modules():
        if type(module).__name__ == "EncodecDecoder":
            for name, parameter in module.named_parameters():
                if "bias" in name:
                    parameter.data.zero_()


def _speak_up(module) -> None:
    """Make a vocoder loud enough to compare, and keep it from clipping."""
    import torch

    for name, parameter in module.named_parameters():
        if "bias" in name:
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.15)


def _pieces(folder: Path) -> str:
    """A sentencepiece model of single letters."""
    import sentencepiece

    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(["the quick brown fox jumps over the lazy dog", "it's so"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "letters"),
        model_type="char",
        vocab_size=34,
        hard_vocab_limit=False,
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return str(folder / "letters.model")


def _words():
    """BERT's word pieces: letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = LETTERS.replace(" ", "")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{one}" for one in letters)]
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(vocab)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
