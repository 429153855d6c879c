"""Captions, replies and answers about pictures: what transformers writes on the same checkpoint.

What is expected never comes from Crane's own adapters.
"""

from __future__ import annotations

import functools
import importlib
import time

import pytest
from PIL import Image

from backend.adapters import vision_base
from backend.adapters.vision_text import PictureWriter
from tests.conftest import run, together
from tests.gpu import GPU
from tests.pictures import base64_of, picture
from tests.vision_calls import checkpoint

__all__ = ["checkpoint"]

CAPTIONERS = ("vit_gpt2", "blip", "git")
CHATS = ("llava", "qwen2_vl", "idefics3")
ANSWERERS = ("vilt", "blip_vqa")
TYPES = {
    **dict.fromkeys(CAPTIONERS, "image-to-text"),
    **dict.fromkeys(CHATS, "image-text-to-text"),
    **dict.fromkeys(ANSWERERS, "visual-question-answering"),
}
DEVICES = [pytest.param("cpu"), pytest.param("cuda:0", marks=GPU)]
SHORT = {"max_tokens": 12}
SIZES = [(70, 60), (110, 60), (60, 70), (64, 64)]
QUESTIONS = ["the red river", "what is on the old tower?", "green", "the city in the morning"]
# Ours, and the same in the words of generate.
OPTIONS = [
    ({"max_tokens": 12}, {"max_new_tokens": 12}),
    ({"max_tokens": 9, "min_tokens": 9}, {"max_new_tokens": 9, "min_new_tokens": 9}),
    (
        {"max_tokens": 12, "repetition_penalty": 1.5},
        {"max_new_tokens": 12, "repetition_penalty": 1.5},
    ),
    ({"max_tokens": 12, "num_beams": 3}, {"max_new_tokens": 12, "num_beams": 3}),
]


def scene(index):
    return picture(*SIZES[index % len(SIZES)], seed=index)


def entry(checkpoint, family, **more):
    return {"id": family, "type": TYPES[family], "hf_model": checkpoint(family), **more}


def conversation(index, image=lambda index: base64_of(scene(index))):
    """Some with two pictures, some with none, some with messages before the last."""
    ask = {"type": "text", "text": QUESTIONS[index % 4]}
    see = [{"type": "image", "image": image(index)}]
    if index % 4 == 1:
        see.append({"type": "image", "image": image(index + 1)})
    if index % 4 == 3:
        see = []
    messages = [{"role": "user", "content": [*see, ask]}]
    if index % 4 == 2:
        # In Crane's own words a text may stand by itself; the library's want the list.
        messages.append({"role": "assistant", "content": [{"type": "text", "text": "a bridge"}]})
        messages.append({"role": "user", "content": [{"type": "text", "text": "and now?"}]})
    return messages


def input_for(family, index=0):
    if family in CHATS:
        return {"messages": conversation(index)}
    image = base64_of(scene(index))
    if family in CAPTIONERS:
        return image
    return {"image": image, "question": QUESTIONS[index % 4]}


