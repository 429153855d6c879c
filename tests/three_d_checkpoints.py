"""A tiny Shap-E with random weights, whose latents give a surface."""

from __future__ import annotations

from pathlib import Path

from tests.diffusers_checkpoints import _clip_tokenizer, _save, _seeded, _text_config


def shap_e(folder: Path, sdf_bias: float = 0.0) -> None:
    import diffusers
    import torch
    import transformers
    from diffusers.pipelines.shap_e import ShapERenderer

    hidden, latent = 8, 16
    inputs = 93  # of an encoded position
    shapes = ((hidden, inputs), (hidden, hidden))
    with _seeded():
        prior = diffusers.PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=8,
            embedding_dim=latent,
            num_embeddings=2 * hidden,
            embedding_proj_dim=32,
            embedding_proj_norm_type=None,
            encoder_hid_proj_type=None,
            added_emb_type=None,
            time_embed_act_fn="gelu",
            time_embed_dim=64,
            num_layers=1,
            clip_embed_dim=2 * latent,
            additional_embeddings=0,
            norm_in_type="layer",
        )
        renderer = ShapERenderer(
            param_names=("nerstf.mlp.0.weight", "nerstf.mlp.1.weight"),
            param_shapes=shapes,
            d_latent=latent,
            d_hidden=hidden,
            n_output=12,
            n_hidden_layers=2,
            insert_direction_at=2,
        )
        for part in renderer.mlp.mlp:
            torch.nn.init.normal_(part.weight, std=1.0)
        torch.nn.init.constant_(renderer.mlp.mlp[-1].bias[0], sdf_bias)
        # Of an encoded position the layer reads the position itself: a smooth surface, of some
        # thousand vertices.
        first = renderer.params_proj.projections["nerstf__mlp__0__weight"]
        torch.nn.init.zeros_(first.norm.weight[3:])
        torch.nn.init.zeros_(first.proj.bias)
        cases, masks = marching_cubes()
        renderer.mesh_decoder.cases.copy_(cases)
        renderer.mesh_decoder.masks.copy_(masks)
        scheduler = diffusers.HeunDiscreteScheduler(
            beta_schedule="exp",
            num_train_timesteps=1024,
            prediction_type="sample",
            use_karras_sigmas=True,
            clip_sample=True,
            clip_sample_range=1.0,
        )
        pipeline = diffusers.ShapEPipeline(
            prior=prior,
            text_encoder=transformers.CLIPTextModelWithProjection(_text_config(projection_dim=32)),
            tokenizer=_clip_tokenizer(),
            scheduler=scheduler,
            shap_e_renderer=renderer,
        )
        _save(pipeline, folder)


def shap_e_empty(folder: Path) -> None:
    """Everywhere is outside: no surface."""
    shap_e(folder, sdf_bias=-1e4)


def marching_cubes():
    """Triangles on the edges that a surface crosses, for each of a cube's 256 kinds.

    A fan over the crossed edges, which is no fine surface, but has each kind's own vertices; a
    real checkpoint has a real table.
    """
    import torch

    cases = torch.zeros(256, 5, 3, dtype=torch.long)
    masks = torch.zeros(256, 5, dtype=torch.bool)
    # The order of edges is the renderer's: along x, then y, then z; corners are x + 2 y + 4 z.
    along = [[(a, a + 1) for a in (0, 2, 4, 6)]]
    along += [[(a, a + 2) for a in (0, 1, 4, 5)]]
    along += [[(a, a + 4) for a in (0, 1, 2, 3)]]
    edges = [edge for axis in along for edge in axis]
    for kind in range(256):
        crossed = [i for i, (a, b) in enumerate(edges) if (kind >> a & 1) != (kind >> b & 1)]
        for number in range(min(5, max(0, len(crossed) - 2))):
            cases[kind, number] = torch.tensor([crossed[0], *crossed[number + 1 : number + 3]])
            masks[kind, number] = True
    return cases, masks
