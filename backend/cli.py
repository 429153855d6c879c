"""The command line: ``flask --app wsgi crane …``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
from flask.cli import AppGroup

from backend.crane_api import describe
from backend.engine.client import EngineClient
from backend.engine.residency import shown_size
from backend.engine.several import reach
from backend.engine.status import nowhere
from backend.errors import CraneError, KeysUnavailable, did_you_mean
from backend.http import crane as parts
from backend.keys import Key, KeyEnded, Keys, UnknownKey

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

crane = AppGroup("crane", help="What an operator does beside the service, while it runs or not.")
keys = AppGroup("keys", help="API keys: who may call.")
models = AppGroup("models", help="The models of the service that runs on this data folder.")
crane.add_command(keys)
crane.add_command(models)


@keys.command("create")
@click.option("--owner", required=True, help="Whose key it is.")
@click.option("--tier", required=True, help="One of CRANE_TIERS.")
@click.option("--expires", help="After 90m, 12h, 30d or 4w, or at 2030-01-31; else never.")
@click.option("--models", help="The only models it may use: a,b.")
@click.option("--admin", is_flag=True, help="It may load and unload models.")
def create(owner: str, tier: str, expires: str | None, models: str | None, admin: bool) -> None:
    """Make a key, and print it alone on a line: it is shown this once."""
    if not owner.strip() or len(owner) > 200 or not owner.isprintable():
        raise click.ClickException("--owner must be a name of 1 to 200 printable characters")
    tiers = parts().config.tiers
    if tier not in tiers:
        raise click.ClickException(f"there is no tier {tier!r}; it is one of: {', '.join(tiers)}")
    until = None if expires is None else expiry(expires, datetime.now(UTC))
    allowed = None if models is None else known_models(models)
    with opened() as of_service:
        key, text = of_service.create(
            owner=owner, tier=tier, expires_at=until, models=allowed, admin=admin
        )
    click.echo(f"Key {key.id} for {key.owner}; keep it now, it is not shown again:", err=True)
    click.echo(text)


@keys.command("list")
def list_() -> None:
    """Show every key that was ever made, without what would let anybody use it."""
    now = datetime.now(UTC)
    with opened() as of_service:
        rows = [shown(key, now) for key in of_service.list()]
    echo_table(
        ("ID", "OWNER", "TIER", "STATE", "MODELS", "CREATED", "EXPIRES", "LAST USED", "REVOKED"),
        rows,
    )


@keys.command("revoke")
@click.argument("id")
def revoke(id: str) -> None:
    """Make a key stop working, for good."""
    with opened() as of_service:
        key = of_service.revoke(id)
    click.echo(f"Key {key.id} of {key.owner} stops working within 5 s.", err=True)


@keys.command("rotate")
@click.argument("id")
def rotate(id: str) -> None:
    """Give a key a new secret, and print the key alone on a line; the old one stops."""
    with opened() as of_service:
        key, text = of_service.rotate(id)
    click.echo(f"Key {key.id} for {key.owner}; the old one stops within 5 s:", err=True)
    click.echo(text)


@models.command("list")
def list_models() -> None:
    """Show every model and where it stands."""
    with engine() as running:
        states = running.status()["models"]
    rows: list[tuple[str, ...]] = []
    for spec in parts().registry:
        model = states.get(spec.id) or nowhere()
        held, idle_s = model["memory_bytes"], model["idle_s"]
        rows.append(
            (
                spec.id,
                spec.type,
                model["state"] + (", pinned" if spec.pinned else ""),
                ", ".join(copy["device"] for copy in model["copies"] if copy["device"]) or "-",
                "-" if held is None else shown_size(held),
                str(model["queue"]),
                "-" if idle_s is None else f"{idle_s:.0f} s",
            )
        )
    echo_table(("ID", "TASK", "STATE", "DEVICE", "MEMORY", "QUEUE", "IDLE"), rows)


@models.command("inspect")
@click.argument("id")
def inspect(id: str) -> None:
    """Show what GET /crane/models/{id} would, as JSON."""
    with engine() as running:
        spec = parts().registry.get(id)
        shown = describe(spec, running.status()["models"].get(id, {}))
    click.echo(json.dumps(shown, indent=2))


@models.command("load")
@click.argument("id")
def load(id: str) -> None:
    """Load a model, and wait until it is."""
    with engine() as running:
        running.load(parts().registry.get(id).id)
    click.echo(f"{id} is loaded.", err=True)


@models.command("unload")
@click.argument("id")
def unload(id: str) -> None:
    """Unload a model when the calls that it has are done."""
    with engine() as running:
        gone = running.unload(parts().registry.get(id).id)
    click.echo(f"{id} is unloaded." if gone else f"{id} is still in use, and goes then.", err=True)


@contextmanager
def engine() -> Iterator[EngineClient]:
    """The engine of the service that runs on this data folder."""
    config = parts().config
    try:
        devices, socket = config.engine_file.read_text().split("\n")
    except OSError:
        raise click.ClickException(f"no service runs on {config.data_dir}") from None
    config = replace(
        config,
        engine="process",
        engine_socket=Path(socket),
        devices=tuple(devices.split(",")),
    )
    with closing(reach(config, parts().registry)) as found:
        try:
            yield found
        except CraneError as error:
            raise click.ClickException(error.message) from None


def echo_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


@contextmanager
def opened() -> Iterator[Keys]:
    """The service's keys, and one line in place of whatever goes wrong with them."""
    with closing(Keys(parts().config)) as found:
        try:
            yield found
        except UnknownKey as error:
            known = [key.id for key in found.list() if key.revoked_at is None]
            hint = did_you_mean(str(error), known) if len(known) <= 20 else "see keys list"
            raise click.ClickException(f"there is no key {str(error)!r}; {hint}") from None
        except KeyEnded as error:
            raise click.ClickException(f"{error}; make a new one with keys create") from None
        except KeysUnavailable as error:
            raise click.ClickException(str(error.__cause__ or error)) from None


def expiry(text: str, now: datetime) -> datetime:
    """The moment that ``30d`` from now is, or that a date names, at midnight UTC."""
    try:
        if match := re.fullmatch(r"([0-9]{1,9})([mhdw])", text, re.ASCII):
            until = now + timedelta(**{_UNITS[match[2]]: int(match[1])})
        else:
            until = datetime.fromisoformat(text)
            until = until.replace(tzinfo=UTC) if until.tzinfo is None else until.astimezone(UTC)
    except (ValueError, OverflowError):
        raise click.ClickException(
            f"--expires {text!r} must be a time such as 90m, 12h, 30d or 4w, or a date such as "
            f"{now.year + 1}-01-31"
        ) from None
    if until <= now:
        raise click.ClickException(f"--expires {text!r} is not in the future")
    return until


def known_models(text: str) -> list[str]:
    known = [spec.id for spec in parts().registry]
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise click.ClickException(f"--models names none; allowed are: {', '.join(sorted(known))}")
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known, what="allowed are")
            raise click.ClickException(f"--models: there is no model {name!r}; {hint}")
    return names


def shown(key: Key, now: datetime) -> tuple[str, ...]:
    models = "all" if key.models is None else ",".join(sorted(key.models))
    models += " +admin" if key.admin else ""
    times = (key.created_at, key.expires_at, key.last_used_at, key.revoked_at)
    told = (f"{time:%Y-%m-%d %H:%M}" if time else "-" for time in times)
    return (key.id, key.owner, key.tier, key.state(now), models, *told)
