"""Tiny checkpoints of models that write about pictures, with random weights."""

from __future__ import annotations

from pathlib import Path

from tests.checkpoints import THINKER_ENDS, THINKER_SAYS, _byte_tokenizer, speaker
from tests.vision_checkpoints import _SIZE, _VIT, _labels

_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_TEXT = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' and loop.first %}"
    "{{ raise_exception('the first message must not be the assistant\\'s') }}"
    "{% endif %}"
    "{{ message['role'] }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save(
    folder: Path, model_class: str, config, *parts, spread=8.0, ends=1, end=1, **generation
) -> None:
    """Write a model that ends now and then, and never writes half a character."""
    import torch
    import transformers

    tokenizer = next(part for part in parts if hasattr(part, "decode") and hasattr(part, "vocab"))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = getattr(transformers, model_class)(config)
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or "ln_" in name or parameter.ndim == 0:
                continue
            if parameter.ndim == 1 or (parameter.ndim == 3 and "embedding" in name):
                torch.nn.init.normal_(parameter, std=0.02)
            else:
                # What is written depends on what is seen.
                parameter.data *= spread * (20 if "patch" in name else 1)
        # Only the rows of a head that are no half characters may win.
        for head in (model.get_output_embeddings(), *_heads(model)):
            if head is None:
                continue
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
            texts = [tokenizer.decode([one], skip_special_tokens=True) for one in range(400)]
            mute = [not one.isprintable() or one in ("", "\ufffd") for one in texts]
            mute[ends] = False
            head.weight.data[:400][mute] = 0
            head.weight.data[400:] = 0
            head.weight.data[ends] *= end
            if head.bias is not None:
                head.bias.data.zero_()
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)


def _heads(model):
    """BLIP's and an encoder-decoder's heads are their decoder's."""
    for name in ("text_decoder", "decoder"):
        if (decoder := getattr(model, name, None)) is not None:
            yield decoder.get_output_embeddings()


def _tokenizer(**more):
    return _byte_tokenizer(template="<s> $A </s>", model_max_length=40, **more)


def vit_gpt2(folder: Path) -> None:
    """A picture's encoder and a text's decoder that come from different models."""
    from transformers import GPT2Config, VisionEncoderDecoderConfig, ViTConfig, ViTImageProcessorPil

    decoder = GPT2Config(
        vocab_size=400,
        n_positions=48,
        n_embd=32,
        n_layer=2,
        n_head=4,
        add_cross_attention=True,
        is_decoder=True,
        tie_word_embeddings=False,
        **_SPECIAL,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(image_size=32, **_VIT),
        decoder,
        decoder_start_token_id=0,
        **_SPECIAL,
        tie_word_embeddings=False,
    )
    save(
        folder,
        "VisionEncoderDecoderModel",
        config,
        ViTImageProcessorPil(size=_SIZE),
        _tokenizer(),
        decoder_start_token_id=0,
        **_SPECIAL,
    )


def _blip(cls: str, folder: Path) -> None:
    from transformers import BlipConfig, BlipImageProcessorPil

    text = {
        **_TEXT,
        "max_position_embeddings": 40,
        "encoder_hidden_size": 32,
        "tie_word_embeddings": False,
        "projection_dim": 16,
        "bos_token_id": 0,
        "eos_token_id": 3,  # BLIP's end is the separator
        "sep_token_id": 1,
        "pad_token_id": 2,
    }
    config = BlipConfig(
        text_config=text,
        vision_config={**_VIT, "image_size": 32, "initializer_range": 0.02},
        projection_dim=16,
        image_text_hidden_size=16,
        tie_word_embeddings=False,
    )
    save(folder, cls, config, BlipImageProcessorPil(size=_SIZE), _tokenizer(), end=5)


def blip(folder: Path) -> None:
    _blip("BlipForConditionalGeneration", folder)


def blip_vqa(folder: Path) -> None:
    _blip("BlipForQuestionAnswering", folder)


def git(folder: Path) -> None:
    from transformers import CLIPImageProcessorPil, GitConfig

    config = GitConfig(
        vision_config={**_VIT, "image_size": 32},
        max_position_embeddings=40,
        tie_word_embeddings=False,
        **_TEXT,
        **_SPECIAL,
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=_SIZE)
    save(folder, "GitForCausalLM", config, processor, _tokenizer(), **_SPECIAL)


