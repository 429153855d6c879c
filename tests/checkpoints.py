"""Tiny checkpoints with random weights, one for each kind of model that Crane serves.

Each builder writes a folder that ``from_pretrained`` takes. Seeds are fixed and weights are large,
so that a greedy choice is no near-tie and scores are well apart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests import diffusers_checkpoints

WORDS = re.findall(
    r"\w+",
    """the a of in and to was is on at river mountain city harbour engine signal morning evening
    paris london tower bridge metres tall old new small large built burned sailed answered
    wrote sold red green quiet question context sport politics science music food weather""",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}"
    "{% endif %}"
    "<s>{{ message['role'] }}\n{{ message['content'] }}</s>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


# Shows, in its refusal, all that it was told, where the last message is "show".
_SHOW = (
    "{% if messages[-1].content == 'show' %}"
    "{{ raise_exception(dict(messages=messages, tools=tools, thinking=enable_thinking"
    " is undefined and 'unset' or enable_thinking) | tojson) }}"
    "{% endif %}"
)
_TALK = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}<s>assistant\n"
)
THINKER_ENDS = (
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n|no thoughts|"
    "{% elif messages[-1].content == 'go on' %}<think>"
    "{% elif messages[-1].role == 'tool' %}|told|"
    "{% elif tools %}|tools|"
    "{% else %}|plain|{% endif %}"
    "{# <tool_call> #}"
)
THINKER_TEMPLATE = _SHOW + _TALK + THINKER_ENDS
# What each prompt's end is followed by. As a token is followed by one other alone, none is twice.
THINKER_SAYS = [
    ["|plain|", "<think>", "\nhm", " so", " STOP", "\n</think>", "\n\nYes", ", it", " is",
     " é STOP", " it is.\n"],
    ["|tools|", "<thi", "nk>I", " ask", "</thi", "nk>\nLet", " me", " look.", "\n<tool_call>\n",
     '{"name": "weather",', ' "arguments": {"city": ', ' "Köln"} }', "\n</tool", "_call>",
     "\n<tool", "_call>{", '"name": "clock", "arguments": {}}', "</tool_call>", "\n\n"],
    ["|told|", "Rain", ", then", " sun.", " <tool_call> ", "{}", " </tool_call>"],
    ["|no thoughts|", "Sure", "."],
]  # fmt: skip
SPECIAL_TEMPLATE = (
    _TALK + "{% if tools %}|tools|{% else %}|plain|{% endif %}{# [THINK][TOOL_CALLS] #}"
)
SPECIAL_SAYS = [
    ["|plain|", "[THINK]", "hm ", "so", "[/THINK]", "Yes ", "<pad>", "it is."],
    ["|tools|", "[TOOL_CALLS]", "weather", "[ARGS]", '{"city": "Paris"}'],
]
SPECIAL = ["[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]"]


def sentence(words: int, seed: int = 0) -> str:
    """So many words of the tokenizers' own corpus, the same for the same seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def llama(folder: Path) -> None:
    _causal(folder, _llama_config(), chat_template=CHAT_TEMPLATE)


def thinker(folder: Path) -> None:
    """Says what it says with marks that are text, as Qwen's models do."""
    speaker(folder, THINKER_TEMPLATE, THINKER_SAYS)


def special_thinker(folder: Path) -> None:
    """With marks that are special tokens, as Mistral's models do."""
    speaker(folder, SPECIAL_TEMPLATE, SPECIAL_SAYS, special=SPECIAL)


def caller(folder: Path) -> None:
    """Calls tools and does not think."""
    template = _TALK + "{% if tools %}|tools|{% endif %}{# [TOOL_CALLS] #}"
    speaker(folder, template, SPECIAL_SAYS[1:], special=SPECIAL[2:])


def large_llama(folder: Path, layers: int) -> None:
    """As ``llama``, of 17 MB for each layer."""
    config = _llama_config()
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 2048, layers
    config.num_attention_heads = config.num_key_value_heads = 8
    config.head_dim = 64
    _causal(folder, config)


