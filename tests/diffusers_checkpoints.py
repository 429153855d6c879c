"""Tiny diffusers checkpoints with random weights: one for each family that Crane draws with."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path


def stable_diffusion(folder: Path, **unet) -> None:
    """SD 1.5's parts: 64 x 64 pixels by itself, a scheduler that draws nothing."""
    import diffusers

    with _seeded():
        parts = _sd_parts(**unet)
        _save(diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False), folder)


def stable_diffusion_shallow(folder: Path) -> None:
    """So small a UNet that it is compiled in seconds."""
    stable_diffusion(
        folder,
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )


def stable_diffusion_inpainting(folder: Path) -> None:
    """An inpainting checkpoint proper, whose UNet reads the mask and the masked image too."""
    import diffusers

    with _seeded():
        parts = _sd_parts(in_channels=9)
        pipeline = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
        _save(pipeline, folder)


def stable_diffusion_flagging(folder: Path) -> None:
    """Its safety checker flags every picture."""
    import diffusers
    import torch
    import transformers
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    vision = transformers.CLIPVisionConfig(**_TEXT, image_size=32, patch_size=16)
    config = transformers.CLIPConfig(
        text_config=_text_config().to_dict(), vision_config=vision.to_dict(), projection_dim=32
    )
    with _seeded():
        parts = _sd_parts()
        checker = StableDiffusionSafetyChecker(config)
        torch.nn.init.constant_(checker.concept_embeds_weights, -2.0)
        parts["safety_checker"] = checker
        parts["feature_extractor"] = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        _save(diffusers.StableDiffusionPipeline(**parts), folder)


def stable_diffusion_xl(folder: Path) -> None:
    import diffusers
    import transformers

    with _seeded():
        parts = _sd_parts(
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
        )
        del parts["safety_checker"]
        second = transformers.CLIPTextModelWithProjection(_text_config(projection_dim=32))
        pipeline = diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=second, tokenizer_2=parts["tokenizer"]
        )
        _save(pipeline, folder)


def stable_diffusion_3(folder: Path) -> None:
    import diffusers
    import torch
    import transformers

    with _seeded():
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            out_channels=16,
        )
        encoders = [
            transformers.CLIPTextModelWithProjection(_text_config(projection_dim=32))
            for _ in range(2)
        ]
        tokenizer = _clip_tokenizer()
        pipeline = diffusers.StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=_vae(
                latent_channels=16,
                shift_factor=0.06,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            text_encoder=encoders[0],
            tokenizer=tokenizer,
            text_encoder_2=encoders[1],
            tokenizer_2=tokenizer,
            text_encoder_3=_t5(hidden=64),
            tokenizer_3=_t5_tokenizer(),
        )
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
        _save(pipeline, folder)


def flux(folder: Path) -> None:
    import diffusers
    import torch
    import transformers

    with _seeded():
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )
        pipeline = diffusers.FluxPipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=transformers.CLIPTextModel(_text_config()),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_t5(hidden=32),
            tokenizer_2=_t5_tokenizer(),
        )
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
        _save(pipeline, folder)


BUILDERS = (
    stable_diffusion,
    stable_diffusion_shallow,
    stable_diffusion_inpainting,
    stable_diffusion_flagging,
    stable_diffusion_xl,
    stable_diffusion_3,
    flux,
)

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
# Letters as CLIP splits them: inside a word, and at its end.
_LETTERS = "abcdefghijklmnopqrstuvwxyz.,"
_CLIP_VOCAB = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
_CLIP_VOCAB += ["<|startoftext|>", "<|endoftext|>"]


def _text_config(**more):
    import transformers

    ends = {"bos_token_id": len(_CLIP_VOCAB) - 2, "eos_token_id": len(_CLIP_VOCAB) - 1}
    return transformers.CLIPTextConfig(
        vocab_size=len(_CLIP_VOCAB), **_TEXT, **ends, pad_token_id=ends["eos_token_id"], **more
    )


def _clip_tokenizer():
    import transformers

    vocab = {token: number for number, token in enumerate(_CLIP_VOCAB)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _t5(hidden: int):
    import transformers

    config = transformers.T5Config(
        vocab_size=400, d_model=hidden, d_kv=8, d_ff=64, num_layers=1, num_heads=4
    )
    return transformers.T5EncoderModel(config)


def _t5_tokenizer():
    import transformers

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *_LETTERS]
    vocab = [(piece, -float(number)) for number, piece in enumerate(pieces)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def _vae(latent_channels=4, **more):
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=[16, 16, 32, 32],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=64,
        **more,
    )


def _sd_parts(**unet) -> dict:
    import diffusers
    import transformers

    shape = {
        "sample_size": 8,
        "layers_per_block": 1,
        "in_channels": 4,
        "cross_attention_dim": 32,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return {
        "unet": diffusers.UNet2DConditionModel(
            **shape | unet,
            out_channels=4,
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        "scheduler": diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        "vae": _vae(),
        "text_encoder": transformers.CLIPTextModel(_text_config()),
        "tokenizer": _clip_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
    }


@contextmanager
def _seeded():
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield


def _save(pipeline, folder: Path) -> None:
    pipeline.save_pretrained(folder)
