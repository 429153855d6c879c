"""gunicorn's settings, and the engine's life beside it: ``gunicorn wsgi:app`` reads this file.

The master starts the engine's supervisor before the HTTP workers and ends it after the last of
them has drained. The master itself imports no model library and never touches a GPU.
"""

import math
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from gunicorn import glogging

from backend.config import Config, is_loopback
from backend.cores import allowed, stay_on, take_turns
from backend.data_folder import DataFolderError, make_run_folder, prepare
from backend.engine.devices import found
from backend.logs import logging_config
from backend.private import write_private
from backend.registry import Registry
from backend.server.worker import Worker

HERE = Path(__file__).resolve().parent
# Before a supervisor that has died is started anew, growing where it dies again and again.
SUPERVISOR_PAUSE_S, MAX_SUPERVISOR_PAUSE_S = 0.5, 30.0
SUPERVISOR_END_S = 60.0  # above its own limits, so that it is killed only when stuck
ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

os.environ.setdefault("CRANE_ENGINE", "process")


class Logger(glogging.Logger):
    """gunicorn's own log, less the line a request: Crane writes that, with more in it."""

    def access(self, *args, **kwargs):
        """Without this, ``logconfig_dict`` makes gunicorn format a line that nobody reads."""


try:
    if os.environ["CRANE_ENGINE"] == "process":
        os.environ["CRANE_ENGINE_SOCKET"] = "to be made"
    settings = Config.from_env()
    Registry.load(settings.models)
except ValueError as error:
    sys.exit(str(error))

wsgi_app = "wsgi:app"
bind = settings.bind
workers = settings.workers
worker_class = Worker
# CRANE_THREADS calls at once; a few threads more, so that /livez is answered beside them.
threads = settings.threads + 4
worker_connections = max(1000, 2 * threads)
keepalive = 75  # above the 60 s after which common proxies and clients let go of a connection
# A heartbeat of the worker's main thread, not a limit on requests: that is CRANE_REQUEST_TIMEOUT.
# Under CRANE_ENGINE=inline a load that holds the GIL must not be taken for a hang.
timeout = 300
graceful_timeout = math.ceil(settings.request_timeout_s) + 5
logger_class = Logger
# What a proxy says of a client is CRANE_TRUSTED_PROXIES' to believe. So gunicorn need not look at
# each request's address for whether to believe it what it is told to ignore.
forwarded_allow_ips = "*"
secure_scheme_headers = {}
forwarder_headers = ""
control_socket_disable = True  # its one path per user would be fought over by two services
logconfig_dict = logging_config(settings.log_level, settings.log_format)

_supervisor: subprocess.Popen[bytes] | None = None
_sockets: Path | None = None
_lock: int | None = None  # on the folder above: its inheritors live in it


def with_path(environ):
    return {**environ, "PYTHONPATH": f"{HERE}{os.pathsep}{environ.get('PYTHONPATH', '')}"}


def on_starting(server):
    """Say in a line why the service cannot keep its data, before anything is started."""
    try:
        prepare(settings.data_dir)
    except DataFolderError as error:
        sys.exit(str(error))


def when_ready(server):
    global _supervisor, _sockets, _lock
    take_turns()
    # A reload reads this file anew, and would leave the engine with the settings of before.
    signal.signal(signal.SIGHUP, lambda *_: server.log.warning("HUP is ignored: restart instead"))
    keep_ends_of_new_workers()
    try:
        _sockets, _lock = make_run_folder(settings.data_dir)
    except DataFolderError as error:
        sys.exit(str(error))
    # Where the HTTP workers count together; new at each start, for a counter begins at 0.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(_sockets / "metrics")
    (_sockets / "metrics").mkdir()
    if settings.engine == "process":
        os.environ["CRANE_ENGINE_SOCKET"] = str(_sockets / "engine.sock")
        # What each process would have to find out by itself.
        os.environ["CRANE_DEVICES"] = ",".join(found(settings.devices))
        write_private(
            settings.engine_file, "{CRANE_DEVICES}\n{CRANE_ENGINE_SOCKET}".format(**os.environ)
        )
        _supervisor = start_supervisor()
        keep_supervised(server)
    warn(server)
    greet(server)


def keep_ends_of_new_workers():
    """Have a worker that has just been forked hear that it is to end, once it has its handlers.

    Until then it has the master's, which would put the signal where nobody looks: the master would
    wait for the worker for all of ``graceful_timeout``. ``post_worker_init`` unblocks them.
    """
    master = os.getpid()

    def mask(how):
        if os.getpid() == master:
            signal.pthread_sigmask(how, ENDS)

    os.register_at_fork(
        before=lambda: mask(signal.SIG_BLOCK), after_in_parent=lambda: mask(signal.SIG_UNBLOCK)
    )


def start_supervisor():
    return subprocess.Popen(
        [sys.executable, "-m", "backend.engine.supervisor"],
        stdin=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is for the HTTP workers, which drain first
        env=with_path(os.environ),
        pass_fds=(_lock,),  # engines live in the folder, and may outlive a killed master
    )


