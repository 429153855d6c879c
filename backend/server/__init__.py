"""The HTTP worker: gunicorn's threads behind a poller that alone waits for clients' bytes."""
