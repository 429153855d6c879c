"""Answers as a stream of events, from real servers and through the app."""

from __future__ import annotations

import base64
import json
import random
import socket
import threading
import time
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from backend.adapters import previews
from backend.adapters.echo import Echo
from backend.engine import client as engine_client
from backend.server.sockets import ClientSocket, Pace
from backend.tasks import TASKS
from backend.tasks.usage import most_usage
from tests.checkpoints import checkpoint, sentence
from tests.conftest import ECHO, MINILM, run, write_models
from tests.serving import Gunicorn, Stream, wait_for

__all__ = ["checkpoint"]

PROMPT = sentence(5, 1)
PRICE = {"per_1k_tokens": 1000}  # a unit for each token
ENDLESS = {"max_tokens": 32768, "min_tokens": 32768}  # T5 has no window; it takes minutes
HELD = {"delay_ms": 60_000}


@pytest.fixture(scope="module", params=["process", "inline", "several"])
def server(request, checkpoint, tmp_path_factory):
    """Crane with its engine in a process of its own, inside the HTTP worker, and with two."""
    folder = tmp_path_factory.mktemp(f"streams-{request.param}")
    entries = [
        ECHO,
        {"id": "writer", "type": "text-generation", "hf_model": checkpoint("llama")},
        {"id": "bytes", "type": "text-generation", "hf_model": checkpoint("llama_without_end")},
        {"id": "t5", "type": "text2text-generation", "hf_model": checkpoint("t5"), "cost": PRICE},
        {"id": "thinker", "type": "chat", "hf_model": checkpoint("thinker")},
        {"id": "pictures", "type": "text-to-image", "hf_model": checkpoint("stable_diffusion")},
        MINILM,
    ]
    settings = {"CRANE_ENGINE": "process", "CRANE_WORKERS": 1, "CRANE_QUOTA": "on"}
    settings["CRANE_TIERS"] = "free 1000000/day concurrency=200"
    if request.param == "inline":
        settings["CRANE_ENGINE"] = "inline"
    if request.param == "several":
        settings["CRANE_DEVICES"] = "cpu,cpu"
    server = Gunicorn(write_models(folder, entries), folder / "data", settings).wait_until_ready()
    yield server
    server.stop()


def quota(server):
    """The calls that count as running, and the units that are left."""
    answer = server.get("/crane/quota")[1]
    return answer["concurrency"]["running"], answer["limits"][0]["left"]


def text_of(events):
    return "".join(data["text"] for name, data in events if name == "delta")


def test_a_stream_starts_tells_its_text_as_it_is_written_and_ends_with_the_receipt(server):
    plain = server.run("writer", PROMPT, options={"max_tokens": 30})[1]
    stream = server.stream("writer", PROMPT, options={"max_tokens": 30})
    events = list(stream)
    assert stream.status == 200
    assert stream.headers["Content-Type"].startswith("text/event-stream")
    assert stream.headers["X-Accel-Buffering"] == "no"
    assert stream.headers["Cache-Control"] == "no-store"
    names = [name for name, _ in events]
    assert names == ["start", *["delta"] * (len(events) - 3), "output", "done"]
    assert all(data["index"] == 0 for name, data in events if name == "delta")
    assert text_of(events) == plain["output"] == events[-2][1]["output"]
    start, done = events[0][1]["metadata"], events[-1][1]["metadata"]
    assert done["request_id"] == stream.headers["X-Request-ID"]
    assert done.keys() == plain["metadata"].keys()
    assert done["usage"] == plain["metadata"]["usage"]
    assert start["timings_ms"].keys() == {"queue", "load"}
    assert {name: done[name] for name in start if name != "timings_ms"} == {
        name: start[name] for name in start if name != "timings_ms"
    }


def test_the_text_comes_while_it_is_written(server):
    stream = server.stream("t5", PROMPT, options=ENDLESS)
    stream.until("delta")
    stream.until("delta")  # it would take minutes, were it to come at the end
    stream.leave()


@pytest.mark.parametrize(
    ("model_id", "input", "options"),
    [
        ("echo", {"a": [1, None, "\n\n"]}, {}),
        ("embedder", "two words", {}),
        ("embedder", ["two words", "and three more"], {}),
        ("pictures", "a tower", {"width": 32, "height": 32, "num_inference_steps": 3, "seed": 1}),
        ("t5", PROMPT, {"max_tokens": 9, "num_beams": 3}),
    ],
)
def test_every_model_can_stream_and_gives_what_it_gives_without(server, model_id, input, options):
    status, plain = server.run(model_id, input, options=options)
    assert status == 200, plain
    events = list(server.stream(model_id, input, options=options))
    told = [(name, data) for name, data in events if name != "progress"]
    assert [name for name, _ in told] == ["start", "output", "done"]
    assert told[1][1]["output"] == plain["output"]
    assert told[2][1]["metadata"]["options"] == plain["metadata"]["options"]


