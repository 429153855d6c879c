"""What may import what: libraries stay where they are known, and layers point one way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom up: a module imports from its own layer and from those above it in this table.
LAYERS = [
    [
        "backend.bounds",
        "backend.cores",
        "backend.engine.libraries",
        "backend.engine.load_turns",
        "backend.engine.turns",  # a load takes turns too
        "backend.errors",
        "backend.fair_lock",
        "backend.headers",
        "backend.logs",
        "backend.lookups",
        "backend.media",
        "backend.metrics",
        "backend.pacing",
        "backend.private",
        "backend.schema_faults",
        "backend.schema_process",
        "backend.sse",
        "backend.tool_calls",
    ],
    ["backend.held_bodies", "backend.messages", "backend.replies", "backend.data_folder"],
    ["backend.channel"],
    ["backend.media.fetch", "backend.quota.tiers"],
    ["backend.quota", "backend.quota.costs", "backend.quota.decisions"],
    ["backend.quota.memory", "backend.quota.redis", "backend.quota.sqlite"],
    ["backend.quota.failover"],
    ["backend.key_text", "backend.migrations", "backend.migrations.versions.*"],
    ["backend.config", "backend.schemas", "backend.postgres"],
    ["backend.migrations.upgrade"],
    ["backend.migrations.ready"],
    ["backend.store"],
    ["backend.keys", "backend.meter"],
    ["backend.locality"],
    ["backend.browsers"],
    ["backend.callers", "backend.charges", "backend.permits"],
    ["backend.media.bounds", "backend.media.containers"],
    ["backend.media.parts", "backend.media.sound_kinds"],
    ["backend.media.audio", "backend.media.images", "backend.media.meshes", "backend.media.video"],
    ["backend.media.decoder", "backend.media.decoders"],
    ["backend.media.reader"],
    ["backend.tasks.*"],
    ["backend.registry"],
    ["backend.adapters.*"],
    ["backend.engine.*"],
    ["backend.inputs", "backend.receipts"],
    ["backend.models"],
    ["backend.visibility"],
    ["backend.openai.*"],
    ["backend.server.*"],
    ["backend.bodies", "backend.http", "backend.quota_api", "backend.ops_api"],
    ["backend.answers"],
    ["backend.crane_api"],
    ["backend.cli", "backend.openai_api"],
    ["backend"],
]
MODEL_LIBRARIES = {
    "torch",
    "transformers",
    "diffusers",
    "sentence_transformers",
    "huggingface_hub",
    "accelerate",
    "tokenizers",
    "safetensors",
}
DATABASE_LIBRARIES = {"sqlalchemy", "alembic", "psycopg"}
WEB_LIBRARIES = {"flask", "flask_cors", "werkzeug"}


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted((ROOT / "backend").rglob("*.py"))}


def layer_of(module):
    def fits(pattern):
        if pattern.endswith(".*"):
            return module == pattern[:-2] or module.startswith(pattern[:-1])
        return module == pattern or (
            pattern == "backend.*_api" and module.endswith("_api") and module.count(".") == 1
        )

    exactly = [place for place, layer in enumerate(LAYERS) if module in layer]
    found = exactly or [place for place, layer in enumerate(LAYERS) if any(map(fits, layer))]
    assert len(found) == 1, f"{module} is in {len(found)} layers of the table above"
    return found[0]


def imports(module):
    """Every import of a module: ``(name, where)``; where is top, function or typing."""
    found = []

    def visit(node, where):
        if isinstance(node, ast.Import):
            found.extend((alias.name, where) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively, which this test cannot follow"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inner if name in MODULES]
            whole = [] if len(modules) == len(inner) else [node.module]
            found.extend((name, where) for name in [*modules, *whole])
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            where = "typing"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            where = "function" if where == "top" else where
        for child in ast.iter_child_nodes(node):
            visit(child, where)

    visit(ast.parse(MODULES[module].read_text()), "top")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_nothing_above_it(module):
    above = [
        name
        for name, where in imports(module)
        if name in MODULES and where != "typing" and layer_of(name) > layer_of(module)
    ]
    assert above == []


@pytest.mark.parametrize("module", MODULES)
def test_flask_is_known_only_where_http_is_spoken(module):
    known = {name for name, _ in imports(module) if name.split(".")[0] in WEB_LIBRARIES}
    names = ("backend", "backend.bodies", "backend.http", "backend.answers", "backend.cli")
    speaks_http = module in names
    assert not known or speaks_http or module.endswith("_api")


@pytest.mark.parametrize("module", MODULES)
def test_model_libraries_are_imported_only_where_weights_load(module):
    used = [
        (name, where) for name, where in imports(module) if name.split(".")[0] in MODEL_LIBRARIES
    ]
    if not module.startswith(("backend.adapters.", "backend.engine.")):
        assert used == []
    assert [name for name, where in used if where == "top"] == []


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"backend.engine.libraries"}))
def test_nobody_else_looks_for_modules_that_may_be_half_imported(module):
    assert "sys.modules" not in MODULES[module].read_text()


@pytest.mark.parametrize("module", MODULES)
def test_nobody_seeds_the_random_state_that_all_models_share(module):
    source = MODULES[module].read_text()
    assert not re.search(r"(?<!`)torch(\.cuda)?\.manual_seed\(|set_seed\(|fork_rng", source)


@pytest.mark.parametrize("module", MODULES)
def test_the_database_is_known_only_to_the_store_and_its_migrations(module):
    known = {(name.split(".")[0], where) for name, where in imports(module)}
    used = {(name, where) for name, where in known if name in DATABASE_LIBRARIES}
    allowed = {"backend.store": "sqlalchemy", "backend.postgres": "psycopg"}
    if not module.startswith("backend.migrations."):
        assert {name for name, _ in used} <= {allowed.get(module)}


def imported_by(code):
    """The top-level names in ``sys.modules`` of a fresh interpreter that has run ``code``."""
    shown = f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", shown], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_crane_imports_no_model_library():
    known = imported_by("import backend")
    assert not known & (MODEL_LIBRARIES | WEB_LIBRARIES | DATABASE_LIBRARIES)


def test_a_service_that_lists_its_models_and_says_it_lives_imports_no_model_library(tmp_path):
    code = (
        "from pathlib import Path\n"
        "from backend import create_app\n"
        "from backend.config import Config\n"
        f"client = create_app(Config(data_dir=Path({str(tmp_path)!r}))).test_client()\n"
        "for path in ('/livez', '/readyz', '/crane/models'):\n"
        "    assert client.get(path).status_code == 200\n"
        "wrong = {'model_id': 'text-summarizer-v1', 'input': ''}\n"
        "assert client.post('/crane/run', json=wrong).status_code == 400\n"
        "echo = {'model_id': 'echo', 'input': 1}\n"
        "assert client.post('/crane/run', json=echo).status_code == 200\n"
    )
    assert not imported_by(code) & (MODEL_LIBRARIES | DATABASE_LIBRARIES)


def test_the_engine_and_its_supervisor_start_without_flask_and_without_a_model_library():
    code = "import backend.engine.server, backend.engine.supervisor"
    assert not imported_by(code) & (MODEL_LIBRARIES | WEB_LIBRARIES)


def test_gunicorns_master_imports_neither_the_app_nor_a_model_library():
    known = imported_by("import runpy; runpy.run_path('gunicorn.conf.py')")
    assert not known & (MODEL_LIBRARIES | WEB_LIBRARIES)
