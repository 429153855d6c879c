"""/v1 by OpenAI's own client, Hugging Face's and plain HTTP: what /crane/run answers, reworded."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import openai
import pytest
from huggingface_hub import InferenceClient
from PIL import Image
from werkzeug.datastructures import FileStorage
from werkzeug.test import stream_encode_multipart

from backend.config import Config
from backend.keys import Keys
from backend.openai import ROUTES
from backend.quota.tiers import tiers
from tests import (
    checkpoints,
    diffusers_checkpoints,
    recognition_checkpoints,
    speech_checkpoints,
    vision_text_checkpoints,
)
from tests.checkpoints import built_when_asked
from tests.conftest import ECHO, MINILM, write_models
from tests.pictures import base64_of, mask, picture, written
from tests.serving import Gunicorn, wait_for
from tests.test_recognition import sound, wav

SIDES = {"width": 64, "height": 64}
QUICK = {"num_inference_steps": 2, "seed": 7}
TOLD = [{"role": "user", "content": "the old tower"}]
MODELS = [
    ("writer", "text-generation", "llama"),
    ("chat", "chat", "llama"),
    ("sees", "image-text-to-text", "llava"),
    ("rerank", "rerank", "cross_encoder"),
    ("draws", "text-to-image", "stable_diffusion"),
    ("edits", "image-to-image", "stable_diffusion"),
    ("paints", "inpainting", "stable_diffusion"),
    ("flags", "text-to-image", "stable_diffusion_flagging"),
    ("speaks", "text-to-speech", "vits_of_two_speakers"),
    ("hears", "automatic-speech-recognition", "whisper"),
    ("spells", "automatic-speech-recognition", "ctc"),
    ("sums-up", "summarization", "bart"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = tmp_path_factory.mktemp("openai")
    diffusing = {builder.__name__: builder for builder in diffusers_checkpoints.BUILDERS}
    build = built_when_asked(
        checkpoints.BUILDERS
        | diffusing
        | vision_text_checkpoints.BUILDERS
        | speech_checkpoints.BUILDERS
        | recognition_checkpoints.BUILDERS,
        place,
    )
    entries = [{"id": id_, "type": type_, "hf_model": build(name)} for id_, type_, name in MODELS]
    settings = {
        "CRANE_QUOTA": "on",
        "CRANE_TIERS": "free 100000/minute, tiny 2/minute",
        "CRANE_MAX_BATCH": 8,
        "CRANE_MAX_BODY": "4MiB",
    }
    running = Gunicorn(write_models(place, [ECHO, MINILM, *entries]), place / "data", settings)
    try:
        yield running.wait_until_ready()
    finally:
        running.stop()


@pytest.fixture(scope="module")
def keys(server):
    opened = Keys(Config(data_dir=server.data_dir))
    yield opened
    opened.close()


def client_of(server, key="sk-any", kind=openai.OpenAI):
    return kind(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as opened:
        yield opened


@pytest.fixture(scope="module")
def crane(server):
    """The output and the receipt that /crane/run answers."""

    def run(model_id, input_, **options):
        status, answer = server.run(model_id, input_, options=options)
        assert status == 200, answer
        return answer["output"], answer["metadata"]

    return run


@pytest.fixture(scope="module")
def post(server):
    """POST JSON or a form: its status, headers and body."""

    def send(path, body=None, *, form=None, data=None, **headers):
        headers = {"Content-Type": "application/json", **headers}
        if form is not None:
            stream, length, boundary = stream_encode_multipart(form)
            data = stream.read(length)
            headers["Content-Type"] = f"multipart/form-data; boundary={boundary}"
        elif data is None:
            data = json.dumps(body).encode()
        status, heads, answer = server.request("POST", path, data, headers)
        return SimpleNamespace(status=status, headers=heads, text=answer.decode(errors="replace"))

    return send


def error(answer):
    """The error of an answer, after a look at its whole shape."""
    body = json.loads(answer.text)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["X-Request-ID"]
    assert "input[" not in body["error"]["message"] or body["error"]["param"].startswith("input[")
    assert not re.search(r"\boptions\.", body["error"]["message"])
    return SimpleNamespace(status=answer.status, **body["error"])


# Chats.


def test_a_chat_is_answered_as_crane_run_answers_it(client, crane):
    reply = client.chat.completions.create(
        model="chat", messages=TOLD, max_tokens=12, extra_headers={"X-Request-ID": "order-17"}
    )
    output, metadata = crane("chat", {"messages": TOLD}, max_tokens=12)
    assert output
    [choice] = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", output)
    assert choice.finish_reason == metadata["finish_reason"]
    assert (reply.id, reply.object, reply.model) == ("chatcmpl-order-17", "chat.completion", "chat")
    assert reply.usage.prompt_tokens == metadata["usage"]["input_tokens"]
    assert reply.usage.completion_tokens == metadata["usage"]["output_tokens"]
    assert reply.usage.total_tokens == sum(metadata["usage"].values())
    assert reply._request_id == "order-17"


def test_every_option_of_a_chat_reaches_the_model(client, crane):
    own = {"top_k": 40, "repetition_penalty": 1.2}
    ours = {"max_tokens": 20, "temperature": 1.5, "top_p": 0.5, "seed": 11} | own
    whole, _ = crane("chat", {"messages": TOLD}, **ours)
    ours["stop"] = [whole[len(whole) // 2 :]]
    theirs = {name: value for name, value in ours.items() if name not in own}
    reply = client.chat.completions.create(model="chat", messages=TOLD, **theirs, extra_body=own)
    output, _ = crane("chat", {"messages": TOLD}, **ours)
    assert whole.startswith(output)
    assert reply.choices[0].message.content == output
    same = set()
    for name in ours:
        rest = {key: value for key, value in ours.items() if key != name}
        other, _ = crane("chat", {"messages": TOLD}, **{"seed": 12, **rest})
        same |= {name} if other == output else set()
    assert same <= {"max_tokens"}  # the text stops before


def test_n_replies_are_a_batch_of_copies(client, crane):
    reply = client.chat.completions.create(
        model="chat", messages=TOLD, n=3, max_tokens=12, temperature=1.5, seed=5
    )
    texts = [choice.message.content for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    for place, text in enumerate(texts):
        alone, metadata = crane(
            "chat", {"messages": TOLD}, max_tokens=12, temperature=1.5, seed=5 + place
        )
        assert (text, reply.choices[place].finish_reason) == (alone, metadata["finish_reason"])


def test_what_is_not_sent_is_as_the_model_has_it(client, crane):
    asked = {"model": "chat", "messages": TOLD, "max_tokens": 12}
    replies = [client.chat.completions.create(**asked) for _ in range(2)]
    replies.append(client.chat.completions.create(**asked, temperature=None, n=None, seed=None))
    output, metadata = crane("chat", {"messages": TOLD}, max_tokens=12)
    assert metadata["options"]["temperature"] == 0
    assert {reply.choices[0].message.content for reply in replies} == {output}


@pytest.mark.parametrize(
    ("content", "ours"),
    [
        ([{"type": "text", "text": "the old tower"}], "the old tower"),
        ([{"type": "text", "text": "the"}, {"type": "text", "text": "river"}], "the\nriver"),
    ],
)
def test_parts_that_are_texts_are_one_text_to_a_model_that_reads_text(client, crane, content, ours):
    told = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": content}]
    ours = [{"role": "system", "content": "be brief"}, {"role": "user", "content": ours}]
    told, ours = told[1:], ours[1:]
    reply = client.chat.completions.create(model="chat", messages=told, max_tokens=9)
    assert reply.choices[0].message.content == crane("chat", {"messages": ours}, max_tokens=9)[0]


def test_a_reply_can_be_sent_back_as_the_client_has_it(client, crane):
    first = client.chat.completions.create(model="chat", messages=TOLD, max_tokens=9)
    said = first.choices[0].message
    for message in (said, said.model_dump()):
        told = [*TOLD, message, {"role": "user", "content": "and then"}]
        reply = client.chat.completions.create(model="chat", messages=told, max_tokens=9)
        ours = [*TOLD, {"role": "assistant", "content": said.content}, told[-1]]
        output, _ = crane("chat", {"messages": ours}, max_tokens=9)
        assert reply.choices[0].message.content == output


def test_a_developer_is_the_system(client, crane):
    def told(role):
        return [
            {"role": role, "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "the river"}]},
        ]

    reply = client.chat.completions.create(model="sees", messages=told("developer"), max_tokens=9)
    output, _ = crane("sees", {"messages": told("system")}, max_tokens=9)
    assert reply.choices[0].message.content == output


def test_a_picture_is_seen_as_crane_run_sees_it(client, crane):
    url = "data:image/png;base64," + base64_of(picture(64, 64, seed=3))
    ask = {"type": "text", "text": "what is it"}
    told = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, ask]}]
    reply = client.chat.completions.create(model="sees", messages=told, max_tokens=12)
    ours = [{"role": "user", "content": [{"type": "image", "image": url}, ask]}]
    output, metadata = crane("sees", {"messages": ours}, max_tokens=12)
    assert reply.choices[0].message.content == output
    assert reply.usage.prompt_tokens == metadata["usage"]["input_tokens"]
    without = client.chat.completions.create(
        model="sees", messages=[{"role": "user", "content": [ask]}], max_tokens=12
    )
    assert without.usage.prompt_tokens < reply.usage.prompt_tokens


def test_what_changes_nothing_is_taken(client):
    plain = client.chat.completions.create(model="chat", messages=TOLD, max_tokens=5)
    reply = client.chat.completions.create(
        model="chat",
        messages=TOLD,
        max_tokens=5,
        user="u-1",
        metadata={"team": "a"},
        store=False,
        n=1,
        logprobs=False,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        modalities=["text"],
        service_tier="auto",
        response_format={"type": "text"},
        stream=False,
    )
    assert reply.choices[0].message == plain.choices[0].message


def test_the_async_client_and_a_raw_response(server, crane):
    async def ask():
        async with client_of(server, kind=openai.AsyncOpenAI) as client:
            asked = {"model": "chat", "messages": TOLD, "max_tokens": 8}
            many = [client.chat.completions.create(**asked) for _ in range(3)]
            raw = await client.chat.completions.with_raw_response.create(**asked)
            return [*await asyncio.gather(*many), raw.parse()], raw.headers

    replies, headers = asyncio.run(ask())
    output, _ = crane("chat", {"messages": TOLD}, max_tokens=8)
    assert {reply.choices[0].message.content for reply in replies} == {output}
    assert headers["X-RateLimit-Limit"] == "100000"
    assert headers["X-Request-ID"]


@pytest.mark.parametrize("path", ["", "/v1"])
def test_hugging_faces_client_chats(server, crane, path):
    client = InferenceClient(base_url=f"http://127.0.0.1:{server.port}{path}", api_key="any")
    reply = client.chat_completion(TOLD, model="chat", max_tokens=8, temperature=0.0, stop=["q"])
    assert (
        reply.choices[0].message.content
        == crane("chat", {"messages": TOLD}, max_tokens=8, stop=["q"])[0]
    )
    reply = client.chat.completions.create(model="chat", messages=TOLD, max_tokens=8, n=2)
    assert len(reply.choices) == 2


# Completions, embeddings, ranks.


def test_a_completion_is_what_crane_run_writes(client, crane):
    reply = client.completions.create(model="writer", prompt="the river", max_tokens=9, stop="q")
    output, metadata = crane("writer", "the river", max_tokens=9, stop=["q"])
    assert [choice.text for choice in reply.choices] == [output]
    assert reply.choices[0].finish_reason == metadata["finish_reason"]
    assert reply.object == "text_completion"
    assert reply.usage.completion_tokens == metadata["usage"]["output_tokens"]


def test_each_prompt_is_continued_n_times_in_order(client, crane):
    hot = {"max_tokens": 9, "temperature": 1.5}
    reply = client.completions.create(
        model="writer", prompt=["the river", "a city"], n=2, seed=3, **hot
    )
    prompts = ["the river", "the river", "a city", "a city"]
    for place, prompt in enumerate(prompts):
        output, _ = crane("writer", prompt, seed=3 + place, **hot)
        assert reply.choices[place].text == output
        assert reply.choices[place].index == place


@pytest.mark.parametrize("input_", ["Cranes dance.", ["Cranes dance."], ["Cranes dance.", "So."]])
def test_embeddings_are_the_vectors_of_crane_run(client, crane, input_):
    # The client asks for base64 and unpacks it, unless it is told.
    packed = client.embeddings.create(model="embedder", input=input_)
    plain = client.embeddings.create(model="embedder", input=input_, encoding_format="float")
    output, metadata = crane("embedder", input_)
    vectors = np.asarray(output if type(input_) is list else [output], "f4")
    for reply in (packed, plain):
        assert np.array_equal(np.asarray([one.embedding for one in reply.data], "f4"), vectors)
        assert [one.index for one in reply.data] == list(range(len(vectors)))
    tokens = metadata["usage"]["input_tokens"]
    assert (packed.usage.prompt_tokens, packed.usage.total_tokens) == (tokens, tokens)


def test_base64_is_little_endian_float32(post, crane):
    body = {"model": "embedder", "input": "Cranes dance.", "encoding_format": "base64"}
    answer = json.loads(post("/v1/embeddings", body).text)
    data = base64.b64decode(answer["data"][0]["embedding"])
    assert np.array_equal(
        np.frombuffer(data, "<f4"), np.asarray(crane("embedder", "Cranes dance.")[0], "f4")
    )


def test_embeddings_can_be_cut(client, crane):
    reply = client.embeddings.create(model="embedder", input="So.", dimensions=5)
    assert np.allclose(reply.data[0].embedding, crane("embedder", "So.", dimensions=5)[0])


def test_documents_are_ranked_as_crane_run_ranks_them(post, crane):
    texts = ["a red river", "the old tower", "music in the morning"]
    ours, metadata = crane("rerank", {"query": "a tower", "documents": texts})
    documents = [texts[0], {"text": texts[1]}, texts[2]]
    body = {"model": "rerank", "query": "a tower", "documents": documents}
    answer = json.loads(post("/v1/rerank", body).text)
    pairs = [{"index": one["index"], "relevance_score": one["score"]} for one in ours]
    assert answer["results"] == pairs
    assert answer["model"] == "rerank"
    assert answer["usage"]["total_tokens"] == metadata["usage"]["input_tokens"]
    best = json.loads(post("/v1/rerank", {**body, "top_n": 1, "return_documents": True}).text)
    assert best["results"] == [{**pairs[0], "document": {"text": texts[pairs[0]["index"]]}}]


# Pictures and sounds.


def test_a_picture_is_drawn_as_crane_run_draws_it(client, crane):
    reply = client.images.generate(model="draws", prompt="a tower", size="64x64", extra_body=QUICK)
    output, _ = crane("draws", "a tower", **SIDES, **QUICK)
    assert [one.b64_json for one in reply.data] == [output["data"]]
    assert (reply.output_format, reply.size) == ("png", "64x64")


def test_several_pictures_in_another_format(client, crane):
    reply = client.images.generate(
        model="draws", prompt="a tower", n=2, size="64x64", output_format="webp",
        response_format="b64_json", quality="auto", extra_body=QUICK,
    )  # fmt: skip
    output, _ = crane("draws", "a tower", num_images=2, format="webp", **SIDES, **QUICK)
    assert [one.b64_json for one in reply.data] == [one["data"] for one in output]
    assert output[0]["mime_type"] == "image/webp"


def test_a_picture_that_is_blacked_out_is_said_to_be(client, crane):
    reply = client.images.generate(model="flags", prompt="a tower", size="64x64", extra_body=QUICK)
    assert crane("flags", "a tower", **SIDES, **QUICK)[1]["flagged"] is True
    assert reply.flagged is True
    plain = client.images.generate(model="draws", prompt="a tower", size="64x64", extra_body=QUICK)
    assert not hasattr(plain, "flagged")


def test_a_picture_is_edited(client, crane):
    image = written(picture(64, 64, seed=3))
    reply = client.images.edit(
        model="edits", image=("boat.png", image), prompt="a red sky", n=2,
        extra_body={"strength": 0.5, **QUICK},
    )  # fmt: skip
    ours = {"prompt": "a red sky", "image": base64.b64encode(image).decode()}
    output, _ = crane("edits", ours, num_images=2, strength=0.5, **QUICK)
    assert [one.b64_json for one in reply.data] == [one["data"] for one in output]


def test_a_mask_is_see_through_where_to_paint(client, crane):
    """It is white there to /crane/run."""
    image, white = written(picture(64, 64, seed=3)), mask(64, 64)
    holes = picture(64, 64, seed=4).convert("RGBA")
    holes.putalpha(Image.eval(white, lambda value: 255 - value))
    reply = client.images.edit(
        model="paints", image=[("boat.png", image)], mask=("mask.png", written(holes)),
        prompt="a sail", size="64x64", extra_body=QUICK,
    )  # fmt: skip
    ours = {"prompt": "a sail", "image": base64.b64encode(image).decode(), "mask": base64_of(white)}
    output, _ = crane("paints", ours, **SIDES, **QUICK)
    assert reply.data[0].b64_json == output["data"]


@pytest.mark.parametrize(
    ("theirs", "ours", "mime_type"),
    [
        ("mp3", "mp3", "audio/mpeg"),
        ("wav", "wav", "audio/wav"),
        ("flac", "flac", "audio/flac"),
        ("opus", "ogg", "audio/ogg"),
        (None, "mp3", "audio/mpeg"),
    ],
)
def test_speech_is_the_bare_sound(client, crane, theirs, ours, mime_type):
    asked = {"model": "speaks", "input": "the crane", "voice": "1", "speed": 1.25}
    raw = client.audio.speech.with_raw_response.create(
        **asked, response_format=theirs, extra_body={"seed": 7}
    )
    output, _ = crane("speaks", "the crane", voice="1", speed=1.25, format=ours, seed=7)
    assert raw.headers["Content-Type"] == mime_type
    if ours != "ogg":  # whose pages have a number of their own
        assert raw.content == base64.b64decode(output["data"])
    assert raw.content[:4] == base64.b64decode(output["data"])[:4]
    assert json.loads(raw.headers["X-Crane-Metadata"])["seed"] == 7


def test_a_recording_is_written_down_as_crane_run_does(client, crane):
    data = wav(sound(9))
    ours = base64.b64encode(data).decode()
    file = ("sound.wav", data)
    text, metadata = crane("hears", ours, language="de")
    plain = client.audio.transcriptions.create(model="hears", file=file, language="de")
    assert plain.text == text
    assert plain.usage.seconds == metadata["usage"]["audio_seconds"] == 9
    bare = client.audio.transcriptions.create(
        model="hears", file=file, language="de", response_format="text", temperature=0
    )
    assert bare == text


def test_times_of_a_recording(client, crane):
    data = wav(sound(9))
    ours = base64.b64encode(data).decode()

    def ask(format_, **how):
        return client.audio.transcriptions.create(
            model="hears", file=("a.wav", data), language="de", response_format=format_, **how
        )

    timed, _ = crane("hears", ours, language="de", return_timestamps="segments")
    assert timed["segments"]
    verbose = ask("verbose_json")
    assert (verbose.text, verbose.language, verbose.duration) == (timed["text"], "de", 9)
    told = [{"text": one.text, "start": one.start, "end": one.end} for one in verbose.segments]
    assert told == timed["segments"]
    words, _ = crane("hears", ours, language="de", return_timestamps="words")
    told = ask("verbose_json", timestamp_granularities=["word"]).words
    shown = [{"text": one.word, "start": one.start, "end": one.end} for one in told]
    assert shown == words["words"]
    first = timed["segments"][0]
    srt, vtt = ask("srt"), ask("vtt")
    assert srt.startswith(
        f"1\n{clock(first['start'])} --> {clock(first['end'])}\n{first['text']}\n"
    )
    assert vtt.startswith("WEBVTT\n\n")
    assert vtt.count("-->") == srt.count("-->") == len(timed["segments"])
    assert clock(first["end"]).replace(",", ".") in vtt


def clock(seconds):
    return f"00:00:{int(seconds):02},{round(seconds % 1 * 1000):03}"


def test_a_translation_is_into_english(client, crane):
    data = wav(sound(9))
    output, _ = crane("hears", base64.b64encode(data).decode(), task="translate")
    with pytest.deprecated_call():  # by the client, which has it still
        heard = client.audio.translations.create(model="hears", file=("a.wav", data))
    assert heard.text == output


# The models.


def test_the_models_are_those_that_a_caller_may_use(server, client, keys):
    listed = [model.id for model in client.models.list()]
    assert listed == ["echo", "embedder", *[id_ for id_, _, _ in MODELS]]
    one = client.models.retrieve("chat")
    assert (one.id, one.object, one.owned_by) == ("chat", "model", "crane")
    assert type(one.created) is int
    _, key = keys.create(owner="Ann", tier="free", models=["chat"])
    with client_of(server, key) as narrow:
        assert [model.id for model in narrow.models.list()] == ["chat"]
        for others in ("writer", "a/b"):  # there or not, it is none of hers
            with pytest.raises(openai.PermissionDeniedError):
                narrow.models.retrieve(others)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


# Who calls, and what it costs.


def test_each_refusal_is_the_clients_own_exception(server, client, keys):
    def ask(client, model="chat", **more):
        return client.chat.completions.create(model=model, messages=TOLD, max_tokens=4, **more)

    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, temperature="hot")
    assert (bad.value.code, bad.value.param) == ("VALIDATION_ERROR", "temperature")
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.AuthenticationError) as unknown, client_of(server, "crane_a_b") as no:
        ask(no)
    assert (unknown.value.code, unknown.value.type) == ("INVALID_API_KEY", "authentication_error")
    _, narrow = keys.create(owner="Ann", tier="free", models=["echo"])
    with pytest.raises(openai.PermissionDeniedError) as denied, client_of(server, narrow) as no:
        ask(no)
    assert (denied.value.code, denied.value.type) == ("FORBIDDEN", "permission_error")
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, "chad")
    assert (missing.value.code, missing.value.param) == ("MODEL_NOT_FOUND", "model")
    assert missing.value.type == "not_found_error"
    assert "chat" in missing.value.message
    assert missing.value.request_id


def test_a_call_is_on_the_same_quota_and_a_malformed_one_takes_its_unit(server, keys):
    _, key = keys.create(owner="Ann", tier="tiny")
    with client_of(server, key) as client:
        ask = client.chat.completions.with_raw_response.create
        asked = {"model": "chat", "messages": TOLD, "max_tokens": 4}
        assert ask(**asked).headers["X-RateLimit-Remaining"] == "1"
        with pytest.raises(openai.BadRequestError) as wrong:
            ask(**{**asked, "temperature": 7})
        assert wrong.value.response.headers["X-RateLimit-Remaining"] == "0"
        with pytest.raises(openai.RateLimitError) as spent:
            ask(**asked)
        assert spent.value.code == "RATE_LIMIT_EXCEEDED"
        assert spent.value.type == "rate_limit_error"
        assert int(spent.value.response.headers["Retry-After"]) >= 1


def test_what_a_call_may_cost_is_known_by_openais_names_too(make_app):
    """It is refused before its model is asked for, whose weights are nowhere."""
    dear = {"type": "text-to-image", "hf_model": "no/such", "cost": {"per_image": 1}}
    costly = {"type": "chat", "hf_model": "no/such", "cost": {"per_1k_tokens": 10}}
    entries = [{"id": "draws", **dear}, {"id": "chat", **costly}]
    http = make_app(entries, quota="on", tiers=tiers("free 5/minute")).test_client()
    for path, body, units in (
        ("images/generations", DRAW | {"n": 6}, 6),
        ("chat/completions", CHAT | {"max_tokens": 600}, 6),
        ("chat/completions", CHAT | {"max_completion_tokens": 300, "n": 2}, 6),
    ):
        refused = http.post(f"/v1/{path}", json=body)
        assert (refused.status_code, refused.json["error"]["code"]) == (403, "FORBIDDEN")
        asked = int(re.search(r"up to (\d+) units", refused.json["error"]["message"])[1])
        assert units <= asked <= units + 2  # a chat's messages count too


def test_a_call_is_logged_and_counted_under_its_own_route(server, client):
    asked = {"X-Request-ID": "logged-1"}
    client.embeddings.create(model="embedder", input="So.", extra_headers=asked)
    [line] = server.log_lines(request_id="logged-1", message="request")
    assert (line["route"], line["model_id"]) == ("/v1/embeddings", "embedder")
    assert line["timings_ms"]["total"] > 0
    _, _, counted = server.request("GET", "/metrics")
    assert 'crane_requests_total{route="/v1/embeddings",status="200"}' in counted.decode()


def test_where_callers_need_a_key_so_do_all_of_these(make_app):
    http = make_app(auth="required").test_client()
    for path in ("/v1/models", "/v1/models/echo"):
        assert http.get(path).status_code == 401
    answer = http.post("/v1/chat/completions", json={"model": "echo"})
    assert (answer.status_code, answer.json["error"]["type"]) == (401, "authentication_error")
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_the_client_for_browsers_may_say_what_it_is(make_app):
    http = make_app(allowed_origins=("https://a.com",)).test_client()
    asked = {
        "Origin": "https://a.com",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, x-other, x-stainless-lang",
    }
    answer = http.options("/v1/chat/completions", headers=asked)
    assert answer.headers["Access-Control-Allow-Headers"] == "authorization, x-stainless-lang"


# What is wrong is told by OpenAI's name of it.

CHAT = {"model": "chat", "messages": TOLD}
SEES = {"model": "sees", "messages": TOLD}
WRITE = {"model": "writer", "prompt": "the river"}
EMBED = {"model": "embedder", "input": "So."}
RANK = {"model": "rerank", "query": "a", "documents": ["b"]}
DRAW = {"model": "draws", "prompt": "a tower"}
SPEAK = {"model": "speaks", "input": "the crane"}


def said(**message):
    return {"messages": [*TOLD, message]}


def parts(*content):
    return {"messages": [{"role": "user", "content": list(content)}]}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
REFUSED = [
    ("chat/completions", CHAT, {"messages": []}, "messages", "1 to 1000 items"),
    ("chat/completions", CHAT, {"messages": "hi"}, "messages", "a list"),
    ("chat/completions", CHAT, {"messages": None}, "messages", "is missing"),
    ("chat/completions", CHAT, {"messages": [5]}, "messages[0]", "an object"),
    ("chat/completions", CHAT, said(role="usr", content="a"), "messages[1].role", "'user'?"),
    ("chat/completions", CHAT, said(role="user"), "messages[1].content", "is missing"),
    ("chat/completions", CHAT, said(role="user", content=5), "messages[1].content", "a number"),
    ("chat/completions", CHAT, said(role="user", content=[]), "messages[1].content", "1 to 1000"),
    ("chat/completions", CHAT, said(role="user", content="a", nam="b"), "messages[1].nam", "name"),
    ("chat/completions", CHAT, parts({"text": "a"}), "messages[0].content[0].type", "text"),
    ("chat/completions", CHAT, parts({"type": "txt"}), "messages[0].content[0].type", "'text'?"),
    ("chat/completions", CHAT, parts({"type": "input_audio"}), "messages[0].content[0].type", ""),
    ("chat/completions", CHAT, parts(IMAGE), "messages[0].content[0].type", "reads text alone"),
    ("chat/completions", SEES, parts(IMAGE), "messages[0].content[0].image_url.url", "picture"),
    ("chat/completions", SEES, {**parts(IMAGE), "n": 2},
     "messages[0].content[0].image_url.url", ""),
    ("chat/completions", SEES, parts({"type": "image_url", "image_url": "x"}),
     "messages[0].content[0].image_url", "an object"),
    ("chat/completions", SEES,
     parts({"type": "image_url", "image_url": {"url": "x", "detail": "low"}}),
     "messages[0].content[0].image_url.detail", '"auto"'),
    ("chat/completions", CHAT, {"n": 0}, "n", "at least 1"),
    ("chat/completions", CHAT, {"n": True}, "n", "a whole number"),
    ("chat/completions", CHAT, {"n": 9}, "n", "1 to 8 items"),
    ("chat/completions", CHAT, {"max_tokens": "5"}, "max_tokens", "a whole number"),
    ("chat/completions", CHAT, {"max_tokens": 0}, "max_tokens", "at least 1"),
    ("chat/completions", CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", "at least"),
    ("chat/completions", CHAT, {"max_completion_tokens": 5, "max_tokens": 6},
     "max_completion_tokens", "max_tokens"),
    ("chat/completions", CHAT, {"temperature": 2.5}, "temperature", "at most 2"),
    ("chat/completions", CHAT, {"top_p": -1}, "top_p", "at least"),
    ("chat/completions", CHAT, {"frequency_penalty": False}, "frequency_penalty", ""),
    ("chat/completions", CHAT, {"stop": [5]}, "stop[0]", "a string"),
    ("chat/completions", CHAT, {"stop": ["a"] * 9}, "stop", "0 to 8"),
    ("chat/completions", CHAT, {"seed": -1}, "seed", "at least 0"),
    ("chat/completions", CHAT, {"seed": 1.5}, "seed", "a whole number"),
    ("chat/completions", CHAT, {"stream": "yes"}, "stream", "true or false"),
    ("chat/completions", CHAT, {"stream_options": {"include_usage": True}}, "stream_options", ""),
    ("chat/completions", CHAT, {"logit_bias": {"5": 1}}, "logit_bias", "can only be"),
    ("chat/completions", CHAT, {"store": True}, "store", "can only be false here, not true"),
    ("chat/completions", CHAT, {"modalities": ["audio"]}, "modalities",
     'can only be ["text"] here, not a list'),
    ("chat/completions", CHAT, {"functions": []}, "functions", "is not known here"),
    ("chat/completions", CHAT, {"temprature": 1}, "temprature", "did you mean 'temperature'?"),
    ("chat/completions", CHAT, {"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
    ("chat/completions", CHAT, {"tool_choice": "auto"}, "tool_choice", "tools"),
    ("chat/completions", CHAT, {"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
    ("chat/completions", CHAT, {"response_format": {"type": "xml"}}, "response_format.type", ""),
    ("chat/completions", CHAT, {"response_format": {"type": "json_schema"}},
     "response_format.json_schema", "is missing"),
    ("chat/completions", CHAT, {"audio": {"voice": "a"}}, "audio", "is not known here"),
    ("chat/completions", CHAT, {"metadata": "a"}, "metadata", "an object"),
    ("chat/completions", CHAT, {"top_k": "a"}, "top_k", "a whole number"),
    ("chat/completions", CHAT, {"model": None}, "model", "is missing"),
    ("chat/completions", CHAT, {"model": 5}, "model", "a string"),
    ("completions", WRITE, {"prompt": [[1, 2], [3]]}, "prompt[0]", "a string, not a list"),
    ("completions", WRITE, {"prompt": ["a", 5], "n": 3}, "prompt[1]", "a string"),
    ("completions", WRITE, {"prompt": []}, "prompt", "1 to 8"),
    ("completions", WRITE, {"prompt": {}}, "prompt", "a string or a list"),
    ("completions", WRITE, {"prompt": " "}, "prompt", "must not be empty"),
    ("completions", WRITE, {"prompt": " ", "n": 2}, "prompt", "must not be empty"),
    ("completions", WRITE, {"n": 9}, "n", "1 to 8"),
    ("completions", WRITE, {"echo": True}, "echo", "can only be false"),
    ("completions", WRITE, {"suffix": "a"}, "suffix", 'can only be ""'),
    ("completions", WRITE, {"best_of": 2}, "best_of", "can only be 1"),
    ("completions", WRITE, {"messages": TOLD}, "messages", "is not known here"),
    ("embeddings", EMBED, {"input": ["a", 5]}, "input[1]", "a string, not a number"),
    ("embeddings", EMBED, {"input": [[1]]}, "input[0]", "a string, not a list"),
    ("embeddings", EMBED, {"input": ["a"] * 9}, "input", "1 to 8"),
    ("embeddings", EMBED, {"encoding_format": "int8"}, "encoding_format", "base64, float"),
    ("embeddings", EMBED, {"dimensions": 0}, "dimensions", "at least 1"),
    ("rerank", RANK, {"documents": []}, "documents", "1 to 1000"),
    ("rerank", RANK, {"documents": ["a", {"txt": "b"}]}, "documents[1].text", "'text'?"),
    ("rerank", RANK, {"documents": ["a", 5]}, "documents[1]", "a string, or an object"),
    ("rerank", RANK, {"query": ""}, "query", "must not be empty"),
    ("rerank", RANK, {"top_n": 0}, "top_n", "at least 1"),
    ("rerank", RANK, {"return_documents": 1}, "return_documents", "true or false"),
    ("images/generations", DRAW, {"size": "64"}, "size", "1024x1024"),
    ("images/generations", DRAW, {"size": "65x64"}, "size", "multiple of 8"),
    ("images/generations", DRAW, {"size": "99999x64"}, "size", "at most"),
    ("images/generations", DRAW, {"size": "64x64", "width": 128}, "size", "says what width says"),
    ("images/generations", DRAW, {"n": 17}, "n", "at most 16"),
    ("images/generations", DRAW, {"response_format": "url"}, "response_format", '"b64_json"'),
    ("images/generations", DRAW, {"quality": "hd"}, "quality", 'can only be "auto"'),
    ("images/generations", DRAW, {"style": "vivid"}, "style", "is not known here"),
    ("images/generations", DRAW, {"output_format": "gif"}, "output_format", "is 'gif'"),
    ("images/generations", DRAW, {"prompt": ["a"]}, "prompt", "a string, not a list"),
    ("audio/speech", SPEAK, {"input": ["a"]}, "input", "a string, not a list"),
    ("audio/speech", SPEAK, {"voice": "alloy"}, "voice", "is 'alloy'"),
    ("audio/speech", SPEAK, {"speed": 9}, "speed", "at most 4"),
    ("audio/speech", SPEAK, {"response_format": "aac"}, "response_format", "is 'aac'"),
    ("audio/speech", SPEAK, {"instructions": "sing"}, "instructions", "is not known here"),
    ("audio/speech", SPEAK, {"stream_format": "sse"}, "stream_format", '"audio"'),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "change", "param", "word"), REFUSED)
def test_a_fault_is_told_by_the_callers_own_word(post, path, body, change, param, word):
    refused = error(post(f"/v1/{path}", body | change))
    assert (refused.status, refused.code) == (400, "VALIDATION_ERROR")
    assert (refused.type, refused.param) == ("invalid_request_error", param)
    assert word in refused.message


# What no model here can do yet is refused by name, and begins to work with the model's option.
@pytest.mark.parametrize(
    ("change", "option", "param"),
    [
        ({"frequency_penalty": 1}, "frequency_penalty", "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty", "presence_penalty"),
        ({"logprobs": True, "top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format"),
    ],
)
def test_what_a_model_cannot_do_is_refused_by_name(make_app, post, change, option, param):
    from backend.tasks import TASKS

    if option in TASKS["chat"].options().fields:
        pytest.skip("the task has it")
    refused = error(post("/v1/chat/completions", CHAT | change))
    assert (refused.status, refused.param) == (400, param)
    assert "is not something this model can be asked" in refused.message


def test_all_faults_are_in_the_message_for_there_is_no_other_place(post):
    body = CHAT | {"a": 1, "b": 2, "c": 3, "d": 4, "n": 0}
    message = error(post("/v1/chat/completions", body)).message
    assert all(f"{name} is not known" in message for name in "abcd")
    assert "see details" not in message


@pytest.mark.parametrize(
    ("path", "model", "own"),
    [
        ("chat/completions", "writer", "POST /v1/completions"),
        ("completions", "chat", "POST /v1/chat/completions"),
        ("embeddings", "chat", "POST /v1/chat/completions"),
        ("audio/speech", "draws", "POST /v1/images/generations"),
        ("rerank", "embedder", "POST /v1/embeddings"),
        ("images/generations", "hears", "/v1/audio/transcriptions"),
        ("chat/completions", "sums-up", "POST /crane/run serves"),
        ("chat/completions", "echo", "POST /crane/run serves"),
    ],
)
def test_a_model_of_another_type_is_sent_to_its_own_route(post, path, model, own):
    refused = error(post(f"/v1/{path}", {"model": model}))
    assert (refused.status, refused.param) == (400, "model")
    assert own in refused.message
    assert "/crane/run" in refused.message
    assert f"/v1/{path} is for" in refused.message


PNG = written(picture(64, 64))
WAV = wav(sound(1))


def file(data, name="a.bin", mime_type=None):
    return FileStorage(BytesIO(data), name, content_type=mime_type)


@pytest.mark.parametrize(
    ("path", "form", "status", "param"),
    [
        ("images/edits", {"model": "edits", "prompt": "a"}, 400, "image"),
        ("images/edits", {"model": "edits", "prompt": "a", "image": "text"}, 400, "image"),
        ("images/edits", {"model": "edits", "prompt": "a", "image": file(b"no")}, 400, "image"),
        ("images/edits", {"model": "edits", "prompt": "a", "image": file(b"")}, 400, "image"),
        ("images/edits", {"model": "edits", "image": file(PNG)}, 400, "prompt"),
        ("images/edits",
         {"model": "edits", "prompt": "a", "image": file(PNG), "n": "two"}, 400, "n"),
        ("images/edits",
         {"model": "edits", "prompt": "a", "image": file(PNG), "n": "99"}, 400, "n"),
        ("images/edits",
         {"model": "edits", "prompt": "a", "image": file(PNG), "mask": file(PNG)}, 400, "mask"),
        ("images/edits", {"model": "paints", "prompt": "a", "image": file(PNG)}, 400, "mask"),
        ("images/edits",
         {"model": "paints", "prompt": "a", "image": file(PNG), "mask": file(PNG)}, 400, "mask"),
        ("images/edits",
         {"model": "edits", "prompt": "a", "image[]": [file(PNG), file(PNG)]}, 400, "image"),
        ("images/edits",
         {"model": "edits", "prompt": "a", "image": [file(PNG), file(PNG)]}, 400, "image"),
        ("audio/transcriptions", {"model": "hears"}, 400, "file"),
        ("audio/transcriptions", {"model": "hears", "file": file(PNG)}, 400, "file"),
        ("audio/transcriptions", {"file": file(WAV)}, 400, "model"),
        ("audio/transcriptions", {"model": "hears", "file": file(WAV), "language": "xx"},
         400, "language"),
        ("audio/transcriptions", {"model": "hears", "file": file(WAV), "prompt": "a"},
         400, "prompt"),
        ("audio/transcriptions", {"model": "hears", "file": file(WAV), "temperature": "0.5"},
         400, "temperature"),
        ("audio/transcriptions", {"model": "hears", "file": file(WAV), "stream": "true"},
         400, "stream"),
        ("audio/transcriptions", {"model": "hears", "file": file(WAV), "response_format": "xml"},
         400, "response_format"),
        ("audio/transcriptions",
         {"model": "hears", "file": file(WAV), "timestamp_granularities[]": "word"},
         400, "timestamp_granularities"),
        ("audio/transcriptions", {"model": "spells", "file": file(WAV), "response_format": "srt"},
         400, "response_format"),
        ("audio/translations",
         {"model": "hears", "file": file(WAV), "timestamp_granularities[]": "word"},
         400, "timestamp_granularities"),
        ("audio/translations", {"model": "spells", "file": file(WAV)}, 400, "model"),
    ],
)  # fmt: skip
def test_a_fault_in_a_form_is_told_by_the_callers_own_word(post, path, form, status, param):
    refused = error(post(f"/v1/{path}", form=form))
    assert (refused.status, refused.param) == (status, param)


@pytest.mark.parametrize(
    ("method", "path", "headers", "data", "status", "code", "type_"),
    [
        ("GET", "/v1/nope", {}, None, 404, "NOT_FOUND", "not_found_error"),
        ("POST", "/v1/responses", {}, b"{}", 404, "NOT_FOUND", "not_found_error"),
        ("GET", "/v1/embeddings", {}, None, 405, "METHOD_NOT_ALLOWED", "invalid_request_error"),
        ("DELETE", "/v1/models/chat", {}, None, 405, "METHOD_NOT_ALLOWED", "invalid_request_error"),
        ("POST", "/v1/embeddings", {"Content-Type": "text/plain"}, b"{}", 415,
         "UNSUPPORTED_MEDIA_TYPE", "invalid_request_error"),
        ("POST", "/v1/embeddings", {"Content-Type": "multipart/form-data; boundary=a"}, b"", 415,
         "UNSUPPORTED_MEDIA_TYPE", "invalid_request_error"),
        ("POST", "/v1/audio/transcriptions", {"Content-Type": "application/json"}, b"{}", 415,
         "UNSUPPORTED_MEDIA_TYPE", "invalid_request_error"),
        ("POST", "/v1/embeddings", {"Content-Type": "application/json"}, b"{", 400,
         "VALIDATION_ERROR", "invalid_request_error"),
        ("POST", "/v1/embeddings", {"Content-Type": "application/json"}, b"[]", 400,
         "VALIDATION_ERROR", "invalid_request_error"),
        ("POST", "/v1/embeddings", {"Content-Type": "application/json"}, b"NaN", 400,
         "VALIDATION_ERROR", "invalid_request_error"),
        ("GET", "/v1/models", {"Authorization": "Bearer crane_x_y"}, None, 401,
         "INVALID_API_KEY", "authentication_error"),
        ("GET", "/v1/models", {"Authorization": "Basic YTpi"}, None, 200, None, None),
    ],
)  # fmt: skip
def test_http_faults_have_openais_shape(server, method, path, headers, data, status, code, type_):
    answered, heads, body = server.request(method, path, data, headers)
    assert answered == status
    if code:
        answer = SimpleNamespace(status=answered, headers=heads, text=body.decode())
        refused = error(answer)
        assert (refused.code, refused.type, refused.param) == (code, type_, None)


def test_a_body_that_is_too_large_is_refused_in_openais_shape(make_app):
    http = make_app(max_body=1000).test_client()
    answer = http.post("/v1/embeddings", json=EMBED | {"input": "a" * 1000})
    assert (answer.status_code, answer.json["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")
    assert answer.json["error"]["type"] == "invalid_request_error"


def test_elsewhere_errors_keep_their_own_shape(server):
    for path in ("/nope", "/v1nope", "/crane/nope"):
        status, body = server.get(path)
        assert (status, set(body)) == (404, {"error", "request_id"})


def test_a_fault_of_ours_is_a_server_error_that_tells_nothing(make_app, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the secret of the house")

    app = make_app([ECHO, {**MINILM, "id": "embedder"}])
    monkeypatch.setattr(app.extensions["crane"].engine, "run", broken)
    answer = app.test_client().post("/v1/embeddings", json=EMBED)
    assert (answer.status_code, answer.json["error"]["type"]) == (500, "server_error")
    assert answer.json["error"]["code"] == "INTERNAL_ERROR"
    assert "secret" not in answer.text


def test_the_widest_nesting_and_the_oddest_text_are_no_fault_of_ours(post):
    deep = "[" * 900 + "]" * 900
    for body in (
        f'{{"model": "chat", "messages": {deep}}}',
        f'{{"model": "chat", "messages": [{{"role": "user", "content": "a", "name": {deep}}}]}}',
        '{"model": "chat", "messages": [{"role": "user", "content": "\\ud800"}]}',
        '{"model": "\\u0000", "input": 1}',
        '{"model": "chat", "messages": [{"role": "user", "content": "a"}], "seed": 1e400}',
        '{"model": "chat", "messages": [{"role": "user", "content": "a"}], "n": 1e99}',
        '{"model": "embedder", "input": "a", "dimensions": ' + "9" * 300 + "}",
    ):
        for path in ("chat/completions", "embeddings"):
            answer = post(f"/v1/{path}", data=body.encode())
            assert answer.status in (400, 404), answer.text
            error(answer)


ODD = [
    None,
    True,
    -1,
    0.5,
    2**63,
    "",
    "a",
    "\0",
    [],
    ["a"],
    [[]],
    [None],
    {},
    {"a": 1},
    {"type": []},
]
BODIES = {
    "/v1/chat/completions": CHAT | {"max_tokens": 1},
    "/v1/completions": WRITE | {"max_tokens": 1},
    "/v1/embeddings": EMBED,
    "/v1/rerank": RANK,
    "/v1/images/generations": DRAW | {"size": "64x64", "num_inference_steps": 1},
    "/v1/audio/speech": SPEAK,
}


@pytest.mark.parametrize("path", BODIES)
def test_no_odd_value_of_any_field_is_a_fault_of_ours(post, path):
    for name in ROUTES[path].body().fields:
        for value in ODD:
            answer = post(path, BODIES[path] | {name: value})
            assert answer.status in (200, 400, 404), (name, value, answer.text)
            if answer.status != 200:
                error(answer)


# Streams.


def spoken(chunks, place=0):
    """The text of one choice, its reason, and that its role comes first."""
    choices = [one for chunk in chunks for one in chunk.choices if one.index == place]
    assert choices[0].delta.role == "assistant"
    text = "".join(one.delta.content or "" for one in choices)
    return text, [one.finish_reason for one in choices if one.finish_reason]


def test_a_chat_streams_what_it_answers_and_its_usage(client, crane):
    text, metadata = crane("chat", {"messages": TOLD}, max_tokens=20)
    options = {"include_usage": True}
    with client.chat.completions.create(
        model="chat", messages=TOLD, max_tokens=20, stream=True, stream_options=options
    ) as stream:
        chunks = list(stream)
    assert spoken(chunks) == (text, [metadata["finish_reason"]])
    assert len(chunks) >= 4  # who reads slowly gets more of the text at once
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == metadata["usage"]["output_tokens"]
    assert chunks[-1].usage.prompt_tokens == metadata["usage"]["input_tokens"]


def test_the_texts_of_one_chat_stream_beside_each_other(client):
    asked = {"model": "chat", "messages": TOLD, "n": 3, "temperature": 1.5, "seed": 4}
    asked["max_tokens"] = 15
    plain = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    for choice in plain.choices:
        told = spoken(chunks, choice.index)
        assert told == (choice.message.content, [choice.finish_reason])
    assert len({choice.message.content for choice in plain.choices}) == 3


def test_a_picture_is_talked_about_in_a_stream(client):
    url = "data:image/png;base64," + base64_of(picture(64, 64, seed=3))
    content = [
        {"type": "text", "text": "what is it"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    asked = {"model": "sees", "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    plain = client.chat.completions.create(**asked).choices[0]
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert spoken(chunks) == (plain.message.content, [plain.finish_reason])


def test_completions_stream_for_each_prompt(client):
    asked = {"model": "writer", "prompt": ["one", "two of them"], "max_tokens": 12}
    plain = client.completions.create(**asked)
    texts = ["", ""]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in plain.choices]


def test_an_asynchronous_client_streams_too(server, crane):
    text, _ = crane("chat", {"messages": TOLD}, max_tokens=9)

    async def ask():
        async with client_of(server, kind=openai.AsyncOpenAI) as opened:
            stream = await opened.chat.completions.create(
                model="chat", messages=TOLD, max_tokens=9, stream=True
            )
            return [chunk async for chunk in stream]

    assert spoken(asyncio.run(ask()))[0] == text


def test_hugging_faces_client_streams_too(server, crane):
    text, _ = crane("chat", {"messages": TOLD}, max_tokens=9)
    hub = InferenceClient(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any")
    stream = hub.chat_completion(TOLD, model="chat", max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text


def test_a_raw_stream_is_one_that_proxies_pass_on(client):
    raw = client.chat.completions.with_raw_response.create(
        model="chat", messages=TOLD, max_tokens=3, stream=True
    )
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.headers["x-accel-buffering"] == "no"
    assert raw.headers["x-ratelimit-remaining"]
    assert len(list(raw.parse())) > 1


def test_a_wrong_field_of_a_stream_is_answered_as_without_one(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="chat", messages=TOLD, max_tokens=-1, stream=True, stream_options=None
        )
    assert refused.value.param == "max_tokens"


def test_what_cannot_be_read_ends_a_stream_with_an_error(client):
    long = [{"role": "user", "content": "word " * 2000}]
    stream = client.chat.completions.create(model="chat", messages=long, stream=True)
    with pytest.raises(openai.APIError, match="window") as refused:
        list(stream)
    assert refused.value.param == "messages"


def test_who_leaves_a_stream_frees_its_place(client, server):
    def running():
        return server.get("/crane/quota")[1]["concurrency"]["running"]

    wait_for(lambda: running() == 0)
    stream = client.chat.completions.create(
        model="chat", messages=TOLD, max_tokens=200, stream=True, extra_body={"min_tokens": 200}
    )
    next(stream)
    stream.close()
    wait_for(lambda: running() == 0, timeout_s=2)