@pytest.fixture(scope="module")
def direct(checkpoint):
    """What transformers writes: ``direct("blip", 0, max_new_tokens=12)``."""
    import torch
    import transformers

    loaded = {}

    def load(family, device):
        if (family, device) not in loaded:
            folder = checkpoint(family)
            auto = transformers.AutoModelForImageTextToText
            if family in ANSWERERS:
                auto = transformers.AutoModelForVisualQuestionAnswering
            loaded[family, device] = (
                auto.from_pretrained(folder).to(device).eval(),
                transformers.AutoImageProcessor.from_pretrained(folder),
                transformers.AutoTokenizer.from_pretrained(folder),
            )
        return loaded[family, device]

    def qwen(messages, device, **options):
        """What its processor does, which cannot be loaded without torchvision."""
        model, processor, tokenizer = load("qwen2_vl", device)
        images = [
            part["image"] for one in messages for part in one["content"] if part["type"] == "image"
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        features = dict(processor(images=images, return_tensors="pt")) if images else {}
        for grid in features.get("image_grid_thw", ()):
            text = text.replace("<|image_pad|>", "<|place|>" * (int(grid.prod()) // 4), 1)
        text = text.replace("<|place|>", "<|image_pad|>")
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        features |= {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == model.config.image_token_id).long(),
        }
        features = {name: one.to(device) for name, one in features.items()}
        output = model.generate(**features, do_sample=False, **options)
        return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    def call(family, index=0, device="cpu", **options):
        if family in CHATS:
            messages = conversation(index, image=scene)
            if family == "qwen2_vl":
                return qwen(messages, device, **options)
            if (family, device, "pipeline") not in loaded:
                loaded[family, device, "pipeline"] = transformers.pipeline(
                    "image-text-to-text", model=checkpoint(family), device=device
                )
            pipeline = loaded[family, device, "pipeline"]
            how = {"return_full_text": False, "generate_kwargs": {"do_sample": False, **options}}
            return pipeline(messages, **how)[0]["generated_text"]
        model, processor, tokenizer = load(family, device)
        features = dict(processor(images=scene(index), return_tensors="pt"))
        if family in ANSWERERS:
            features |= tokenizer(QUESTIONS[index % 4], return_tensors="pt")
        features = {name: one.to(device) for name, one in features.items()}
        if family == "vilt":
            with torch.no_grad():
                scores = model(**features).logits[0].sigmoid()
            best = scores.topk(options["top_k"])
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            return [(model.config.id2label[one], score) for one, score in pairs]
        output = model.generate(**features, do_sample=False, **options)
        return tokenizer.decode(output[0], skip_special_tokens=True)

    return call


# Thinking and tools.

WEATHER = {"type": "function", "function": {"name": "weather"}}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture
def thinker(make_app, checkpoint):
    """The status and answer of a chat about a picture: ``thinker(tools=[…], thinking=False)``."""
    entries = [
        {"id": family, "type": "image-text-to-text", "hf_model": checkpoint(family)}
        for family in ("llava_thinker", "llava")
    ]
    client = make_app(entries).test_client()

    def ask(*more, model="llava_thinker", tools=None, said=None, **options):
        see = [{"type": "image", "image": base64_of(scene(0))}, {"type": "text", "text": "and?"}]
        input = {"messages": [{"role": "user", "content": see}, *more]}
        input |= ({"tools": tools} if tools else {}) | (said or {})
        answer = run(client, model, input, options=options)
        return answer.status_code, answer.json

    return ask


def test_a_model_that_sees_thinks_and_calls_tools(thinker):
    status, answer = thinker()
    assert (status, answer["output"]) == (200, "Yes, it is é STOP it is.\n")
    assert answer["metadata"]["reasoning_content"] == "hm so STOP"
    assert answer["metadata"]["usage"]["reasoning_tokens"] == 4
    status, answer = thinker(tools=[WEATHER, CLOCK])
    assert (status, answer["output"]) == (200, "Let me look.")
    calls = answer["metadata"]["tool_calls"]
    assert [call["name"] for call in calls] == ["weather", "clock"]
    call = {"id": "a", "name": "weather", "arguments": {"city": "Köln"}}
    told = [{"role": "assistant", "tool_calls": [call]}]
    told += [{"role": "tool", "tool_call_id": "a", "content": "rain"}]
    status, answer = thinker(*told, tools=[WEATHER, CLOCK])
    assert (status, answer["output"]) == (200, "Rain, then sun. <tool_call> {} </tool_call>")
    status, answer = thinker(thinking=False)
    assert (status, answer["output"]) == (200, "Sure.")
    assert "reasoning_content" not in answer["metadata"]


def test_what_a_model_that_sees_cannot_be_told_is_refused(thinker):
    for how, at in (({"tools": [CLOCK]}, "input.tools"), ({"thinking": True}, "options.thinking")):
        status, answer = thinker(model="llava", **how)
        assert (status, list(answer["error"]["details"])) == (400, [at])
    status, answer = thinker(tools=[WEATHER], said={"tool_choice": "required"})
    assert (status, list(answer["error"]["details"])) == (400, ["input.tool_choice"])


def test_no_call_or_tool_passes_for_a_picture(thinker):
    call = {"name": "clock", "arguments": {"place": "<image>"}}
    status, answer = thinker({"role": "assistant", "tool_calls": [call]})
    assert (status, list(answer["error"]["details"])) == (400, ["input.messages[1]"])
    named = {**CLOCK, "function": {"name": "clock", "description": "an <image>"}}
    status, answer = thinker(tools=[WEATHER, named])
    assert (status, list(answer["error"]["details"])) == (400, ["input.tools[1]"])


# Parity.


@pytest.mark.parametrize("family", CAPTIONERS + CHATS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_text_is_what_generate_writes(make_app, checkpoint, direct, family, device):
    client = make_app([entry(checkpoint, family)], devices=(device,)).test_client()
    for options, theirs in OPTIONS:
        answer = run(client, family, input_for(family), options=options)
        assert answer.status_code == 200, answer.json
        assert answer.json["output"] == direct(family, device=device, **theirs)
        metadata = answer.json["metadata"]
        assert metadata["device"].startswith(device)
        assert metadata["usage"]["images"] == 1
        assert 0 < metadata["usage"]["output_tokens"] <= options["max_tokens"]
        assert metadata["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("family", CAPTIONERS + CHATS)
@pytest.mark.usefixtures("whole_batches")
def test_eight_callers_at_once_with_mixed_options_get_what_they_would_get_alone(
    make_app, checkpoint, direct, family
):
    client = make_app([entry(checkpoint, family)]).test_client()
    wanted = [OPTIONS[index // 4 * 2] for index in range(8)]
    answers = together(
        client,
        [
            {"model_id": family, "input": input_for(family, index), "options": options}
            for index, (options, _) in enumerate(wanted)
        ],
    )
    texts = [direct(family, index, **theirs) for index, (_, theirs) in enumerate(wanted)]
    assert len(set(texts)) > 4  # what is seen is told apart
    for answer, text in zip(answers, texts, strict=True):
        assert answer.status_code == 200, answer.json
        assert answer.json["output"] == text


@pytest.mark.parametrize("family", CAPTIONERS + CHATS)
@pytest.mark.usefixtures("whole_batches")
def test_a_batch_writes_each_text_as_alone(make_app, checkpoint, direct, family):
    client = make_app([entry(checkpoint, family)]).test_client()
    answer = run(client, family, [input_for(family, i) for i in range(8)], options=SHORT).json
    for index, text in enumerate(answer["output"]):
        assert text == direct(family, index, max_new_tokens=12)


def test_conversations_with_pictures_run_together(make_app, checkpoint, monkeypatch):
    rows = []
    real = PictureWriter.write

    def write(self, inputs, places, batch, **how):
        rows.append(sorted(places))
        return real(self, inputs, places, batch, **how)

    monkeypatch.setattr(PictureWriter, "write", write)
    families = ("llava", "qwen2_vl", "idefics3")
    client = make_app([entry(checkpoint, family) for family in families]).test_client()
    runs = {}
    for family in families:
        rows.clear()
        run(client, family, [{"messages": conversation(0)}] * 3, options={"max_tokens": 2})
        runs[family] = list(rows)
    assert runs == {family: [[0, 1, 2]] for family in families}


@pytest.mark.parametrize("device", DEVICES)
def test_answers_that_are_chosen_have_scores(make_app, checkpoint, direct, device):
    client = make_app([entry(checkpoint, "vilt")], devices=(device,)).test_client()
    for options, top_k in (({}, 5), ({"top_k": 2}, 2)):
        answer = run(client, "vilt", input_for("vilt"), options=options).json
        given = [(one["answer"], one["score"]) for one in answer["output"]]
        expected = direct("vilt", device=device, top_k=top_k)
        assert [name for name, _ in given] == [name for name, _ in expected]
        assert [s for _, s in given] == pytest.approx([s for _, s in expected], abs=1e-4)
        assert answer["metadata"]["options"]["top_k"] == top_k
        assert answer["metadata"]["options"]["max_tokens"] is None


@pytest.mark.parametrize("device", DEVICES)
def test_an_answer_that_is_written_has_none(make_app, checkpoint, direct, device):
    client = make_app([entry(checkpoint, "blip_vqa")], devices=(device,)).test_client()
    for options, most in (({}, 20), ({"max_tokens": 7}, 7)):
        answer = run(client, "blip_vqa", input_for("blip_vqa"), options=options).json
        text = direct("blip_vqa", device=device, max_new_tokens=most)
        assert answer["output"] == [{"answer": text, "score": None}]
        assert answer["metadata"]["options"]["max_tokens"] == most
        assert answer["metadata"]["usage"]["output_tokens"] <= most


def test_the_tokens_of_a_written_answer_end_with_its_end(make_app, checkpoint, monkeypatch):
    import torch
    from transformers import BlipForQuestionAnswering

    def generate(self, input_ids, **kwargs):
        return torch.tensor([[0, 30, 31, 1, 2, 2]] * len(input_ids))

    monkeypatch.setattr(BlipForQuestionAnswering, "generate", generate)
    client = make_app([entry(checkpoint, "blip_vqa")]).test_client()
    answer = run(client, "blip_vqa", input_for("blip_vqa")).json
    assert answer["metadata"]["usage"]["output_tokens"] == 3


@pytest.mark.parametrize("family", ANSWERERS)
@pytest.mark.usefixtures("whole_batches")
def test_eight_questions_at_once_are_answered_as_alone(make_app, checkpoint, direct, family):
    client = make_app([entry(checkpoint, family)]).test_client()
    name, own = ("top_k", 5) if family == "vilt" else ("max_tokens", 20)
    wanted = [{}, {name: 3}, {}, {name: 2}] * 2
    answers = together(
        client,
        [
            {"model_id": family, "input": input_for(family, index), "options": options}
            for index, options in enumerate(wanted)
        ],
    )
    batch = run(client, family, [input_for(family, index) for index in range(8)]).json
    for index, (answer, options) in enumerate(zip(answers, wanted, strict=True)):
        for output, most in (
            (answer.json["output"], options.get(name, own)),
            (
                batch["output"][index],
                own,
            ),
        ):
            if family == "vilt":
                expected = direct(family, index, top_k=most)
                assert [one["answer"] for one in output] == [one for one, _ in expected]
                scores = [one["score"] for one in output]
                assert scores == pytest.approx([score for _, score in expected], abs=1e-4)
            else:
                text = direct(family, index, max_new_tokens=most)
                assert output == [{"answer": text, "score": None}]


def test_vilt_answers_with_nobodys_random_state(make_app, checkpoint):
    import torch

    client = make_app([entry(checkpoint, "vilt")]).test_client()
    torch.manual_seed(3)
    first = run(client, "vilt", input_for("vilt")).json["output"]
    drawn = torch.rand(1)
    again = run(client, "vilt", input_for("vilt")).json["output"]
    assert first == again
    torch.manual_seed(3)
    assert torch.rand(1) == drawn


# Seeds, ends and cancelling.


@pytest.mark.parametrize("family", ["vit_gpt2", "blip", "git", "llava", "qwen2_vl"])
def test_a_seed_gives_the_same_text_alone_and_in_a_batch(make_app, checkpoint, family):
    client = make_app([entry(checkpoint, family)]).test_client()
    options = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, **SHORT}
    value = input_for(family)
    batch = run(client, family, [value] * 4, options={**options, "seed": 5}).json
    assert batch["metadata"]["seed"] == [5, 6, 7, 8]
    assert batch["metadata"]["batch_size"] == 4
    for seed, text in enumerate(batch["output"], start=5):
        alone = run(client, family, value, options={**options, "seed": seed}).json
        assert alone["output"] == text
    assert len(set(batch["output"])) > 1
    coldest = run(client, family, value, options={**options, "top_k": 1}).json["output"]
    assert coldest == run(client, family, value, options=SHORT).json["output"]


@pytest.mark.usefixtures("whole_batches")
def test_seeds_stay_with_their_texts_where_a_batch_is_run_in_parts(
    make_app, checkpoint, monkeypatch
):
    rows = []
    real = PictureWriter.write

    def write(self, inputs, places, batch, **how):
        rows.append(places)
        return real(self, inputs, places, batch, **how)

    monkeypatch.setattr(PictureWriter, "write", write)
    client = make_app([entry(checkpoint, "idefics3")]).test_client()
    options = {"temperature": 1.0, **SHORT}
    shapes = [(64, 64), (120, 20), (64, 64), (120, 20)]  # which are cut into 4 and 2 tiles
    inputs = [
        {"messages": conversation(0, image=lambda _, at=at: base64_of(picture(*shapes[at], at)))}
        for at in range(4)
    ]
    batch = run(client, "idefics3", inputs, options={**options, "seed": 5}).json
    assert sorted(rows) == [[0, 2], [1, 3]]
    for index, value in enumerate(inputs):
        alone = run(client, "idefics3", value, options={**options, "seed": 5 + index}).json
        assert alone["output"] == batch["output"][index]


@pytest.mark.parametrize("family", ["vit_gpt2", "blip", "git", "llava", "idefics3"])
def test_a_stop_string_ends_a_text_before_it(make_app, checkpoint, family):
    client = make_app([entry(checkpoint, family)]).test_client()
    value = input_for(family)
    whole = run(client, family, value, options={"max_tokens": 24}).json
    stop = whole["output"][4:7]
    options = {"max_tokens": 24, "stop": [stop]}
    answer = run(client, family, [value, input_for(family, 1)], options=options).json
    assert answer["output"][0] == whole["output"][: whole["output"].index(stop)]
    assert answer["metadata"]["finish_reason"][0] == "stop"
    alone = run(client, family, value, options=options).json["metadata"]
    assert alone["usage"]["output_tokens"] < whole["metadata"]["usage"]["output_tokens"]


@pytest.mark.parametrize("family", ["vit_gpt2", "blip", "git"])
def test_a_caption_ends_with_the_models_end_or_its_last_position(make_app, checkpoint, family):
    client = make_app([entry(checkpoint, family)]).test_client()
    positions = {"vit_gpt2": 48, "blip": 40, "git": 40}[family]
    answer = run(client, family, input_for(family), options={"max_tokens": 500, "min_tokens": 500})
    assert answer.json["metadata"]["usage"]["output_tokens"] == positions - 1
    assert answer.json["metadata"]["finish_reason"] == "length"
    hot = {"temperature": 2.0, "max_tokens": 30, "seed": 1}
    answers = run(client, family, [input_for(family)] * 24, options=hot).json
    reasons = answers["metadata"]["finish_reason"]
    assert "stop" in reasons
    assert answers["metadata"]["usage"]["output_tokens"] < 24 * 30


def test_tokens_are_counted_with_the_pictures(make_app, checkpoint):
    client = make_app([entry(checkpoint, "llava")]).test_client()
    text = [{"role": "user", "content": "green"}]
    seen = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "green"},
                {"type": "image", "image": base64_of(scene(0))},
            ],
        }
    ]
    used = [
        run(client, "llava", {"messages": messages}, options=SHORT).json["metadata"]["usage"]
        for messages in (text, seen)
    ]
    assert used[1]["input_tokens"] - used[0]["input_tokens"] == 16
    assert [one["images"] for one in used] == [0, 1]


def test_a_text_by_itself_is_one_part(make_app, checkpoint):
    client = make_app([entry(checkpoint, "llava")]).test_client()
    plain = [{"role": "user", "content": "the river"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "the river"}]}]
    one, other = (
        run(client, "llava", {"messages": messages}, options=SHORT).json["output"]
        for messages in (plain, parts)
    )
    assert one == other