def test_steps_are_told_as_they_are_done(server):
    options = {"width": 32, "height": 32, "num_inference_steps": 4}
    events = list(server.stream("pictures", "a tower", options=options))
    progress = [data for name, data in events if name == "progress"]
    steps = [(data["index"], data["step"], data["steps"]) for data in progress]
    assert steps == [(0, step, 4) for step in (1, 2, 3, 4)]


def test_the_texts_of_a_batch_are_told_apart(server):
    prompts = [sentence(3, seed) for seed in range(5)]
    plain = server.run("writer", prompts, options={"max_tokens": 25})[1]["output"]
    texts = [""] * 5
    for name, data in server.stream("writer", prompts, options={"max_tokens": 25}):
        if name == "delta":
            texts[data["index"]] += data["text"]
        if name == "output":
            assert texts == data["output"] == plain


def test_streams_say_what_plain_answers_say_for_200_prompts_of_16_callers_at_once(server):
    draw = random.Random(5)
    prompts = [sentence(draw.randint(1, 12), seed) for seed in range(200)]
    options = [
        {"max_tokens": draw.randint(1, 40), "stop": draw.choice([[], ["e"], ["th", "\u00e9"]])}
        for _ in prompts
    ]
    plain, streamed = {}, {}

    def call(places):
        for place in places:
            body = {"input": prompts[place], "options": options[place]}
            events = list(server.stream("writer", **body))
            streamed[place] = text_of(events), events[-2][1]["output"]
            plain[place] = server.run("writer", **body)[1]["output"]

    threads = [threading.Thread(target=call, args=[range(n, 200, 16)]) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(plain) == 200
    assert streamed == {place: (text, text) for place, text in plain.items()}


def test_neither_stop_strings_nor_halves_of_characters_are_told(server):
    """Its tokens are bytes mostly: two of each character, and each of a stop string's."""
    told = set()
    for seed in range(40):
        options = {"max_tokens": 60, "temperature": 2, "seed": seed}
        whole = server.run("bytes", PROMPT, options=options)[1]["output"]
        stop = [whole[at : at + 3] for at in (4, 9)]
        events = list(server.stream("bytes", PROMPT, options={**options, "stop": stop}))
        text = text_of(events)
        assert text == events[-2][1]["output"]
        assert text == whole[: min(whole.find(one) for one in stop)]
        assert events[-1][1]["metadata"]["finish_reason"] == "stop"
        told |= {data["text"] for name, data in events if name == "delta"}
    assert len(told) > 40


def test_what_a_chat_thinks_and_calls_is_told_apart_from_what_it_says(server):
    names = ("weather", "clock")
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    chats = [{"messages": [{"role": "user", "content": "Köln?"}], "tools": tools}] * 3
    plain, receipt = server.run("thinker", chats)[1].values()
    events = list(server.stream("thinker", chats))
    content, thoughts = [""] * 3, [""] * 3
    for name, data in events:
        if name == "delta":
            (thoughts if data.get("kind") == "reasoning" else content)[data["index"]] += data[
                "text"
            ]
    assert content == events[-2][1]["output"] == plain == ["Let me look."] * 3
    done = events[-1][1]["metadata"]
    assert thoughts == done["reasoning_content"] == receipt["reasoning_content"] == ["I ask"] * 3
    called = [[call["name"] for call in calls] for calls in done["tool_calls"]]
    assert called == [[*names]] * 3
    assert done["tool_calls"] == receipt["tool_calls"]
    assert done["usage"]["reasoning_tokens"] == receipt["usage"]["reasoning_tokens"] == 9


def test_the_receipt_of_a_cut_text_says_so(server):
    done = server.stream("bytes", PROMPT, options={"max_tokens": 3}).until("done")
    assert done["metadata"]["finish_reason"] == "length"


def test_the_accept_header_asks_for_a_stream_too(server):
    body = json.dumps({"model_id": "echo", "input": 1}).encode()
    assert [name for name, _ in Stream(server.port, body, Accept="text/event-stream")] == [
        "start",
        "output",
        "done",
    ]
    both = Stream(server.port, body, Accept="application/json, text/event-stream;q=0.5")
    assert both.json()["output"] == 1


def test_the_body_has_the_last_word(server):
    body = {"model_id": "echo", "input": 1, "stream": False}
    plain = Stream(server.port, json.dumps(body).encode(), Accept="text/event-stream, */*;q=0.1")
    assert plain.json()["output"] == 1
    refused = Stream(server.port, json.dumps(body).encode(), Accept="text/event-stream")
    assert refused.status == 406
    body["stream"] = "yes"
    assert Stream(server.port, json.dumps(body).encode()).json()["error"]["details"] == {
        "stream": "must be true or false, not a string"
    }


def test_a_form_can_ask_for_a_stream(server):
    parts = {"model_id": "echo", "input": "hello", "stream": "true"}
    body = "".join(
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in parts.items()
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    stream = Stream(server.port, f"{body}--x--\r\n".encode(), **headers)
    assert stream.until("output") == {"output": "hello"}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model_id": "nobody"}, 404, "MODEL_NOT_FOUND"),
        ({"options": {"delay": 1}}, 400, "VALIDATION_ERROR"),
        ({"model_id": "writer", "input": sentence(300)}, 200, "VALIDATION_ERROR"),
    ],
)
def test_an_error_before_the_model_runs_is_an_answer_and_after_that_an_event(
    server, body, status, code
):
    left = quota(server)[1]
    stream = server.stream(**body)
    assert stream.status == status
    if status == 200:
        error = list(stream)[-1]
        assert error[0] == "error"
        assert error[1]["request_id"] == stream.headers["X-Request-ID"]
        assert error[1]["error"]["code"] == code
        [line] = wait_for(lambda: server.log_lines(request_id=error[1]["request_id"]))
        assert (line["status"], line["error"]) == (200, code)
    else:
        assert stream.json()["error"]["code"] == code
    wait_for(lambda: quota(server) == (0, left - 1))


