"""gunicorn's threaded worker, whose main thread alone waits for clients' bytes.

It reads heads and small bodies, each within its deadline, and hands a connection to a thread once
its request is whole; what a client does not take at once of its response comes back to it. So no
thread waits for a client, but for a body above ``MAX_HELD_BODY``, whose caller has been let in by
then, and for a stream's reader.
"""

from __future__ import annotations

import errno
import select
import selectors
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from gunicorn.errors import ConfigError
from gunicorn.workers.gthread import ThreadWorker

from backend.config import Config
from backend.errors import CraneError, Overloaded
from backend.server.connections import Connection, Limits, State, Waiting, network_of
from backend.server.requests import cut_short, too_slow
from backend.server.sockets import ClientSocket, Unsent, max_files

KEPT_MS = 20  # a client that calls again and again does so sooner
ACCEPT_DELAY_S = 0.00002  # for each connection that a worker has
MAX_ACCEPT_DELAY_S = 0.001
ACCEPTS = 32  # at a time, of many
SWEEP_S = 0.5  # between looks for what is past its deadline
STOP_S = 2.0  # for a request that is on its way as the worker drains
RESERVED_FILES = 128
FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
PROBE = "/livez"
CROWDED = "crowded"
PARTS = (State.HEAD, State.BODY)  # of a request


