"""Calls of pipelines that read: texts, documents, tables, and what is to be decided."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

from backend.adapters.generic_base import Answer, count_tokens
from backend.adapters.long_texts import or_more, readable
from backend.adapters.transformers_base import model_window, too_long
from backend.adapters.vision_base import as_picture
from backend.errors import InvalidRequest

# Of a table for each token of the window. Its tokenizer is written in Python: a million take
# seconds, in which no other model of the engine goes on.
CELL_CHARACTERS = 256


def text_features(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    window = model_window(pipeline.model, pipeline.tokenizer)
    value = readable(value, window, pipeline.tokenizer)
    tokens = count_tokens(pipeline, value)
    if window is None or tokens <= window:
        return pipeline(value, return_tensors=True)[0], {}
    if not options["truncate"]:
        raise too_long(tokens, window)
    how = {"truncation": True, "max_length": window}
    return pipeline(value, return_tensors=True, tokenize_kwargs=how)[0], {"truncated": True}


def ask_document(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    height, width = value["image"].shape[:2]
    words = value["words"]
    asked = {"image": as_picture(value["image"], "input.image"), "question": value["question"]}
    if "VISION" in pipeline.model_type.name.upper():  # Donut, which reads for itself
        if words is not None:
            raise InvalidRequest.of({"input.words": "is not something this model can be asked"})
        return pipeline(asked, top_k=options["top_k"]), {}
    if words is None and importlib.util.find_spec("pytesseract") is None:
        fault = "is missing: this model is told the words of the picture, and where they are"
        raise InvalidRequest.of({"input.words": fault})
    window = model_window(pipeline.model, pipeline.tokenizer)
    stride = min((window or 512) // 2, 256)
    if window is not None:
        # Beside the question, a part of the words must go in that goes past the last part's end.
        special = pipeline.tokenizer.num_special_tokens_to_add(pair=True)
        question = readable(value["question"], window, pipeline.tokenizer, at="input.question")
        bare = len(pipeline.tokenizer(question, add_special_tokens=False)["input_ids"])
        if bare > (most := window - special - stride - 1):
            count = or_more(bare, window)
            fault = f"has {count} tokens and the model reads {most} of a question; shorten it"
            raise InvalidRequest.of({"input.question": fault})
    if words is not None:
        asked["word_boxes"] = [
            (word["text"], _thousandths(word["box"], width, height, place))
            for place, word in enumerate(words)
        ]
    names = ("top_k", "max_answer_len", "handle_impossible_answer")
    how = {name: options[name] for name in names}
    return pipeline(asked, max_seq_len=window or 512, doc_stride=stride, **how), {}


def _thousandths(box: list[float], width: int, height: int, place: int) -> list[int]:
    if box[2] > width or box[3] > height:
        fault = f"is beyond the picture, which is {width} x {height} pixels"
        raise InvalidRequest.of({f"input.words[{place}].box": fault})
    sides = (width, height, width, height)
    return [int(1000 * at / side) for at, side in zip(box, sides, strict=True)]


def ask_table(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    pandas = importlib.import_module("pandas")
    columns, rows, question = value["table"]["columns"], value["table"]["rows"], value["question"]
    kept, tokens = _rows_that_fit(pipeline, columns, rows, question)
    window = model_window(pipeline.model, pipeline.tokenizer) or 0
    over = tokens > window or kept < len(rows)
    if over and not options["truncate"]:
        fault = f"must have {kept} items at most for this model, not {len(rows)}"
        if tokens > window:
            fault = f"has {tokens} tokens or more and the model's window is {window}"
        at = "input.table" if tokens > window else "input.table.rows"
        raise InvalidRequest.of({at: f"{fault}; shorten it, or set options.truncate to true"})
    # Without the others: the model is told a number's rank among those of its column.
    table = pandas.DataFrame(rows[:kept], columns=columns)
    how = "drop_rows_to_fit" if over else "do_not_truncate"
    answer = pipeline({"table": table, "query": question}, truncation=how)
    return answer, {"truncated": True} if over else {}


def _rows_that_fit(
    pipeline: Any, columns: list[str], rows: list[list[str]], question: str
) -> tuple[int, int]:
    """How many rows TAPAS reads, with a token of each cell at least; and the tokens up to there.

    Its tokenizer finds that out too, in a time that grows with the square of the rows, and gives
    none where none fits. Raises ``InvalidRequest`` then.
    """
    tokenizer = pipeline.tokenizer
    if len(columns) >= tokenizer.max_column_id:
        fault = f"must have {tokenizer.max_column_id - 1} items at most for this model"
        raise InvalidRequest.of({"input.table.columns": f"{fault}, not {len(columns)}"})
    window = model_window(pipeline.model, tokenizer) or 0
    question = readable(
        question, window, tokenizer, at="input.question", tokenize=tokenizer.tokenize
    )
    tokens = least = asked = len(tokenizer.tokenize(question)) + 2
    kept = -1  # the columns' names are a row too
    characters = 0
    for row in [columns, *rows[: tokenizer.max_row_id - 1]]:
        characters += sum(map(len, row))
        if characters > (most := CELL_CHARACTERS * window):
            fault = f"has over {most} characters in its first {kept + 1} rows, with the columns'"
            raise InvalidRequest.of({"input.table": f"{fault} names; shorten them"})
        counts = [len(tokenizer.tokenize(cell)) for cell in row]
        tokens += sum(counts)
        least += sum(map(bool, counts))
        if least > window:
            break
        kept += 1
    if kept < 1:
        fault = f"has {len(columns)} columns, of which not one row fits beside the question"
        raise InvalidRequest.of({"input.table": f"{fault}: the model's window is {window} tokens"})
    if tokens == asked:
        raise InvalidRequest.of({"input.table": "has nothing in it"})
    return kept, tokens


def decide(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    questions = {}
    for place, question in enumerate(value["questions"]):
        kind, choices = question["type"], question["options"]
        known = pipeline.decision_config.labels.get(kind)
        most = len(known) if known else 26
        if choices is not None and len(choices) > most:
            fault = f"must have {most} items at most for this model, not {len(choices)}"
            raise InvalidRequest.of({f"input.questions[{place}].options": fault})
        asked = {"type": kind, "instructions": question["instructions"]}
        if kind == "choice":
            asked["criteria"] = dict.fromkeys(choices)
        elif kind == "score":
            asked["criteria"] = choices
        questions[question["name"]] = asked
    window = model_window(pipeline.model, pipeline.tokenizer)
    part = readable(value["state"], window, pipeline.tokenizer, at="input.state")
    inputs = pipeline.preprocess({"state": part, "questions": questions})
    tokens = max(prompt["input_ids"].shape[-1] for prompt, _ in inputs["prompts"])
    if window is not None and tokens > window:
        count = or_more(tokens, window)
        fault = f"has {count} tokens with its longest question and the model's window is {window}"
        raise InvalidRequest.of({"input.state": f"{fault}; shorten it"})
    return pipeline.postprocess(pipeline.forward(inputs)), {}