def test_who_leaves_stops_the_work_and_frees_the_place_and_pays_what_was_reserved(server):
    left = quota(server)[1]
    stream = server.stream("t5", PROMPT, options=ENDLESS)
    stream.until("delta")
    assert quota(server)[0] == 1
    stream.leave()
    wait_for(lambda: quota(server)[0] == 0, timeout_s=2)
    wait_for(lambda: not server.get("/crane/models/t5")[1]["running"], timeout_s=2)
    _, most = most_usage(TASKS["text2text-generation"], [PROMPT], {**ENDLESS, "num_images": 1})
    assert quota(server)[1] == left - most["output_tokens"] - most["input_tokens"]
    [line] = wait_for(lambda: server.log_lines(request_id=stream.headers["X-Request-ID"]))
    assert (line["status"], line["error"]) == (200, "CLIENT_CLOSED_REQUEST")


def test_a_stream_costs_what_it_used(server):
    whole = server.run("t5", PROMPT, options={"max_tokens": 60})[1]["output"]
    left = quota(server)[1]
    options = {"max_tokens": 500, "stop": [whole[10:14]]}
    done = server.stream("t5", PROMPT, options=options).until("done")
    used = sum(done["metadata"]["usage"].values())
    assert used < 100
    wait_for(lambda: quota(server) == (0, left - used))


def test_a_streams_log_line_has_all_of_its_time(server):
    stream = server.stream("echo", options={"delay_ms": 300})
    request_id = stream.headers["X-Request-ID"]
    assert not server.log_lines(request_id=request_id)
    done = stream.until("done")
    [line] = wait_for(lambda: server.log_lines(request_id=request_id))
    assert line["duration_ms"] > 300
    assert line["timings_ms"] == done["metadata"]["timings_ms"]
    assert line["batch_size"] == 1


def test_a_streams_quota_headers_say_what_is_left_with_it(server):
    left = quota(server)[1]
    stream = server.stream("echo")
    assert stream.headers["X-RateLimit-Remaining"] == str(int(left - 1))
    list(stream)


