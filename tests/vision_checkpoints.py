"""Tiny checkpoints of models that look at pictures. Seeds are fixed and weights are large."""

from __future__ import annotations

from pathlib import Path

from tests.checkpoints import _byte_tokenizer

KINDS = ["crane", "heron", "stork", "egret", "ibis"]
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "patch_size": 8,
}
_SIZE = {"height": 32, "width": 32}


def _labels(names=KINDS) -> dict:
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


def save(
    folder: Path, model_class: str, config, *processors, spread: float = 3.0, positive: str = "-"
) -> None:
    """Write a model whose random weights are ``spread`` times as far apart as its own.

    Those with ``positive`` in their name are above 0, so that a rectifier at the end lets through.
    """
    import torch
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = getattr(transformers, model_class)(config)
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or parameter.ndim == 0:
                continue
            if parameter.ndim == 1 or not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else 1.0)
            else:
                parameter.data *= spread
            if positive in name:
                parameter.data.abs_()
    model.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)


def vit(folder: Path) -> None:
    """Resizes each picture to one size."""
    from transformers import ViTConfig, ViTImageProcessorPil

    config = ViTConfig(image_size=32, **_VIT, **_labels())
    processor = ViTImageProcessorPil(size=_SIZE)
    save(folder, "ViTForImageClassification", config, processor, spread=8)


def vit_several(folder: Path) -> None:
    """Judges each label by itself."""
    from transformers import ViTConfig, ViTImageProcessorPil

    config = ViTConfig(
        image_size=32, problem_type="multi_label_classification", **_VIT, **_labels()
    )
    save(folder, "ViTForImageClassification", config, ViTImageProcessorPil(size=_SIZE), spread=8)


def vit_regression(folder: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessorPil

    config = ViTConfig(image_size=32, problem_type="regression", **_VIT, **_labels(["beauty"]))
    save(folder, "ViTForImageClassification", config, ViTImageProcessorPil(size=_SIZE), spread=8)


def convnext(folder: Path) -> None:
    """Resizes the shorter side, then cuts out the middle."""
    from transformers import ConvNextConfig, ConvNextImageProcessorPil

    config = ConvNextConfig(
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_scale_init_value=1.0,
        initializer_range=0.3,
        **_labels(),
    )
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 48}, crop_pct=0.875)
    save(folder, "ConvNextForImageClassification", config, processor, spread=1)


def clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessorPil

    text = {
        "vocab_size": 400,
        "max_position_embeddings": 40,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    config = CLIPConfig(
        text_config=text, vision_config={**_VIT, "image_size": 32}, projection_dim=16
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=_SIZE)
    tokenizer = _byte_tokenizer(template="<s> $A </s>", model_max_length=40)
    save(folder, "CLIPModel", config, processor, tokenizer, spread=6)


def siglip(folder: Path) -> None:
    """Has more positions than the 64 it was taught with."""
    from transformers import SiglipConfig, SiglipImageProcessorPil

    text = {
        "vocab_size": 400,
        "max_position_embeddings": 80,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_size": 32,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    config = SiglipConfig(text_config=text, vision_config={**_VIT, "image_size": 32})
    tokenizer = _byte_tokenizer(template="$A </s>")
    save(folder, "SiglipModel", config, SiglipImageProcessorPil(size=_SIZE), tokenizer, spread=4)


def yolos(folder: Path) -> None:
    """Resizes to one size; every box has a score."""
    from transformers import YolosConfig, YolosImageProcessorPil

    config = YolosConfig(
        image_size=[32, 32],
        num_detection_tokens=8,
        use_mid_position_embeddings=False,
        **_VIT,
        **_labels(),
    )
    processor = YolosImageProcessorPil(size=_SIZE, do_pad=False)
    save(folder, "YolosForObjectDetection", config, processor, spread=12)


_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage4"],
}
_DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "num_queries": 8,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


def detr(folder: Path) -> None:
    """Keeps a picture's shape, and pads those of a batch to the largest."""
    from transformers import DetrConfig, DetrImageProcessorPil, ResNetConfig

    backbone = ResNetConfig(**{k: v for k, v in _RESNET.items() if k != "model_type"})
    config = DetrConfig(backbone_config=backbone, **_DETR, **_labels())
    processor = DetrImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 80})
    save(folder, "DetrForObjectDetection", config, processor, spread=12)


def segformer(folder: Path) -> None:
    from transformers import SegformerConfig, SegformerImageProcessorPil

    config = SegformerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        **_labels(),
    )
    processor = SegformerImageProcessorPil(size={"height": 64, "width": 64})
    save(folder, "SegformerForSemanticSegmentation", config, processor, spread=8)


def mask2former(folder: Path) -> None:
    """Tells kinds, things or both apart."""
    from transformers import Mask2FormerConfig, Mask2FormerImageProcessorPil, SwinConfig

    backbone = SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=8,
        **_labels(),
    )
    processor = Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}, ignore_index=255)
    save(folder, "Mask2FormerForUniversalSegmentation", config, processor, spread=12)


def dpt(folder: Path) -> None:
    from transformers import DPTConfig, DPTImageProcessorPil

    config = DPTConfig(
        image_size=32,
        **(_VIT | {"num_hidden_layers": 4}),
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        is_hybrid=False,
        backbone_config=None,
    )
    processor = DPTImageProcessorPil(size=_SIZE)
    save(folder, "DPTForDepthEstimation", config, processor, positive="head.head.4")


def depth_anything(folder: Path) -> None:
    """Keeps a picture's shape."""
    from transformers import DepthAnythingConfig, Dinov2Config, DPTImageProcessorPil

    backbone = Dinov2Config(
        image_size=56,
        **(_VIT | {"patch_size": 14, "num_hidden_layers": 4}),
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        patch_size=14,
    )
    processor = DPTImageProcessorPil(
        size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14
    )
    save(folder, "DepthAnythingForDepthEstimation", config, processor, positive="head.conv3")


BUILDERS = {
    builder.__name__: builder
    for builder in (
        vit,
        vit_several,
        vit_regression,
        convnext,
        clip,
        siglip,
        yolos,
        detr,
        segformer,
        mask2former,
        dpt,
        depth_anything,
    )
}