def vilt(folder: Path) -> None:
    from transformers import ViltConfig, ViltImageProcessorPil

    config = ViltConfig(
        image_size=32,
        patch_size=8,
        max_position_embeddings=40,
        type_vocab_size=2,
        modality_type_vocab_size=2,
        max_image_length=-1,
        **_TEXT,
        **_labels(["yes", "no", "two", "red", "blue", "a crane"]),
    )
    from tests.vision_checkpoints import save as save_plain

    processor = ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=8)
    save_plain(folder, "ViltForQuestionAnswering", config, processor, _tokenizer(), spread=20)


def _llama(**more) -> dict:
    return {
        "model_type": "llama",
        **_TEXT,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        **_SPECIAL,
        **more,
    }


def _chat_tokenizer(*marks):
    tokenizer = _byte_tokenizer(template="<s> $A")
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    return tokenizer


def _llava_parts(text_config, tokenizer, template):
    """A configuration and a processor."""
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaProcessor

    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_VIT, "image_size": 32},
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=_SIZE),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return config, processor


def llava(folder: Path) -> None:
    """Every picture is 16 tokens."""
    tokenizer = _chat_tokenizer("<image>")
    template = TEMPLATE.replace("PLACE", "<image>")
    config, processor = _llava_parts(_llama(vocab_size=408), tokenizer, template)
    save(folder, "LlavaForConditionalGeneration", config, processor, tokenizer, **_SPECIAL)


def llava_thinker(folder: Path) -> None:
    """Says what the text model ``thinker`` says, whatever it sees."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

    template = (
        "{% for message in messages %}<s>{{ message.role }}\n{% for part in message.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
        "{{ message.tool_calls | default('') }}</s>{% endfor %}"
        "{{ tools | default('') }}<s>assistant\n"
    )
    speaker(folder, template, THINKER_SAYS, special=["<image>"])
    text = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config, processor = _llava_parts(text.config.to_dict(), tokenizer, template + THINKER_ENDS)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def llava_without_template(folder: Path) -> None:
    llava(folder)
    (folder / "chat_template.jinja").unlink()


def qwen2_vl(folder: Path) -> None:
    """A picture has as many tokens as its size wants; its processor would read films too."""
    from transformers import Qwen2VLConfig, Qwen2VLImageProcessorPil

    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _chat_tokenizer(*marks)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(marks))
    config = Qwen2VLConfig(
        text_config={
            **_TEXT,
            "vocab_size": 408,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
            "tie_word_embeddings": False,
            **_SPECIAL,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    processor = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=32 * 32, max_pixels=64 * 64
    )
    tokenizer.chat_template = TEMPLATE.replace(
        "PLACE", "<|vision_start|><|image_pad|><|vision_end|>"
    )
    save(folder, "Qwen2VLForConditionalGeneration", config, processor, tokenizer, **_SPECIAL)
    # As on the Hub: the name of the whole processor, which needs torchvision for its films.
    import json

    file = folder / "preprocessor_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "processor_class": "Qwen2VLProcessor"})
    )


def idefics3(folder: Path) -> None:
    """Cuts a picture into tiles, more or fewer of them."""
    from transformers import Idefics3Config, Idefics3ImageProcessorPil, Idefics3Processor

    marks = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    rows = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tokenizer = _chat_tokenizer(*marks, *rows)
    config = Idefics3Config(
        vision_config={**_VIT, "image_size": 32},
        text_config=_llama(vocab_size=416),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=2,
    )
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer,
        image_seq_len=4,
        chat_template=TEMPLATE.replace("PLACE", "<image>"),
    )
    save(folder, "Idefics3ForConditionalGeneration", config, processor, tokenizer, **_SPECIAL)


BUILDERS = {
    builder.__name__: builder
    for builder in (
        vit_gpt2,
        blip,
        blip_vqa,
        git,
        vilt,
        llava,
        llava_thinker,
        llava_without_template,
        qwen2_vl,
        idefics3,
    )
}
