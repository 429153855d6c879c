"""Tiny checkpoints with random weights for the generic tasks, and one for each way to fail there.

Weights are large, so that scores are well apart.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests import checkpoints
from tests.checkpoints import CHAT_TEMPLATE, WORDS
from tests.diffusers_checkpoints import _clip_tokenizer, _seeded

LABELS = ["river", "tower", "engine", "harbour", "bridge", "music", "food"]
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_NAMED = {
    "id2label": dict(enumerate(LABELS)),
    "label2id": {label: number for number, label in enumerate(LABELS)},
}


def wav2vec2(folder: Path, **more) -> None:
    """Hears 8,000 samples a second, of any length."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor

    config = Wav2Vec2Config(
        **SMALL,
        **_NAMED,
        **more,
        vocab_size=32,
        conv_dim=(16, 16, 16),
        conv_kernel=(10, 3, 2),
        conv_stride=(5, 2, 2),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
    )
    _save(folder, "Wav2Vec2ForSequenceClassification", config)
    Wav2Vec2FeatureExtractor(sampling_rate=8_000).save_pretrained(folder)


def wav2vec2_multi_label(folder: Path) -> None:
    wav2vec2(folder, problem_type="multi_label_classification")


def spectrogram_transformer(folder: Path) -> None:
    """AST: hears the first 0.995 s, and its extractor leaves the rest without a word."""
    from transformers import ASTConfig, ASTFeatureExtractor

    config = ASTConfig(**SMALL, **_NAMED, max_length=98, num_mel_bins=32, patch_size=8)
    _save(folder, "ASTForAudioClassification", config)
    ASTFeatureExtractor(max_length=98, num_mel_bins=32).save_pretrained(folder)


def clap(folder: Path) -> None:
    """Hears 2 s; of what is longer its extractor takes 2 s by lot."""
    from transformers import ClapConfig, ClapFeatureExtractor

    tokenizer = checkpoints._byte_tokenizer("<s> $A </s>")
    text = {**SMALL, "vocab_size": 400, "max_position_embeddings": 40, "pad_token_id": 2}
    audio = {
        "window_size": 4,
        "num_mel_bins": 16,
        "spec_size": 64,
        "patch_size": 2,
        "patch_stride": (2, 2),
        "hidden_size": 32,
        "patch_embeds_hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
        "enable_fusion": False,
    }
    config = ClapConfig(
        text_config={**text, "projection_dim": 32},
        audio_config={**audio, "projection_dim": 32},
        projection_dim=32,
        logit_scale_init_value=3.0,
    )
    _save(folder, "ClapModel", config)
    tokenizer.model_max_length = 32
    tokenizer.save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=16_000,
        hop_length=160,
        max_length_s=2,
        fft_window_size=512,
        frequency_max=8_000,
        truncation="rand_trunc",
    ).save_pretrained(folder)


def videomae(folder: Path) -> None:
    from transformers import VideoMAEConfig, VideoMAEImageProcessorPil

    config = VideoMAEConfig(
        **SMALL, **_NAMED, image_size=32, patch_size=8, num_frames=4, tubelet_size=2
    )
    _save(folder, "VideoMAEForVideoClassification", config)
    VideoMAEImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)