def llama_without_end(folder: Path) -> None:
    """Never ends by itself, and has no token for padding."""
    _causal(folder, _llama_config(eos_token_id=None), eos_token=None)


def gpt2(folder: Path) -> None:
    """Learned positions, and so few of them that a batch reaches the last one."""
    from transformers import GPT2Config

    _causal(
        folder,
        GPT2Config(
            vocab_size=400,
            n_positions=48,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.4,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
        ),
    )


def bart(folder: Path) -> None:
    from transformers import BartConfig

    config = BartConfig(
        vocab_size=400,
        max_position_embeddings=64,
        **_SEQ2SEQ,
        **_SPECIAL,
        init_std=0.4,
        decoder_start_token_id=1,
        forced_eos_token_id=1,
        tie_word_embeddings=False,
    )
    _save(folder, "BartForConditionalGeneration", config, _byte_tokenizer(template="<s> $A </s>"))


def t5(folder: Path) -> None:
    from transformers import T5Config

    config = T5Config(
        vocab_size=400,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        initializer_factor=3.0,
        tie_word_embeddings=False,
        decoder_start_token_id=2,
        pad_token_id=2,
        eos_token_id=1,
    )
    _save(folder, "T5ForConditionalGeneration", config, _byte_tokenizer(template="$A </s>"))


def nllb(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import M2M100Config, NllbTokenizer

    letters = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz.,", "<mask>"]
    tokenizer = NllbTokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    assert isinstance(tokenizer.backend_tokenizer, Tokenizer)
    assert isinstance(tokenizer.backend_tokenizer.model, BPE)
    config = M2M100Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        **_SEQ2SEQ,
        init_std=0.4,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        tie_word_embeddings=False,
    )
    _save(folder, "M2M100ForConditionalGeneration", config, tokenizer)


def bert_classifier(folder: Path) -> None:
    _bert(folder, "BertForSequenceClassification", ["calm", "glad", "sad", "angry"])