@pytest.mark.parametrize("family", ["llava", "blip"])
def test_a_text_that_nobody_waits_for_stops_at_the_next_token(
    make_app, checkpoint, family, monkeypatch
):
    # With so few positions it would write for no time at all.
    model, part = {
        "llava": ("LlavaForConditionalGeneration", ""),
        "blip": ("BlipTextLMHeadModel", "_text"),
    }[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}{part}")
    real = getattr(module, model).forward

    @functools.wraps(real)  # generate looks at its parameters
    def slow(self, *args, **kwargs):
        time.sleep(0.1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(getattr(module, model), "forward", slow)
    client = make_app([entry(checkpoint, family)], request_timeout_s=1.0).test_client()
    short = {"max_tokens": 1}
    for _ in range(30):  # the first call may take longer than it may
        if (answer := run(client, family, input_for(family), options=short)).status_code != 504:
            break
    assert answer.status_code == 200, answer.json
    long = {"max_tokens": 35, "min_tokens": 35}
    assert run(client, family, input_for(family), options=long).status_code == 504
    # In time, though 35 tokens would take 2.5 s more.
    assert run(client, family, input_for(family), options=short).status_code == 200


# Refusals.


@pytest.mark.parametrize(
    ("content", "path", "told"),
    [
        ([{"type": "image", "image": "AAAA"}], "[0].image", "is no picture"),
        ([{"type": "image"}], "[0].image", "is missing"),
        ([{"type": "image", "image": "", "text": "x"}], "[0].text", "is not known here"),
        ([{"type": "text"}], "[0].text", "is missing"),
        ([{"type": "images"}], "[0].type", "did you mean 'image'?"),
        ([{"type": 5}], "[0].type", "must be 'text' or 'image'"),
        ([{}], "[0].type", "must be 'text' or 'image'"),
        (["text"], "[0]", "must be an object, not a string"),
        ([], "", "must have 1 to 100 items"),
        (5, "", "must be a string, or a list of parts"),
        ([{"type": "image", "image": "file:///etc/passwd"}], "[0].image", "must be an https URL"),
        ([{"type": "text", "text": "see <image>"}], "[0].text", "as the place of a picture"),
        ("see <image>", "[0].text", "has <image>, which this model reads"),
    ],
)
def test_a_part_at_fault_is_refused_by_its_place(make_app, checkpoint, content, path, told):
    client = make_app([entry(checkpoint, "llava")], media_hosts=("example.com",)).test_client()
    first = {"role": "user", "content": "green"}
    value = {"messages": [first, {"role": "user", "content": content}]}
    answer = run(client, "llava", value)
    assert answer.status_code == 400
    assert told in answer.json["error"]["details"][f"input.messages[1].content{path}"]


def test_a_conversation_that_the_template_refuses_is_refused_alone(make_app, checkpoint):
    client = make_app([entry(checkpoint, "llava")]).test_client()
    bad = {"messages": [{"role": "assistant", "content": "green"}]}
    answers = together(
        client,
        [{"model_id": "llava", "input": one} for one in (bad, input_for("llava"))],
    )
    assert [one.status_code for one in answers] == [400, 200]
    told = answers[0].json["error"]["details"]["input.messages"]
    assert told == "do not suit this model: the first message must not be the assistant's"


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_conversation_longer_than_the_window_is_refused(make_app, checkpoint, family):
    client = make_app([entry(checkpoint, family)]).test_client()
    see = {"type": "image", "image": base64_of(Image.new("RGB", (64, 64)))}
    value = {"messages": [{"role": "user", "content": [see] * 20}]}
    answer = run(client, family, value)
    assert answer.status_code == 400
    told = answer.json["error"]["details"]["input.messages"]
    assert "tokens with their pictures, and the model's window is 256" in told


def test_a_text_ends_at_the_window(make_app, checkpoint):
    client = make_app([entry(checkpoint, "llava")]).test_client()
    options = {"max_tokens": 1000, "min_tokens": 1000}
    answer = run(client, "llava", [input_for("llava"), input_for("llava", 1)], options=options)
    usage = answer.json["metadata"]["usage"]
    assert usage["input_tokens"] + usage["output_tokens"] == 2 * 256


@pytest.mark.parametrize("family", ["vit_gpt2", "llava", "vilt"])
def test_a_strip_is_refused_by_its_place(make_app, checkpoint, family):
    client = make_app([entry(checkpoint, family)]).test_client()
    strip = base64_of(Image.new("RGB", (500, 2)))
    part = [{"type": "text", "text": "x"}, {"type": "image", "image": strip}]
    value, path = {
        "image-to-text": (strip, "input"),
        "image-text-to-text": (
            {"messages": [{"role": "user", "content": part}]},
            "input.messages[0].content[1].image",
        ),
        "visual-question-answering": ({"image": strip, "question": "x"}, "input.image"),
    }[TYPES[family]]
    answer = run(client, family, value)
    assert answer.status_code == 400
    assert "one side is over 100 times" in answer.json["error"]["details"][path]


def test_a_picture_that_a_chats_processor_cannot_take_is_refused(make_app, checkpoint, monkeypatch):
    monkeypatch.setattr(vision_base, "MAX_ASPECT", 1000)
    client = make_app([entry(checkpoint, "qwen2_vl")]).test_client()
    see = {"type": "image", "image": base64_of(Image.new("RGB", (900, 4)))}
    answer = run(client, "qwen2_vl", {"messages": [{"role": "user", "content": [see]}]})
    assert answer.status_code == 400
    told = answer.json["error"]["details"]["input.messages"]
    assert told == "have a picture of sides that this model cannot take"


def test_a_question_longer_than_the_window_is_refused_or_cut(make_app, checkpoint):
    client = make_app([entry(checkpoint, family) for family in ANSWERERS]).test_client()
    for family in ANSWERERS:
        value = {"image": base64_of(scene(0)), "question": "the old tower " * 40}
        answer = run(client, family, value)
        assert answer.status_code == 400
        told = answer.json["error"]["details"]["input.question"]
        assert "the model's window is 40" in told
        cut = run(client, family, value, options={"truncate": True}).json["metadata"]
        assert cut["truncated"] is True
        assert cut["usage"]["input_tokens"] == 40


@pytest.mark.parametrize(
    ("family", "option", "told"),
    [
        ("vilt", {"max_tokens": 5}, "is not for a model that chooses among the answers"),
        ("blip_vqa", {"top_k": 5}, "is not for a model that writes its answer"),
        ("vit_gpt2", {"truncate": True}, "is not known here"),
        ("llava", {"truncate": False}, "is not known here"),
        ("llava", {"max_tokens": 0}, "at least 1"),
        ("git", {"num_beams": 2, "temperature": 1.0}, "must be 1 when temperature is above 0"),
    ],
)
def test_an_option_that_a_model_cannot_use_is_refused_by_name(
    make_app, checkpoint, family, option, told
):
    client = make_app([entry(checkpoint, family)]).test_client()
    answer = run(client, family, input_for(family), options=option)
    assert answer.status_code == 400
    assert told in answer.json["error"]["details"][f"options.{next(iter(option))}"]


@pytest.mark.parametrize(
    ("type_", "family", "told"),
    [
        ("image-text-to-text", "llava_without_template", "It has no chat template"),
        ("image-text-to-text", "blip", "It has no chat template"),
        ("image-to-text", "llava", "It is a llava model, which does not caption"),
    ],
)
def test_a_checkpoint_of_another_kind_does_not_load(make_app, checkpoint, type_, family, told):
    client = make_app([{"id": "x", "type": type_, "hf_model": checkpoint(family)}]).test_client()
    value = input_for(family if type_ == "image-to-text" else "llava")
    value = base64_of(scene(0)) if type_ == "image-to-text" else value
    answer = run(client, "x", value)
    assert answer.status_code == 503
    assert told in answer.json["error"]["message"]


@pytest.mark.parametrize("family", ["vit_gpt2", "llava", "vilt"])
def test_a_writer_can_be_quantized_and_run_in_half_precision(make_app, checkpoint, family):
    ways = {"memory": {"quantize": "int8"}}, {"dtype": "bfloat16"}
    entries = [{**entry(checkpoint, family, **way), "id": f"{n}"} for n, way in enumerate(ways)]
    client = make_app(entries).test_client()
    dtypes = [run(client, id_, input_for(family)).json["metadata"]["dtype"] for id_ in ("0", "1")]
    assert dtypes == ["float32 with int8 weights", "bfloat16"]
