"""The engine through the caller's door: loading once, batching, and every way to fail."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from backend import metrics
from backend.adapters import ADAPTERS
from backend.adapters.base import Adapter, Prediction
from backend.adapters.echo import Echo
from backend.engine import worker
from backend.engine.calls import Call
from backend.errors import InvalidRequest, ModelUnavailable
from backend.schemas import Boolean, Integer
from backend.tasks import TASKS, Options
from tests.conftest import ECHO, run
from tests.serving import wait_for


def at_once(count, call):
    """Run ``call(0) … call(count - 1)`` in threads that start together; return their results."""
    gate = threading.Barrier(count)

    def go(index):
        gate.wait(20)
        return call(index)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(go, range(count)))


class Gate:
    """Holds a model busy until it is opened, and tells of each batch the model ran."""

    def __init__(self):
        self.batches = []
        self.on_batch = lambda batch: None
        self._busy = threading.Event()
        self._opened = threading.Event()

    def open(self):
        self._opened.set()

    def wait_until_busy(self):
        assert self._busy.wait(10)

    def pass_through(self, batch):
        self.batches.append(list(batch.inputs))
        self._busy.set()
        assert self._opened.wait(30)
        self.on_batch(batch)


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture
def gated(add_task, gate):
    """The registry entry of an echo (or another adapter) behind the gate."""

    def entry(adapter=Echo, **more):
        class Gated(adapter):
            def predict(self, batch):
                gate.pass_through(batch)
                return super().predict(batch)

        return add_task("gated", Gated, **more)

    return entry


def call(app, input="x", **body):
    return run(app.test_client(), "gated", input, **body)


def queue_up(app, gate, calls):
    """Have ``calls`` queue behind one that holds the model; return their answers, in order."""
    with ThreadPoolExecutor(len(calls) + 1) as threads:
        first = threads.submit(call, app, "first")
        gate.wait_until_busy()
        answers, queued = [], 0
        for body in calls:
            answers.append(threads.submit(call, app, **body))
            given = body.get("input")
            queued += len(given) if isinstance(given, list) else 1
            wait_for_queue(app, queued)
        gate.open()
        assert first.result().status_code == 200
        return [answer.result() for answer in answers]


def wait_for_queue(app, length):
    engine = app.extensions["crane"].engine
    wait_for(lambda: engine.status()["models"]["gated"]["queue"] == length)


# Loading


def test_32_first_calls_at_once_load_a_model_once(make_app, add_task):
    loads = []

    class SlowToLoad(Echo):
        def load(self):
            loads.append(threading.current_thread().name)
            time.sleep(0.3)
            super().load()

    app = make_app([add_task("slow-to-load", SlowToLoad)])
    answers = at_once(32, lambda i: run(app.test_client(), "slow-to-load", i))
    assert [answer.json["output"] for answer in answers] == list(range(32))
    assert loads == ["model slow-to-load"]
    assert all(answer.json["metadata"]["timings_ms"]["load"] > 0 for answer in answers)
    again = run(app.test_client(), "slow-to-load")
    assert again.json["metadata"]["timings_ms"]["load"] == 0


def test_models_of_a_library_load_one_after_another(make_app, add_task):
    inside, most = [], []

    class OfALibrary(Echo):
        loads_alone = True

        def load(self):
            inside.append(self)
            time.sleep(0.2)
            most.append(len(inside))
            inside.remove(self)
            super().load()

    app = make_app([add_task(f"loads-{number}", OfALibrary) for number in range(3)])
    answers = at_once(3, lambda i: run(app.test_client(), f"loads-{i}"))
    assert [answer.status_code for answer in answers] == [200] * 3
    assert most == [1, 1, 1]


def test_load_predict_and_unload_all_happen_in_one_thread(make_app, add_task):
    seen = []

    class Watched(Echo):
        def load(self):
            seen.append(("load", threading.get_ident()))
            super().load()

        def predict(self, batch):
            seen.append(("predict", threading.get_ident()))
            return super().predict(batch)

        def unload(self):
            seen.append(("unload", threading.get_ident()))

    app = make_app([add_task("watched", Watched)])
    at_once(4, lambda i: run(app.test_client(), "watched", i))
    app.extensions["crane"].engine.close()
    assert [what for what, _ in seen][:: len(seen) - 1] == ["load", "unload"]
    assert len({thread for _, thread in seen}) == 1


def test_a_caller_who_waits_too_long_for_a_load_is_told_so_and_the_load_goes_on(make_app, add_task):
    gate = threading.Event()

    class LoadsAtTheGate(Echo):
        def load(self):
            assert gate.wait(20)
            super().load()

    app = make_app([add_task("gated-load", LoadsAtTheGate)], load_wait_s=0.2)
    client = app.test_client()
    answer = run(client, "gated-load")
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "MODEL_LOADING")
    assert int(answer.headers["Retry-After"]) > 0
    assert client.get("/crane/models/gated-load").json["state"] == "loading"
    gate.set()
    deadline = time.monotonic() + 10
    while client.get("/crane/models/gated-load").json["state"] != "ready":
        assert time.monotonic() < deadline
    assert run(client, "gated-load").status_code == 200


def test_a_failed_load_is_the_same_503_for_all_and_is_not_tried_again_at_once(make_app, add_task):
    loads = []

    class RaisesInLoad(Echo):
        def load(self):
            loads.append(1)
            time.sleep(0.05)
            raise RuntimeError("secret path /srv/weights")

    app = make_app([add_task("raises-in-load", RaisesInLoad)])
    answers = at_once(16, lambda i: run(app.test_client(), "raises-in-load"))
    answers.append(run(app.test_client(), "raises-in-load"))
    assert {(a.status_code, a.json["error"]["code"]) for a in answers} == {
        (503, "MODEL_UNAVAILABLE")
    }
    assert len({answer.json["error"]["message"] for answer in answers}) == 1
    assert {int(answer.headers["Retry-After"]) for answer in answers} == {10}
    assert "secret" not in answers[0].text
    assert loads == [1]
    assert app.test_client().get("/crane/models/raises-in-load").json["state"] == "failed"


def test_a_failed_load_is_tried_again_later_and_the_pause_doubles(make_app, add_task, monkeypatch):
    monkeypatch.setattr(worker, "FIRST_RETRY_S", 1.0)
    loads = []

    class LoadsTheThirdTime(Echo):
        def load(self):
            loads.append(time.monotonic())
            if len(loads) < 3:
                raise ModelUnavailable("Its weights are still being copied.")
            super().load()

    app = make_app([add_task("third-time", LoadsTheThirdTime)])
    client = app.test_client()
    refused = run(client, "third-time")
    assert "still being copied" in refused.json["error"]["message"]
    deadline = time.monotonic() + 20
    while run(client, "third-time").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first, second, third = loads
    assert second - first >= 1
    assert third - second >= 2


# Batching


def test_queued_calls_with_equal_options_run_as_one_batch(make_app, gated, gate):
    app = make_app([gated()])
    answers = queue_up(app, gate, [{"input": i} for i in range(8)])
    assert [answer.json["output"] for answer in answers] == list(range(8))
    assert {answer.json["metadata"]["batch_size"] for answer in answers} == {8}
    assert gate.batches == [["first"], list(range(8))]


def test_calls_with_other_options_run_apart_and_in_their_order(make_app, gated, gate):
    app = make_app([gated()])
    delays = [1, 2, 1, 2, 3]
    calls = [{"input": i, "options": {"delay_ms": delay}} for i, delay in enumerate(delays)]
    answers = queue_up(app, gate, calls)
    assert [answer.json["output"] for answer in answers] == [0, 1, 2, 3, 4]
    assert gate.batches == [["first"], [0, 2], [1, 3], [4]]


def test_nobody_is_overtaken_for_longer_than_one_batch(make_app, gated, gate):
    app = make_app([gated() | {"max_batch_size": 2}])
    delays = [1, 2, 1, 1, 1]
    queue_up(
        app, gate, [{"input": i, "options": {"delay_ms": delay}} for i, delay in enumerate(delays)]
    )
    assert gate.batches == [["first"], [0, 2], [1], [3, 4]]


def test_no_batch_is_larger_than_the_entry_allows(make_app, gated, gate):
    app = make_app([gated() | {"max_batch_size": 3}])
    answers = queue_up(app, gate, [{"input": list(range(5))}, {"input": 5}])
    assert [answer.json["output"] for answer in answers] == [[0, 1, 2, 3, 4], 5]
    assert gate.batches == [["first"], [0, 1, 2], [3, 4, 5]]


def test_inputs_of_unlike_length_do_not_pad_each_other(make_app, gated, gate):
    class Sized(Echo):
        def size(self, value, options):
            return len(value)

    app = make_app([gated(Sized)])
    texts = ["x" * 100, *["a"] * 8, *["y" * 90] * 2]
    answers = queue_up(app, gate, [{"input": text} for text in texts])
    assert [answer.json["output"] for answer in answers] == texts
    assert gate.batches == [["first"], [*["y" * 90] * 2, "x" * 100], ["a"] * 8]


def test_a_padded_batch_stays_under_its_token_limit(make_app, gated, gate):
    class Sized(Echo):
        max_batch_tokens = 100

        def size(self, value, options):
            return 40

    app = make_app([gated(Sized)])
    queue_up(app, gate, [{"input": i} for i in range(5)])
    assert gate.batches == [["first"], [0, 1], [2, 3], [4]]


def test_one_bad_input_never_fails_its_neighbours(make_app, gated, gate):
    class RaisesOnBad(Echo):
        def predict(self, batch):
            if "bad" in batch.inputs:
                raise RuntimeError("cannot take that")
            return super().predict(batch)

    app = make_app([gated(RaisesOnBad)])
    calls = [{"input": value} for value in ("a", "bad", "b", "c")]
    answers = queue_up(app, gate, calls)
    assert [answer.status_code for answer in answers] == [200, 500, 200, 200]
    assert [answer.json.get("output") for answer in answers] == ["a", None, "b", "c"]
    assert "cannot take that" not in answers[1].text


def test_an_adapter_may_refuse_one_input_of_a_callers_batch_by_its_place(make_app, add_task):
    class RefusesTwo(Echo):
        def predict(self, batch):
            refusal = InvalidRequest.of({"input": "must not be 2"})
            return [refusal if value == 2 else Prediction(value) for value in batch.inputs]

    client = make_app([add_task("refuses", RefusesTwo)]).test_client()
    answer = run(client, "refuses", [1, 2, 3, 2])
    assert answer.status_code == 400
    assert answer.json["error"]["details"] == {
        "input[1]": "must not be 2",
        "input[3]": "must not be 2",
    }
    assert run(client, "refuses", 2).json["error"]["details"] == {"input": "must not be 2"}


def test_seeds_may_differ_within_a_batch(make_app, gated, gate):
    class Seeded(type(TASKS["echo"].options())):
        seed = Integer(low=0, high=2**32 - 1, load_default=None, allow_none=True)
        loud = Boolean(load_default=False)

    class TellsSeeds(Echo):
        def predict(self, batch):
            return [Prediction(seed) for seed in batch.seeds]

    app = make_app([gated(TellsSeeds, options=Seeded)])
    calls = [{"options": {"seed": 7}}, {"options": {"seed": 9}, "input": [0, 0]}, {}]
    one, two, drawn = queue_up(app, gate, calls)
    assert (one.json["output"], one.json["metadata"]["seed"]) == (7, 7)
    assert (two.json["output"], two.json["metadata"]["seed"]) == ([9, 10], [9, 10])
    assert drawn.json["output"] == drawn.json["metadata"]["seed"]
    assert drawn.json["metadata"]["options"]["seed"] == drawn.json["metadata"]["seed"]
    assert len(gate.batches) == 2


# Failing


class RaisesInPredict(Echo):
    def predict(self, batch):
        raise RuntimeError("secret")


class DropsAnOutput(Echo):
    def predict(self, batch):
        return super().predict(batch)[:-1]


class GivesTheWrongThing(Echo):
    def predict(self, batch):
        return ["not a prediction"] * len(batch)


class ExitsItsThread(Echo):
    def predict(self, batch):
        raise SystemExit("secret")


@pytest.mark.parametrize(
    ("adapter", "status", "code"),
    [
        pytest.param(RaisesInPredict, 500, "INTERNAL_ERROR", id="raises-in-predict"),
        pytest.param(DropsAnOutput, 500, "INTERNAL_ERROR", id="drops-an-output"),
        pytest.param(GivesTheWrongThing, 500, "INTERNAL_ERROR", id="gives-the-wrong-thing"),
        pytest.param(ExitsItsThread, 503, "MODEL_UNAVAILABLE", id="exits-its-thread"),
    ],
)
def test_each_way_to_fail_has_its_answer(make_app, add_task, adapter, status, code):
    client = make_app([add_task("fails", adapter), ECHO]).test_client()
    for body in ("x", ["x", "y"]):
        answer = run(client, "fails", body)
        assert (answer.status_code, answer.json["error"]["code"]) == (status, code)
        assert "secret" not in answer.text
    assert run(client, "echo").status_code == 200


def test_a_model_that_hangs_is_a_504_and_the_other_models_go_on(make_app, gated, gate):
    app = make_app([gated(), ECHO], request_timeout_s=0.3)
    for _ in range(2):
        answer = call(app)
        assert (answer.status_code, answer.json["error"]["code"]) == (504, "TIMEOUT_ERROR")
    assert run(app.test_client(), "echo").status_code == 200


def test_an_adapter_that_exits_slowly_does_not_hold_up_the_end(make_app, add_task):
    gate = threading.Event()

    class ExitsSlowly(Echo):
        def unload(self):
            assert gate.wait(20)

    app = make_app([add_task("exits-slowly", ExitsSlowly)])
    assert run(app.test_client(), "exits-slowly").status_code == 200
    started = time.monotonic()
    app.extensions["crane"].engine._engine.close(timeout_s=0.3)
    assert time.monotonic() - started < 2
    gate.set()


def test_work_that_is_queued_when_the_engine_closes_is_still_answered(make_app, gated, gate):
    app = make_app([gated()])
    engine = app.extensions["crane"].engine
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(call, app, 0)]
        gate.wait_until_busy()
        answers.append(threads.submit(call, app, 1))
        wait_for_queue(app, 1)
        closing = threads.submit(engine.close)
        while call(app, 2).status_code == 200:
            pass
        refused = call(app, 3)
        gate.open()
        assert [answer.result().json["output"] for answer in answers] == [0, 1]
        closing.result()
    assert (refused.status_code, refused.json["error"]["code"]) == (503, "MODEL_UNAVAILABLE")


# Letting go


@pytest.fixture
def stopped():
    """How many inputs of a model were stopped since the test began: ``(queued, running)``."""

    def count(model_id, where):
        return metrics.CANCELLED.labels(model_id, where)._value.get()

    before = {where: count("gated", where) for where in ("queued", "running")}
    return lambda: tuple(int(count("gated", where) - before[where]) for where in before)


def test_what_a_deadline_stops_is_counted_by_where_it_was(make_app, gated, gate, stopped):
    app = make_app([gated()], request_timeout_s=0.3)
    with ThreadPoolExecutor(2) as threads:
        held = threads.submit(call, app, [1, 2])
        gate.wait_until_busy()
        assert call(app, [3, 4, 5]).status_code == 504
        assert held.result().status_code == 504
        gate.open()
    assert call(app, "next").status_code == 200
    assert gate.batches == [[1, 2], ["next"]]
    wait_for(lambda: stopped() == (3, 2))


def test_the_rest_of_a_batch_that_runs_in_parts_never_starts(make_app, gated, gate, stopped):
    class Sized(Echo):
        def size(self, value, options):
            return len(value)

    app = make_app([gated(Sized)], request_timeout_s=0.3)
    assert call(app, ["short", "long" * 100]).status_code == 504
    gate.open()
    assert call(app, "next").status_code == 200
    assert gate.batches == [["short"], ["next"]]
    wait_for(lambda: stopped() == (1, 1))


def test_of_a_batch_that_failed_what_nobody_waits_for_is_not_tried_again(
    make_app, gated, gate, stopped
):
    class FailsTogether(Echo):
        def predict(self, batch):
            if len(batch) > 1:
                raise RuntimeError
            return super().predict(batch)

    app = make_app([gated(FailsTogether)])
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(call, app, "first")
        gate.wait_until_busy()
        engine = app.extensions["crane"].engine
        options = {"delay_ms": 0}
        leaver = engine._submit(
            Call(
                request_id="leaver",
                model_id="gated",
                inputs=["leaves"],
                options=options,
                seeds=None,
                timeout_s=60,
            )
        )
        stays = threads.submit(call, app, "stays", options=options)
        wait_for_queue(app, 2)
        gate.on_batch = lambda batch: len(batch) == 2 and engine._cancel(leaver)
        gate.open()
        assert stays.result().json["output"] == "stays"
        assert first.result().status_code == 200
    assert gate.batches == [["first"], ["leaves", "stays"], ["stays"]]
    wait_for(lambda: stopped() == (0, 1))


def test_what_is_told_to_have_used_nothing_never_begins(make_app, gated, gate):
    app = make_app([gated()])
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(call, app, "first")
        gate.wait_until_busy()
        engine = app.extensions["crane"].engine
        leaver = engine._submit(
            Call(
                request_id="leaver",
                model_id="gated",
                inputs=["leaves"],
                options={"delay_ms": 0},
                seeds=None,
                timeout_s=60,
            )
        )
        wait_for_queue(app, 1)
        assert engine._used(leaver) is None
        gate.open()
        assert first.result().status_code == 200
    assert call(app, "next").status_code == 200
    assert gate.batches == [["first"], ["next"]]


# Limits


def test_a_full_queue_says_so_at_once_and_takes_work_again_later(make_app, gated, gate):
    app = make_app([gated()], queue_size=4, max_batch=4)
    with ThreadPoolExecutor(4) as threads:
        held = threads.submit(call, app, 0)
        gate.wait_until_busy()
        queued = threads.submit(call, app, [1, 2, 3])
        wait_for_queue(app, 3)
        refused = call(app, [4, 5])
        gate.open()
        assert (held.result().json["output"], queued.result().json["output"]) == (0, [1, 2, 3])
    assert (refused.status_code, refused.json["error"]["code"]) == (503, "OVERLOADED")
    assert int(refused.headers["Retry-After"]) >= 1
    assert call(app, [4, 5]).json["output"] == [4, 5]
    assert [4, 5] not in gate.batches[:-1]


def test_queued_work_past_its_deadline_never_runs(make_app, gated, gate):
    app = make_app([gated()], request_timeout_s=0.3)
    with ThreadPoolExecutor(2) as threads:
        held = threads.submit(call, app, "held")
        gate.wait_until_busy()
        assert call(app, "late").status_code == 504
        gate.open()
        assert held.result().status_code == 504
    assert call(app, "next").status_code == 200
    assert gate.batches == [["held"], ["next"]]


def test_a_call_past_its_deadline_frees_its_place(make_app, gated, gate):
    app = make_app(
        [gated()],
        queue_size=2,
        max_batch=2,
        request_timeout_s=0.5,
    )
    with ThreadPoolExecutor(4) as threads:
        held = threads.submit(call, app, 0)
        gate.wait_until_busy()
        late = call(app, [1, 2])
        assert (late.status_code, late.json["error"]["code"]) == (504, "TIMEOUT_ERROR")
        # The model is still busy with 0, but the places of 1 and 2 are free.
        fresh = threads.submit(call, app, [3, 4])
        wait_for_queue(app, 2)
        assert not fresh.done()
        gate.open()
        assert held.result().status_code == 504
        assert fresh.result().json["output"] == [3, 4]
    assert gate.batches == [[0], [3, 4]]


def test_a_running_call_that_nobody_waits_for_stops(make_app):
    client = make_app(request_timeout_s=0.3).test_client()
    assert run(client, "echo", "slow", options={"delay_ms": 60_000}).status_code == 504
    started = time.monotonic()
    deadline = started + 5
    while run(client, "echo", "quick").status_code != 200:
        assert time.monotonic() < deadline


# Extending


def test_a_task_and_a_model_added_in_a_test_answer_over_http(make_app, monkeypatch):
    from backend.schemas import Text
    from backend.tasks import Task

    class ReverseOptions(Options):
        times = Integer(low=1, high=3, load_default=1)

    class Reverse(Adapter):
        def load(self):
            self.device, self.dtype = "cpu", "none"

        def predict(self, batch):
            return [Prediction(text[::-1] * batch.options["times"]) for text in batch.inputs]

    task = Task(
        name="reverse",
        input=Text(),
        options=ReverseOptions,
        output="the text from its end",
        example=("abc", {"times": 2}),
        weights=False,
    )
    monkeypatch.setitem(TASKS, "reverse", task)
    monkeypatch.setitem(ADAPTERS, "reverse", Reverse)
    client = make_app([{"id": "mirror", "type": "reverse", "limits": {"times": 2}}]).test_client()
    assert run(client, "mirror", ["abc", "de"]).json["output"] == ["cba", "ed"]
    assert run(client, "mirror", "abc", options={"times": 2}).json["output"] == "cbacba"
    assert run(client, "mirror", "abc", options={"times": 3}).status_code == 400
    assert run(client, "mirror", 5).status_code == 400
    shown = client.get("/crane/models/mirror").json
    assert shown["options"]["times"] == {"type": "integer", "default": 1, "min": 1, "max": 2}
    assert client.post("/crane/run", json=shown["example"]).json["output"] == "cbacba"