class Worker(ThreadWorker):  # type: ignore[misc]
    """A worker that answers ``/livez`` whatever its clients and its threads do."""

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        if cfg.is_ssl:
            raise ConfigError("Crane speaks plain HTTP: a proxy before it is to end TLS.")
        super().check_config(cfg, log)

    def init_process(self) -> None:
        config = Config.from_env()
        self.limits = Limits.of(config, self.cfg.keepalive)
        # Behind proxies all connections come from them, and they hold clients to limits.
        self.max_per_address = 0 if config.trusted_proxies else config.max_connections
        # Each thread may have as many files again: of the engines, of media.
        files = max_files() - RESERVED_FILES - 2 * self.cfg.threads
        self.max_connections = max(self.cfg.threads, min(self.worker_connections, files))
        self.unsent = Unsent(config.max_unsent, partial(_count_dropped, CROWDED))
        self.waiting = Waiting()
        self.per_address: dict[str, int] = {}
        self.probes = ThreadPoolExecutor(1, "probe")
        self.next_sweep = 0.0
        super().init_process()

    def run(self) -> None:
        self.poller.register(
            self.method_queue.fileno(), selectors.EVENT_READ, self.method_queue.run_callbacks
        )
        self.set_accept_enabled(True)
        while self.alive and self.is_parent_alive():
            self._turn()
        # As soon as it drains, not when it ends: whoever calls meanwhile is refused, not kept.
        self.set_accept_enabled(False)
        for listener in self.sockets:
            listener.close()
        now = time.monotonic()
        for connection in self.waiting:
            if connection.state in (State.SILENT, State.IDLE):
                connection.deadline = min(connection.deadline, now + STOP_S)
        while self.nr_conns > 0 and time.monotonic() < now + self.cfg.graceful_timeout:
            self._turn()
        self.tpool.shutdown(wait=False)
        self.probes.shutdown(wait=False)
        self.poller.close()
        self.method_queue.close()

    def _turn(self) -> None:
        self.notify()
        for key, _ in self.poller.select(SWEEP_S):
            key.data(key.fileobj)
        now = time.monotonic()
        if now >= self.next_sweep:
            self.next_sweep = now + SWEEP_S
            for connection in self.waiting:
                if connection.deadline <= now:
                    self._guard(self._expire, connection)

    # What follows runs in the main thread, but for ``handle`` and what that calls.

    def accept(self, listener: Any) -> None:
        if self.nr_conns > self.cfg.threads:  # a flood, and whoever stands behind it waits
            for _ in range(ACCEPTS):
                if not self._accept(listener):
                    break
            return
        # All workers hear of a connection, and the one that is quickest takes it: let that be one
        # with few, or a client's whole pool of connections may end in one worker.
        if self.cfg.workers > 1:
            time.sleep(min(self.nr_conns * ACCEPT_DELAY_S, MAX_ACCEPT_DELAY_S))
        self._accept(listener)

    def _accept(self, listener: Any) -> bool:
        """Take one connection; whether there may be another."""
        try:
            accepted, client = listener.accept()
        except OSError as error:
            if error.errno in FULL and (oldest := self.waiting.oldest()):
                self._drop(oldest, CROWDED)
            elif error.errno in FULL:
                time.sleep(MAX_ACCEPT_DELAY_S)  # nothing to close: a thread's end will help
            return False
        sock = ClientSocket(accepted, self.limits.pace, network_of(client), self.unsent)
        connection = Connection(self.cfg, sock, client, listener.getsockname(), self.limits)
        address = connection.address
        self.nr_conns += 1
        self.per_address[address] = self.per_address.get(address, 0) + 1
        own = self._has_too_many(address)
        if own or self.nr_conns > self.max_connections:
            # Close the connection that has waited longest. If all others are at work, the new one
            # may only ask whether the process lives.
            oldest = self.waiting.oldest(address if own else None)
            connection.surplus = oldest is None
            if oldest is not None:
                self._drop(oldest, CROWDED)
        self._guard(self._read, connection)
        return True

    def _has_too_many(self, address: str) -> bool:
        return bool(address) and 0 < self.max_per_address < self.per_address[address]

    def _is_refused(self, connection: Connection) -> bool:
        if not connection.surplus or connection.request is None or _is_probe(connection):
            return False
        return self._has_too_many(connection.address) or self.nr_conns > self.max_connections

    def _read(self, connection: Connection) -> None:
        try:
            ready = connection.receive()
        except EOFError:
            self._cut_short(connection)
        except OSError:
            self._close(connection)
        except Exception as error:
            self._refuse(connection, error)
        else:
            if self._is_refused(connection):
                message = "Too many connections are open; try again in 1 s."
                self._drop(connection, CROWDED, Overloaded(message, retry_after_s=1))
            else:
                self._submit(connection) if ready else self._park(connection)

    def _write(self, connection: Connection) -> None:
        try:
            if connection.flush():
                self._after_response(connection)
        except OSError:
            self._close(connection)

    def _discard(self, connection: Connection) -> None:
        with suppress(OSError):
            if connection.discard():
                return
        self._close(connection)

    def _park(self, connection: Connection) -> None:
        """Have the poller wait for a client."""
        if connection in self.waiting:
            return
        self.waiting.add(connection)
        if connection.state is State.KEPT:
            return
        unsent, closing = (connection.state is s for s in (State.UNSENT, State.CLOSING))
        step = self._write if unsent else self._discard if closing else self._read
        event = selectors.EVENT_WRITE if unsent else selectors.EVENT_READ
        self.poller.register(connection.sock, event, partial(self._if_open, step, connection))

    def _if_open(self, step: Callable[[Connection], None], connection: Connection, _: Any) -> None:
        if not connection.closed:  # since the poller looked
            self._guard(step, connection)

    def _guard(self, step: Callable[[Connection], None], connection: Connection) -> None:
        """Have a fault of ours cost one connection: this thread has them all."""
        try:
            step(connection)
        except Exception:
            self.log.exception("a connection failed")
            self._close(connection)

    def _unpark(self, connection: Connection) -> None:
        if connection in self.waiting:
            self.waiting.remove(connection)
            if connection.state is not State.KEPT:
                self.poller.unregister(connection.sock)

    def _submit(self, connection: Connection) -> None:
        self._unpark(connection)
        # /livez has a thread to itself: it is answered whatever all others wait for.
        pool = self.probes if _is_probe(connection) else self.tpool
        done = pool.submit(self.handle, connection)
        done.add_done_callback(
            lambda future: self.method_queue.defer(self.finish_request, connection, future)
        )

    def finish_request(self, connection: Connection, future: Future[bool]) -> None:
        connection.keep = not future.cancelled() and not future.exception() and future.result()
        self._guard(self._take_back, connection)

    def _take_back(self, connection: Connection) -> None:
        """Take a connection back from its thread."""
        try:
            if not connection.sock.unsent:
                self._after_response(connection, renewed=True)
                return
            connection.wait_for_client_to_take()
            self._park(connection)
        except OSError:
            self._close(connection)

    def _after_response(self, connection: Connection, *, renewed: bool = False) -> None:
        """Go on with the next request, or close; raises ``OSError``."""
        self._unpark(connection)
        if not connection.keep:
            connection.linger()
            self._park(connection)
            return
        try:
            ready = False if renewed else connection.renew()
        except Exception as error:
            self._refuse(connection, error)
            return
        if not self.alive and connection.state is State.IDLE:
            connection.deadline = min(connection.deadline, time.monotonic() + STOP_S)
        self._submit(connection) if ready else self._park(connection)

    def _expire(self, connection: Connection) -> None:
        if connection.state in PARTS:
            self._drop(connection, connection.state, too_slow(connection.state.value))
        elif connection.state is State.UNSENT:
            self._drop(connection, connection.state)
        elif connection.state is State.KEPT:
            self._unpark(connection)
            self._take_back(connection)
        else:
            self._close(connection)

    def _drop(self, connection: Connection, reason: str, error: CraneError | None = None) -> None:
        _count_dropped(reason)
        self._close(connection) if error is None else self._refuse(connection, error)

    def _cut_short(self, connection: Connection) -> None:
        if connection.state in PARTS:
            self._refuse(connection, cut_short(connection.state.value))
        else:
            self._close(connection)

    def _refuse(self, connection: Connection, error: Exception) -> None:
        self._unpark(connection)
        self.handle_error(connection.request, connection.sock, connection.client, error)
        try:
            connection.linger()
        except OSError:
            self._close(connection)
        else:
            self._park(connection)

    def _close(self, connection: Connection) -> None:
        if connection.closed:
            return
        connection.closed = True
        self._unpark(connection)
        connection.sock.close()
        self.nr_conns -= 1
        left = self.per_address.pop(connection.address) - 1
        if left:
            self.per_address[connection.address] = left

    def handle(self, connection: Connection) -> bool:
        """Answer a request, and those that follow at once; whether to keep the connection.

        To hand a connection to the main thread after each response, and then to another thread,
        costs as much as our own work on a call. While there are threads for all connections, one
        stays where it is for a moment.
        """
        while self._answer(connection):
            if connection.sock.unsent:
                return True  # and ``renew`` comes after that
            probe = _is_probe(connection)
            try:
                ready = connection.renew()
                if not ready and not probe and self.nr_conns <= self.cfg.threads and self.alive:
                    waiting = select.poll()
                    waiting.register(connection.sock, select.POLLIN)
                    ready = bool(waiting.poll(KEPT_MS)) and connection.receive()
            except (EOFError, OSError):  # nothing of another request had come
                return False
            except Exception as error:
                self.handle_error(None, connection.sock, connection.client, error)
                return False
            if not ready:
                return True
        return False

    def _answer(self, connection: Connection) -> bool:
        """Run the app; whether the connection can be kept."""
        try:
            connection.sock.hold_head()
            try:
                return bool(self.handle_request(connection.request, connection))
            finally:
                connection.sock.send_head()
        except StopIteration:  # an error after the response had begun, which gunicorn has logged
            return False
        except OSError as error:
            self.log.debug("The client is gone, or too slow: %s", error)
            if isinstance(error, TimeoutError):
                _count_dropped(State.UNSENT)
            connection.sock.close()
            return False
        except Exception as error:
            self.handle_error(connection.request, connection.sock, connection.client, error)
            return False

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        """Answer a request that the app never got."""
        from backend.server.refusals import error_of, refusal  # not in gunicorn's master

        with suppress(OSError):
            client.sendall(refusal(error_of(exc), getattr(req, "path", None)))


def _count_dropped(reason: str) -> None:
    from backend.metrics import CONNECTIONS_DROPPED  # not in gunicorn's master

    CONNECTIONS_DROPPED.labels(reason).inc()


def _is_probe(connection: Connection) -> bool:
    return connection.request is not None and connection.request.path == PROBE
