"""Crane: one door to any model. ``create_app`` is the one place where the parts meet."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from backend.config import Config


def create_app(config: Config | None = None) -> Flask:
    """Build the service from its settings; raises ``ValueError`` that lists all that is wrong."""
    # Imported here, for the engine's process imports this package too and needs no Flask.
    import atexit

    from flask import Flask

    from backend import bodies, cli, crane_api, http, logs, openai_api, ops_api, quota_api
    from backend.callers import Callers
    from backend.config import Config
    from backend.engine.connect import connect
    from backend.held_bodies import HeldBodies
    from backend.keys import Keys
    from backend.media.reader import MediaReader
    from backend.meter import Meter
    from backend.models import Crane
    from backend.permits import Permits
    from backend.registry import Registry

    config = config or Config.from_env()
    logs.set_up(config.log_level, config.log_format)
    registry = Registry.load(config.models)
    engine = connect(config, registry)
    atexit.register(engine.close)
    keys, meter = Keys(config), Meter(config)

    app = Flask(__name__, static_folder=None)
    # Or /crane//run would be a redirect to whatever host the caller says this is.
    app.url_map.merge_slashes = False
    # Nothing here is async: Flask would look at each hook and view for that, at each request.
    app.ensure_sync = lambda func: func  # type: ignore[method-assign]
    app.config["MAX_CONTENT_LENGTH"] = config.max_body
    app.config["MAX_FORM_MEMORY_SIZE"] = config.max_body  # of a form's fields that are no files
    app.config["MAX_FORM_PARTS"] = bodies.MAX_FORM_PARTS
    app.extensions["crane"] = Crane(
        config=config,
        registry=registry,
        engine=engine,
        media=MediaReader(config),
        callers=Callers(config, keys),
        meter=meter,
        permits=Permits(config.threads),
        bodies=HeldBodies(config.max_bodies),
    )
    if config.trusted_proxies:
        from werkzeug.middleware.proxy_fix import ProxyFix

        # Only the addresses that our own proxies wrote down; what stands before them anybody may.
        app.wsgi_app = ProxyFix(  # type: ignore[method-assign]
            app.wsgi_app, x_for=config.trusted_proxies, x_proto=0, x_host=0
        )
    http.install(app, config)
    quota_api.install(app, {"crane.run": crane_api.read, **openai_api.READERS})
    app.register_blueprint(crane_api.bp)
    app.register_blueprint(openai_api.bp)
    app.register_blueprint(quota_api.bp)
    app.register_blueprint(ops_api.bp)
    app.cli.add_command(cli.crane)
    return app