def roberta_classifier(folder: Path) -> None:
    """Counts positions from 2 on: 66 positions are a window of 64."""
    from transformers import RobertaConfig

    config = RobertaConfig(
        vocab_size=400,
        max_position_embeddings=66,
        type_vocab_size=1,
        **_ENCODER,
        **_labels(["no", "yes"]),
        **_SPECIAL | {"pad_token_id": 1, "eos_token_id": 2},
    )
    tokenizer = _byte_tokenizer(
        template="<s> $A </s>", special=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    _save(folder, "RobertaForSequenceClassification", config, tokenizer)


def gpt2_classifier(folder: Path) -> None:
    """A classifier whose tokenizer has no padding token."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=400,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
        **_labels(["low", "high"]),
    )
    _save(folder, "GPT2ForSequenceClassification", config, _byte_tokenizer(pad_token=None))


def nli(folder: Path) -> None:
    _bert(folder, "BertForSequenceClassification", ["contradiction", "neutral", "entailment"])


def token_classifier(folder: Path) -> None:
    _bert(folder, "BertForTokenClassification", ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])


def question_answerer(folder: Path) -> None:
    _bert(folder, "BertForQuestionAnswering", ["start", "end"])


def masked_lm(folder: Path) -> None:
    _bert(folder, "BertForMaskedLM", ["any"])


def masked_lm_without_mask(folder: Path) -> None:
    _bert(folder, "BertForMaskedLM", ["any"], mask_token=None)


def cross_encoder(folder: Path) -> None:
    _bert(folder, "BertForSequenceClassification", ["relevance"])


def llama_without_template(folder: Path) -> None:
    _causal(folder, _llama_config())


BUILDERS = {
    builder.__name__: builder
    for builder in (
        llama,
        llama_without_end,
        llama_without_template,
        thinker,
        special_thinker,
        caller,
        gpt2,
        bart,
        t5,
        nllb,
        bert_classifier,
        roberta_classifier,
        gpt2_classifier,
        nli,
        token_classifier,
        question_answerer,
        masked_lm,
        masked_lm_without_mask,
        cross_encoder,
        *diffusers_checkpoints.BUILDERS,
    )
}


def built_when_asked(builders: dict, place: Path) -> Callable[[str], str]:
    """``built_when_asked(BUILDERS, place)("llama")`` is its folder, built at the first call."""

    @cache
    def folder(name: str) -> str:
        builders[name](place / name)
        return str(place / name)

    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return built_when_asked(BUILDERS, tmp_path_factory.mktemp("checkpoints"))


_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.4,
}
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


def _labels(names: list[str]) -> dict:
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


def _llama_config(**special):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,
        tie_word_embeddings=False,
        **{"bos_token_id": 0, "eos_token_id": 1} | special,
    )


def _causal(folder: Path, config, chat_template=None, **special) -> None:
    tokenizer = _byte_tokenizer(template="<s> $A", **{"pad_token": None} | special)
    tokenizer.chat_template = chat_template
    _save(folder, "AutoModelForCausalLM", config, tokenizer)


def speaker(folder: Path, chat_template: str, says: list[list[str]], special=()) -> None:
    """A Llama that knows of each token which one is next, and nothing else."""
    import torch
    from tokenizers import AddedToken
    from transformers import AutoModelForCausalLM

    tokenizer = _byte_tokenizer(template="<s> $A")
    tokenizer.chat_template = chat_template
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    pieces = [piece for said in says for piece in said]
    assert len({*pieces}) == len(pieces)
    known = tokenizer.get_vocab()
    tokenizer.add_tokens(
        [AddedToken(piece, normalized=False) for piece in pieces if piece not in known]
    )
    config = _llama_config()
    config.vocab_size, config.hidden_size, config.num_hidden_layers = len(tokenizer), 512, 1
    config.max_position_embeddings, config.head_dim = 2048, 128
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.constant_(parameter, float("norm" in name))
    torch.nn.init.eye_(model.get_input_embeddings().weight)
    head = model.get_output_embeddings().weight.data
    for said in says:
        ids = [*tokenizer.convert_tokens_to_ids(said), tokenizer.eos_token_id]
        head[ids[1:], ids[:-1]] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _byte_tokenizer(template="$A", special=("<s>", "</s>", "<pad>", "<unk>", "<mask>"), **names):
    """Byte-level BPE: any text has tokens, and the decoded text is the same."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [sentence(40, seed) for seed in range(20)],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    pairs = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[pair for pair in pairs if pair[0] in template]
    )
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        **{name: token for name, token in (defaults | names).items() if token},
    )


def _bert(folder: Path, model_class: str, labels: list[str], mask_token="[MASK]") -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?'"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[2:], *letters]
    vocab += [f"##{letter}" for letter in letters]
    backend = Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token=mask_token,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    config = BertConfig(
        vocab_size=len(vocab),
        max_position_embeddings=64,
        pad_token_id=0,
        **_ENCODER,
        **_labels(labels),
    )
    _save(folder, model_class, config, tokenizer)


def _save(folder: Path, model_class: str, config, tokenizer) -> None:
    import torch
    import transformers

    build = getattr(transformers, model_class)
    build = build.from_config if model_class.startswith("Auto") else build
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = build(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not any(norm in name for norm in ("norm", "Norm", "ln_")):
                torch.nn.init.normal_(parameter, std=0.2)
            if "encoder_attn" in name or "EncDecAttention" in name:
                parameter.data *= 3  # what is written depends on what was read
        if model.can_generate():
            head = model.get_output_embeddings().weight.data
            texts = [
                tokenizer.decode([token], skip_special_tokens=True) for token in range(len(head))
            ]
            readable = [text.isprintable() and text not in ("", "\ufffd") for text in texts]
            if tokenizer.eos_token_id is not None:
                readable[tokenizer.eos_token_id] = True
            head[[not one for one in readable]] = 0  # no text of half characters
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