def sam(folder: Path) -> None:
    from transformers import SamConfig, SamImageProcessorPil

    config = SamConfig(
        vision_config={
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [1],
            "num_pos_feats": 8,
            "mlp_dim": 32,
            "initializer_range": 0.02,
        },
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": 64,
            "patch_size": 8,
            "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )
    _save(folder, "SamModel", config)
    SamImageProcessorPil(
        size={"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    ).save_pretrained(folder)


def vit(folder: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessorPil

    _save(folder, "ViTModel", ViTConfig(**SMALL, image_size=32, patch_size=8))
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def segformer(folder: Path) -> None:
    """Has no vector for the whole picture."""
    from transformers import SegformerConfig, SegformerImageProcessorPil

    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
    )
    _save(folder, "SegformerModel", config)
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def bert(folder: Path) -> None:
    checkpoints._bert(folder, "BertModel", ["any"])


def owlvit(folder: Path) -> None:
    from transformers import OwlViTConfig, OwlViTImageProcessorPil

    tokenizer = _clip_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = OwlViTConfig(
        text_config={**SMALL, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    _save(folder, "OwlViTForObjectDetection", config)
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(folder)
    OwlViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def superglue(folder: Path) -> None:
    from transformers import SuperGlueConfig, SuperGlueImageProcessorPil, SuperPointConfig

    points = SuperPointConfig(
        encoder_hidden_sizes=[8, 8, 16, 16],
        decoder_hidden_size=16,
        descriptor_decoder_dim=32,
        keypoint_threshold=0.0,
        max_keypoints=24,
    )
    config = SuperGlueConfig(
        keypoint_detector_config=points,
        hidden_size=32,
        keypoint_encoder_sizes=[16, 32],
        gnn_layers_types=["self", "cross"],
        num_attention_heads=4,
        sinkhorn_iterations=20,
    )
    _save(folder, "SuperGlueForKeypointMatching", config)
    SuperGlueImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)


def layoutlm(folder: Path) -> None:
    from transformers import LayoutLMConfig

    tokenizer = _word_tokenizer()
    config = LayoutLMConfig(
        **SMALL, vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0
    )
    _save(folder, "LayoutLMForQuestionAnswering", config)
    tokenizer.save_pretrained(folder)


def tapas(folder: Path) -> None:
    from transformers import TapasConfig, TapasTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?'"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[EMPTY]", *WORDS[2:], *letters]
    vocab += [f"##{letter}" for letter in letters]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocab)))
    tokenizer = TapasTokenizer(str(folder / "vocab.txt"), model_max_length=64)
    config = TapasConfig(
        **SMALL,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        pad_token_id=0,
        num_aggregation_labels=3,
        aggregation_labels={0: "NONE", 1: "SUM", 2: "COUNT"},
        no_aggregation_label_index=0,
        select_one_column=True,
    )
    _save(folder, "TapasForQuestionAnswering", config)
    tokenizer.save_pretrained(folder)


def decider(folder: Path) -> None:
    """Any chat model decides, by the tokens that its options are called."""
    config = checkpoints._llama_config()
    config.max_position_embeddings = 1024
    checkpoints._causal(folder, config, chat_template=CHAT_TEMPLATE)
    (folder / "decision.json").write_text(json.dumps({"labels": {"noul": ["Y", "N"]}}))


def _word_tokenizer():
    """Splits into words, which LayoutLM is told by their boxes, and these into letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?'"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS[2:], *letters]
    vocab += [f"##{letter}" for letter in letters]
    backend = Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _save(folder: Path, model_class: str, config) -> None:
    import torch
    import transformers

    with _seeded():
        model = getattr(transformers, model_class)(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                torch.nn.init.normal_(parameter, std=0.3)
            elif "norm" not in name.lower() and parameter.ndim == 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)


def donut(folder: Path) -> None:
    """Reads the picture by itself, and would draw its answer at random."""
    import torch
    import transformers

    letters = "abcdefghijklmnopqrstuvwxyz .,?"
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *letters]
    marks = ["<s_docvqa>", "<s_question>", "</s_question>", "<s_answer>", "</s_answer>"]
    tokenizer = checkpoints._byte_tokenizer("$A", special=[*pieces[:4], "<mask>", *marks])
    encoder = transformers.DonutSwinConfig(
        image_size=[32, 32],
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    )
    decoder = transformers.MBartConfig(
        vocab_size=400,
        d_model=32,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        is_decoder=True,
        add_cross_attention=True,
        is_encoder_decoder=False,
        init_std=0.4,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    with _seeded():
        model = transformers.VisionEncoderDecoderModel(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        max_new_tokens=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=0,
        temperature=3.0,
        forced_eos_token_id=tokenizer.convert_tokens_to_ids("</s_answer>"),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.DonutImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
