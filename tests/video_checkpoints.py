"""Tiny video checkpoints with random weights: one for each family that Crane makes films with."""

from __future__ import annotations

from pathlib import Path

from tests.diffusers_checkpoints import (
    _clip_tokenizer,
    _save,
    _seeded,
    _t5,
    _t5_tokenizer,
    _text_config,
    _vae,
)


def wan(folder: Path, **transformer) -> None:
    import diffusers

    with _seeded():
        _save(diffusers.WanPipeline(**_wan_parts(**transformer)), folder)


def wan_image(folder: Path) -> None:
    """Wan 2.1's, which reads the picture through an encoder too."""
    import diffusers

    with _seeded():
        # Four channels of a mask and four latents of the picture beside those of the film.
        parts = _wan_parts(in_channels=12, image_dim=32, added_kv_proj_dim=24)
        pipeline = diffusers.WanImageToVideoPipeline(
            **parts, image_encoder=_image_encoder(), image_processor=_image_processor()
        )
        _save(pipeline, folder)


def wan_both(folder: Path) -> None:
    """Wan 2.2's small one: named as a pipeline of texts, and keeps a time for each frame."""
    import diffusers

    with _seeded():
        _save(diffusers.WanPipeline(**_wan_parts(), expand_timesteps=True), folder)


def ltx(folder: Path, **vae) -> None:
    import diffusers
    import torch

    with _seeded():
        pipeline = diffusers.LTXPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=diffusers.AutoencoderKLLTXVideo(
                latent_channels=8,
                block_out_channels=(8, 8, 8, 8),
                decoder_block_out_channels=(8, 8, 8, 8),
                layers_per_block=(1, 1, 1, 1, 1),
                decoder_layers_per_block=(1, 1, 1, 1, 1),
                spatio_temporal_scaling=(True, True, True, False),
                decoder_spatio_temporal_scaling=(True, True, True, False),
                **vae,
            ),
            text_encoder=_t5(hidden=32),
            tokenizer=_t5_tokenizer(),
            transformer=diffusers.LTXVideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                num_attention_heads=4,
                attention_head_dim=8,
                cross_attention_dim=32,
                num_layers=1,
                caption_channels=32,
            ),
        )
        for name, weights in pipeline.vae.named_parameters():
            if "per_channel_scale" in name:  # of the decoder's own noise, which begins as none
                torch.nn.init.constant_(weights, 0.5)
        _save(pipeline, folder)


def ltx_noisy(folder: Path) -> None:
    """Of 0.9.1 on: its decoder is told a time, and adds noise of its own."""
    ltx(
        folder,
        timestep_conditioning=True,
        decoder_inject_noise=(True, True, True, False, False),
        decoder_causal=False,
    )


def cogvideox(folder: Path) -> None:
    import diffusers

    with _seeded():
        _save(diffusers.CogVideoXPipeline(**_cogvideox_parts()), folder)


def cogvideox_image(folder: Path) -> None:
    """As the 5b-I2V is: its positions are learned, so it makes films of one size only."""
    import diffusers

    with _seeded():
        parts = _cogvideox_parts(
            in_channels=8,
            use_rotary_positional_embeddings=True,
            use_learned_positional_embeddings=True,
        )
        _save(diffusers.CogVideoXImageToVideoPipeline(**parts), folder)


def stable_video_diffusion(folder: Path) -> None:
    import diffusers

    with _seeded():
        pipeline = diffusers.StableVideoDiffusionPipeline(
            vae=diffusers.AutoencoderKLTemporalDecoder(
                block_out_channels=[32, 32, 32, 32],
                down_block_types=["DownEncoderBlock2D"] * 4,
                latent_channels=4,
            ),
            image_encoder=_image_encoder(projection_dim=32, image_size=224),
            unet=diffusers.UNetSpatioTemporalConditionModel(
                sample_size=8,
                down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
                up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
                block_out_channels=(32, 64),
                addition_time_embed_dim=32,
                projection_class_embeddings_input_dim=96,
                layers_per_block=1,
                cross_attention_dim=32,
                num_attention_heads=8,
                num_frames=5,
            ),
            scheduler=diffusers.EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                interpolation_type="linear",
                prediction_type="v_prediction",
                sigma_max=700.0,
                sigma_min=0.002,
                steps_offset=1,
                timestep_spacing="leading",
                timestep_type="continuous",
                use_karras_sigmas=True,
            ),
            feature_extractor=_image_processor(),
        )
        _save(pipeline, folder)


def text_to_video_ms(folder: Path) -> None:
    import diffusers
    import transformers

    with _seeded():
        pipeline = diffusers.TextToVideoSDPipeline(
            vae=_vae(),
            text_encoder=transformers.CLIPTextModel(_text_config()),
            tokenizer=_clip_tokenizer(),
            unet=diffusers.UNet3DConditionModel(**_UNET_3D),
            scheduler=_ddim(),
        )
        _save(pipeline, folder)


def i2vgen_xl(folder: Path) -> None:
    import diffusers
    import transformers

    with _seeded():
        pipeline = diffusers.I2VGenXLPipeline(
            vae=_vae(),
            text_encoder=transformers.CLIPTextModel(_text_config()),
            tokenizer=_clip_tokenizer(),
            image_encoder=_image_encoder(projection_dim=32),
            feature_extractor=_image_processor(),
            unet=diffusers.I2VGenXLUNet(**_UNET_3D),
            scheduler=_ddim(),
        )
        _save(pipeline, folder)


BUILDERS = (
    wan,
    wan_image,
    wan_both,
    ltx,
    ltx_noisy,
    cogvideox,
    cogvideox_image,
    stable_video_diffusion,
    text_to_video_ms,
    i2vgen_xl,
)

_UNET_3D = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}


def _ddim():
    import diffusers

    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
    )


def _wan_parts(**transformer) -> dict:
    import diffusers

    return {
        "vae": diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "text_encoder": _umt5(),
        "tokenizer": _t5_tokenizer(),
        "transformer": diffusers.WanTransformer3DModel(
            **{
                "in_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "ffn_dim": 32,
                "num_layers": 1,
                **transformer,
            },
            patch_size=(1, 2, 2),
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        ),
    }


def _cogvideox_parts(**transformer) -> dict:
    import diffusers

    return {
        "tokenizer": _t5_tokenizer(),
        "text_encoder": _t5(hidden=32),
        "vae": diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        ),
        "transformer": diffusers.CogVideoXTransformer3DModel(
            **{"in_channels": 4, **transformer},
            num_attention_heads=2,
            attention_head_dim=16,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=32,
            num_layers=1,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
        ),
        "scheduler": diffusers.CogVideoXDPMScheduler(),
    }


def _umt5():
    import transformers

    config = transformers.UMT5Config(
        vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4
    )
    return transformers.UMT5EncoderModel(config)


def _image_encoder(**more):
    import transformers

    config = transformers.CLIPVisionConfig(
        **{"image_size": 32, **more},
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        patch_size=16,
    )
    kind = "CLIPVisionModelWithProjection" if more else "CLIPVisionModel"
    return getattr(transformers, kind)(config)


def _image_processor():
    import transformers

    return transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