def test_one_of_sixteen_who_leaves_changes_nothing_for_the_others(server):
    prompts = [sentence(4, seed) for seed in range(16)]
    options = {"max_tokens": 60}
    plain = [server.run("bytes", prompt, options=options)[1]["output"] for prompt in prompts]
    for leaver in random.Random(3).sample(range(16), 3):
        texts = [""] * 16
        at_once = threading.Barrier(16)

        def call(place, texts=texts, at_once=at_once, leaver=leaver):
            at_once.wait()
            stream = server.stream("bytes", prompts[place], options=options)
            for name, data in stream:
                if name == "delta":
                    texts[place] += data["text"]
                    if place == leaver:
                        stream.leave()
                        return

        threads = [threading.Thread(target=call, args=[place]) for place in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert plain[leaver].startswith(texts[leaver])
        texts[leaver] = plain[leaver]
        assert texts == plain


def test_an_engine_that_dies_ends_a_stream_with_an_error(gunicorn):
    server = gunicorn()
    stream = server.stream("echo", options=HELD)
    assert next(iter(stream))[0] == "start"
    server.engine().kill()
    [(name, data)] = list(stream)
    assert (name, data["error"]["code"]) == ("error", "MODEL_UNAVAILABLE")


def test_a_deadline_ends_a_stream_with_an_error(gunicorn):
    server = gunicorn(CRANE_REQUEST_TIMEOUT="300ms")
    events = list(server.stream("echo", options=HELD))
    assert [name for name, _ in events] == ["start", "error"]
    assert events[1][1]["error"]["code"] == "TIMEOUT_ERROR"


def events_of(response):
    """The names of an app's answer's events, and its comments."""
    return [
        line.removeprefix("event: ")
        for line in response.text.splitlines()
        if line.startswith(("event: ", ":"))
    ]


def test_while_nothing_happens_a_comment_says_that_it_is_still_there(make_app, monkeypatch):
    monkeypatch.setattr(engine_client, "IDLE_S", 0.1)
    client = make_app().test_client()
    events = events_of(run(client, options={"delay_ms": 350}, stream=True))
    comments = events.count(": still here")
    assert comments >= 2
    assert [event for event in events if not event.startswith(":")] == ["start", "output", "done"]
    assert events[-2:] == ["output", "done"]


def test_where_a_model_loads_long_the_stream_begins_before_it(make_app, add_task, monkeypatch):
    monkeypatch.setattr(engine_client, "IDLE_S", 0.1)

    class LoadsLong(Echo):
        def load(self):
            time.sleep(0.25)
            super().load()

    class CannotLoad(Echo):
        def load(self):
            time.sleep(0.25)
            raise RuntimeError("no weights")

    client = make_app([add_task("long", LoadsLong), add_task("never", CannotLoad)]).test_client()
    events = events_of(run(client, "long", stream=True))
    assert events[0] == ": still here"
    assert [event for event in events if not event.startswith(":")] == ["start", "output", "done"]
    refused = run(client, "never", stream=True)
    assert refused.status_code == 200
    assert events_of(refused)[-1] == "error"
    monkeypatch.setattr(engine_client, "IDLE_S", 5)
    again = run(client, "never", stream=True)  # which is known at once
    assert again.status_code == 503


def test_what_went_wrong_here_is_told_without_what_it_was(make_app, add_task, capsys):
    class Breaks(Echo):
        def predict(self, batch):
            raise RuntimeError("secret")

    client = make_app([add_task("breaks", Breaks)]).test_client()
    response = run(client, "breaks", stream=True)
    assert events_of(response) == ["start", "error"]
    assert "secret" not in response.text
    assert "INTERNAL_ERROR" in response.text
    assert "secret" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_ends_the_stream_with_an_error(make_app, add_task, capsys):
    class Odd(Echo):
        def predict(self, batch):
            [prediction] = super().predict(batch)
            prediction.output = object()
            return [prediction]

    response = run(make_app([add_task("odd", Odd)]).test_client(), "odd", stream=True)
    assert events_of(response) == ["start", "error"]
    assert "is not JSON" in capsys.readouterr().err


class FailsOnce(Echo):
    """Tells half of a text, fails, and is asked again, for each input by itself."""

    text = "one two three"

    def predict(self, batch):
        for place in range(len(batch)):
            assert batch.listens(place)
            batch.tell(place, "delta", {"text": self.text[:7]})
            if len(batch) > 1:
                raise RuntimeError("not together")
            batch.tell(place, "delta", {"text": self.text[7:]})
        return super().predict(batch)


def test_what_a_run_told_before_it_failed_is_told_once(make_app, add_task):
    entry = add_task("fails-once", FailsOnce)
    response = run(make_app([entry]).test_client(), "fails-once", ["a", "b"], stream=True)
    told = ["", ""]
    for line in response.text.splitlines():
        if line.startswith("data: ") and "index" in (data := json.loads(line[6:])):
            told[data["index"]] += data["text"]
    assert told == [FailsOnce.text] * 2


def send(caller, response):
    for chunk in response.response:
        caller.sendall(chunk)


def free_permits(app):
    return app.extensions["crane"].permits._free._value


def test_a_caller_that_reads_nothing_is_given_up(make_app):
    """As gunicorn does it: with the caller's own socket, which it writes to."""
    accepted, there = socket.socketpair()
    here = ClientSocket(accepted, Pace(0.25, 1e6))
    with here, there:
        app = make_app(auth="off")  # whoever calls by a Unix socket needs a key
        environ = {"gunicorn.socket": here}
        body = {"model_id": "echo", "input": "x" * 900_000, "stream": True}
        response = app.test_client().post("/crane/run", json=body, environ_overrides=environ)
        with pytest.raises(TimeoutError):
            send(here, response)
        response.close()
        assert free_permits(app) == app.extensions["crane"].config.threads


def test_a_stream_of_which_nothing_could_be_sent_leaves_nothing_taken(make_app):
    app = make_app(quota="on")
    client = app.test_client()
    body = {"model_id": "echo", "input": 1, "stream": True}
    response = client.post("/crane/run", json=body)
    response.close()  # as the server does where the head of it was not taken
    assert client.get("/crane/quota").json["concurrency"]["running"] == 0
    assert free_permits(app) == app.extensions["crane"].config.threads


def test_streams_hold_the_places_that_calls_have(make_app):
    client = make_app(threads=1).test_client()
    body = {"model_id": "echo", "input": 1, "options": {"delay_ms": 200}, "stream": True}
    stream = client.post("/crane/run", json=body)
    assert run(client).status_code == 503
    stream.close()
    assert run(client).status_code == 200


DRAWN = {"width": 64, "height": 48, "num_inference_steps": 3, "seed": 4}


def previews_of(response):
    """The previews of each input, as pictures."""
    found = {}
    for line in response.text.splitlines():
        data = json.loads(line[6:]) if line.startswith("data: ") else {}
        if "preview" in data:
            assert data["preview"]["mime_type"] == "image/jpeg"
            picture = Image.open(BytesIO(base64.b64decode(data["preview"]["data"])))
            found.setdefault(data["index"], []).append(picture)
    return found


@pytest.fixture
def drawing(make_app, checkpoint, monkeypatch):
    monkeypatch.setattr(previews, "EVERY_S", 0)
    entry = {"id": "pictures", "type": "text-to-image", "hf_model": checkpoint("stable_diffusion")}
    return make_app([entry]).test_client()


def test_a_picture_is_previewed_as_it_is_drawn_and_is_drawn_as_without(drawing, monkeypatch):
    plain = run(drawing, "pictures", ["a", "b"], options={**DRAWN, "num_images": 2})
    streamed = run(drawing, "pictures", ["a", "b"], options={**DRAWN, "num_images": 2}, stream=True)
    seen = previews_of(streamed)
    assert {index: len(pictures) for index, pictures in seen.items()} == {0: 3, 1: 3}
    assert {picture.size for pictures in seen.values() for picture in pictures} == {(64, 48)}
    [output] = [line for line in streamed.text.splitlines() if line.startswith('data: {"output"')]
    assert json.loads(output[6:])["output"] == plain.json["output"]
    # The last of the first input's is that of its first picture, but for what JPEG loses.
    pair = [Image.open(BytesIO(base64.b64decode(one["data"]))) for one in plain.json["output"][0]]
    last, first, second = (np.asarray(one.convert("L"), float) for one in (seen[0][-1], *pair))
    assert np.abs(last - first).mean() < 0.3 * np.abs(last - second).mean()


def test_a_large_pictures_preview_is_small(drawing):
    response = run(
        drawing, "pictures", "a", options={**DRAWN, "width": 256, "height": 128}, stream=True
    )
    [pictures] = previews_of(response).values()
    scale = pictures[0].size[0] // 16
    assert {picture.size for picture in pictures} == {(16 * scale, 8 * scale)}
    assert pictures[0].size[0] < 256


def test_nobody_pays_for_a_preview_that_nobody_sees(drawing, monkeypatch):
    seen = []
    monkeypatch.setattr(previews.Previewer, "see", lambda *args: seen.append(args) or {})
    assert run(drawing, "pictures", "a", options=DRAWN).status_code == 200
    assert seen == []


def test_a_preview_that_fails_spoils_no_picture(drawing, monkeypatch):
    def fails(*args):
        raise RuntimeError("no room for it")

    monkeypatch.setattr(previews.Previewer, "_decode", fails)
    response = run(drawing, "pictures", "a", options=DRAWN, stream=True)
    assert previews_of(response) == {}
    assert events_of(response)[-2:] == ["output", "done"]