def keep_supervised(server):
    """Have the master's loop start another supervisor where the one that there is has died.

    Its engines end by themselves when it does, and the next ones wait for that.
    """
    manage_workers = server.manage_workers
    started_at, pause_s = time.monotonic(), SUPERVISOR_PAUSE_S

    def manage():
        global _supervisor
        nonlocal started_at, pause_s
        manage_workers()
        if lives(_supervisor) or time.monotonic() < started_at + pause_s:
            return
        steady = time.monotonic() - started_at > MAX_SUPERVISOR_PAUSE_S
        pause_s = SUPERVISOR_PAUSE_S if steady else min(2 * pause_s, MAX_SUPERVISOR_PAUSE_S)
        started_at = time.monotonic()
        server.log.error("The engines' supervisor died; starting another")
        _supervisor.stdin.close()
        try:
            _supervisor = start_supervisor()
        except OSError as error:
            server.log.error("It cannot be started: %s", error)

    server.manage_workers = manage


def lives(process):
    """Whether a process reads its standard input still: the master's loop takes exit statuses."""
    if process.stdin.closed:
        return False
    lifeline = select.poll()
    lifeline.register(process.stdin, 0)  # what is told anyway: that nobody can read
    return not lifeline.poll(0)


def warn(server):
    """Name the settings by which one caller can take what is everybody's."""
    if settings.auth == "off":
        server.log.warning("CRANE_AUTH is off: whoever reaches this service may call it")
    for tier in settings.tiers.values():
        if tier.concurrency >= settings.threads:
            server.log.warning(
                "One caller of the tier %r can take all %d calls that an HTTP worker runs at once "
                "(CRANE_THREADS). Lower the tier's concurrency in CRANE_TIERS.",
                tier.name,
                settings.threads,
            )


def greet(server):
    """Print where the service listens, a call to try, and where its first key is."""
    listeners = [listener.sock.getsockname() for listener in server.LISTENERS]
    # Each call is looked at by itself, too; see backend/locality.py.
    needs_keys = settings.auth == "required" or (
        settings.auth == "auto"
        and (settings.trusted_proxies > 0 or not all(map(is_loopback_socket, listeners)))
    )
    file = first_key_file() if needs_keys else ""
    if file:
        print(
            f"\nCallers need an API key here. The first one, an admin's, is in {file}\n"
            "Only this service's user can read that file. Keep the key elsewhere, and delete it."
        )
    scheme = "https" if server.cfg.is_ssl else "http"
    name = listeners[0]
    if isinstance(name, tuple):
        host = f"[{name[0]}]" if ":" in name[0] else name[0]
        address, curl = f"{scheme}://{host}:{name[1]}", "curl"
    else:
        address, curl = f"{scheme}://localhost", f"curl --unix-socket {name}"
    header = "  -H 'Authorization: Bearer YOUR_KEY' \\\n" if needs_keys else ""
    print(
        f"\nCrane listens at {address}. Try it:\n\n"
        f"{curl} {address}/crane/run -H 'Content-Type: application/json' \\\n{header}"
        '  -d \'{"model_id": "text-embedder-v1", "input": "Cranes dance."}\'\n',
        flush=True,
    )


def is_loopback_socket(name):
    return isinstance(name, tuple) and is_loopback(name[0])


def first_key_file():
    """The file with a key, where none was ever made; by a process with a database's client."""
    done = subprocess.run(
        [sys.executable, "-m", "backend.keys"],
        env=with_path(os.environ),
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout.strip()


def pre_fork(server, worker):
    """Give each HTTP worker a core of its own, as far as there are so many.

    Another service on this host begins with another core, most likely.
    """
    cores = sorted(allowed())
    begin = os.getpid() % max(1, len(cores))
    taken = Counter(getattr(other, "core", None) for other in server.WORKERS.values())
    worker.core = min(cores[begin:] + cores[:begin], key=lambda core: taken[core], default=None)


def post_fork(server, worker):
    # Models in the worker itself need all cores.
    if worker.core is not None and settings.engine == "process":
        stay_on(worker.core)
    # The lifeline is the master's alone: a worker that outlives it must not hold it open.
    if _supervisor is not None and not _supervisor.stdin.closed:
        os.close(_supervisor.stdin.fileno())
    # A request asks for twenty settings, and gunicorn looks for each of them by two calls.
    vars(worker.cfg).update({name: each.get() for name, each in worker.cfg.settings.items()})


def post_worker_init(worker):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)


def child_exit(server, worker):
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(worker.pid)


def on_exit(server):
    if _supervisor is not None:
        _supervisor.stdin.close()
        try:
            _supervisor.wait(SUPERVISOR_END_S)
        except subprocess.TimeoutExpired:
            _supervisor.kill()
    if _sockets is not None:
        with suppress(OSError):
            if str(_sockets) in settings.engine_file.read_text():
                settings.engine_file.unlink()
        shutil.rmtree(_sockets, ignore_errors=True)
