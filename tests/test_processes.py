"""Crane under real gunicorn: several HTTP workers, one engine, and what happens when one dies."""

from __future__ import annotations


def test_gunicorn_answers(gunicorn):
    server = gunicorn()
    assert server.run(input="hi")[1]["output"] == "hi"
