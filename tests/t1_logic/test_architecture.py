"""Rules of the code that a reader would otherwise have to check: who imports whom, sizes, docstrings, no prints.

A number in a ratchet table is the present size of an exception; lower it when the code gets smaller, never raise it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import pylitefs

ROOT = Path(pylitefs.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

MAX_FUNCTION_LINES = 70
MAX_CORE_LINES = 400  # formats and engine
MAX_LINES = 600

LONG_CORE: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}

# Lowest first: a package may import from those before it. Packages of one layer do not import each other.
LAYERS: list[set[str]] = [
    {"errors"},
    {"formats", "backup_into", "close_wal", "die_with_parent", "mount_guard", "pid_one"},
    {"config_env", "config_yaml"},
    {"config_values"},
    {"config_lease"},
    {"events", "ports", "config"},
    {"status", "supervise"},
    {"engine", "observability"},
    {"filesystem", "cluster"},
    {"lease", "halt_lock"},
    {"http"},
    {"role_hooks", "mistaken"},
    {"node"},
    {"node_control"},
    {"daemon"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PURE = {
    "__future__", "abc", "array", "bisect", "collections", "dataclasses", "enum", "functools", "heapq", "itertools",
    "math", "re", "string", "struct", "types", "typing", "numpy", "lz4", "fastcrc",
}  # fmt: skip


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever it does; also for type checking only."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: a relative import"
            assert node.module is not None
            if node.module == "pylitefs":
                yield from (f"pylitefs.{alias.name}" for alias in node.names)
            else:
                yield node.module


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def parametrized(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=name_of)


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 60


@parametrized([path for path in MODULES if package_of(path) == "formats"])
def test_formats_are_pure(path: Path) -> None:
    for module in imports(path):
        first = module.split(".")[0]
        if first == "pylitefs":
            assert module == "pylitefs.errors" or module.startswith("pylitefs.formats"), module
        else:
            assert first in PURE or module == "sys", module
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module == "sys":
            assert [alias.name for alias in node.names] == ["byteorder"]
        assert not (isinstance(node, ast.Import) and any(alias.name == "sys" for alias in node.names))
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Name):
            assert node.id not in ("open", "input", "eval", "exec"), f"line {node.lineno}: {node.id}"


@parametrized([path for path in MODULES if name_of(path) != "__init__.py"])
def test_imports_go_one_way(path: Path) -> None:
    package = package_of(path)
    assert package in LEVEL, f"{package}: give it a place in LAYERS"
    for module in imports(path):
        parts = module.split(".")
        if parts[0] != "pylitefs" or len(parts) == 1 or parts[1] == "__version__":
            continue
        other = parts[1]
        if other == package:
            continue
        assert LEVEL[other] < LEVEL[package], f"{name_of(path)} imports {module}"


def test_the_two_middle_packages_do_not_know_each_other() -> None:
    for path in MODULES:
        for one, other in (("filesystem", "cluster"), ("cluster", "filesystem")):
            if package_of(path) == one:
                assert not [module for module in imports(path) if module.startswith(f"pylitefs.{other}")]


def test_only_the_edges_know_their_libraries() -> None:
    """aiohttp belongs to http (and the daemon's clients of it), click and rich to the command line."""
    for path in MODULES:
        found = {module.split(".")[0] for module in imports(path)}
        if package_of(path) in ("formats", "engine", "filesystem", "cluster"):
            assert not found & {"aiohttp", "click", "rich", "yaml", "prometheus_client"}, name_of(path)
        if package_of(path) not in ("cli", "__main__"):
            assert not found & {"click", "rich"}, name_of(path)


@parametrized(MODULES)
def test_modules_are_short(path: Path) -> None:
    core = package_of(path) in ("formats", "engine")
    limit = LONG_CORE.get(name_of(path), MAX_CORE_LINES if core else MAX_LINES)
    assert len(path.read_text().splitlines()) <= limit


def test_the_ratchet_tables_have_no_dead_entries() -> None:
    for name in LONG_CORE:
        assert len((ROOT / name).read_text().splitlines()) > MAX_CORE_LINES, f"{name} fits now: remove it"
    known = {f"{name_of(path)}:{node.name}" for path in MODULES for node in functions(path)}
    assert set(LONG_FUNCTIONS) <= known


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@parametrized(MODULES)
def test_functions_are_short(path: Path) -> None:
    for node in functions(path):
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        limit = LONG_FUNCTIONS.get(f"{name_of(path)}:{node.name}", MAX_FUNCTION_LINES)
        assert lines <= limit, f"{node.name}: {lines} lines"


PROGRAMS = ("cli", "backup_into", "close_wal", "die_with_parent", "mount_guard")


@parametrized([path for path in MODULES if package_of(path) not in PROGRAMS])
def test_nothing_is_printed_outside_the_command_line(path: Path) -> None:
    """`die_with_parent` is a program of its own, run by `supervise`."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"


@parametrized(MODULES)
def test_every_module_says_what_it_is(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree) or not tree.body, "no module docstring"


# Classes that their module's docstring or a table beside them explains; do not add to it.
UNDOCUMENTED: dict[str, set[str]] = {
    "cli/demo_cluster.py": {"DemoFailed"},
    "cli/main.py": {"UnknownCommand"},
    "cluster/decisions.py": {"CaughtUp"},
    "cluster/ports.py": {"Closable", "Database", "Store", "Worker"},
    "config.py": {"DataConfig", "FuseConfig", "HttpConfig", "LogConfig"},
    "config_yaml.py": {"Entry", "Mapping", "Scalar", "Sequence"},
    "engine/ltx_log.py": {"LtxLog"},
    "engine/opener.py": {"Opener"},
    "engine/recovery.py": {"Outcome"},
    "engine/store.py": {"Store"},
    "engine/worker.py": {"Worker"},
    "events.py": {"SlowConsumer"},
    "filesystem/notify.py": {"NotifyTarget"},
    "formats/fuse/requests.py": {"Create", "Fallocate", "Init", "Mknod", "Rename"},
    "formats/stream.py": {"Ack", "LtxData"},
    "http/server.py": {"Route"},
}


def undocumented_classes() -> set[str]:
    found = set()
    for path in MODULES:
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                found.add(f"{name_of(path)}:{node.name}")
    # The error tree is drawn and explained once, at the top of its module.
    return {name for name in found if not name.startswith("errors.py:")}


def test_every_public_class_says_what_it_is() -> None:
    known = {f"{module}:{name}" for module, names in UNDOCUMENTED.items() for name in names}
    assert undocumented_classes() <= known


def test_the_standard_library_list_is_what_it_says() -> None:
    third_party = {"numpy", "lz4", "fastcrc"}
    assert PURE - third_party <= sys.stdlib_module_names


# -- an application's files ------------------------------------------------------------------------------------------

# Functions that write, cut off, remove or rename a database, -wal, -shm or -journal that applications use. Why each may
# is in the table "Who writes an application's files" of docs/ARCHITECTURE.md.
LIVE_WRITERS: dict[str, set[str]] = {
    "engine/apply.py": {"Apply.apply"},
    "engine/building.py": {"Building.__exit__", "Building.__init__", "Building.publish", "Building.write"},
    "engine/damage.py": {"mend"},
    "engine/grip.py": {"Grip._clear_journal", "Grip._open"},
    "engine/hooks.py": {"EngineHooks._remove_stillborn", "EngineHooks._write_database", "EngineHooks.write"},
    "engine/leftovers.py": {
        "_play_back", "checkpoint_wal", "forget_journal", "normalise", "remove_wal", "retire_index",
    },
    "engine/aside.py": {"finish_aside"},
    "engine/live_files.py": {"LiveFiles.remove_live_files"},
    "engine/naming.py": {
        "Naming._make_plain", "Naming.emptied", "Naming.finish_promotions",
        "Naming._move_plain",
    },
    "engine/plain_files.py": {"keep_plain", "remove_plain"},
    "engine/plain_imports.py": {"PlainImports.take_journal", "PlainImports.write"},
    "engine/redo.py": {"apply_entries", "forget_redo"},
    "engine/replacement.py": {
        "Replacement.exchange", "Replacement.undo", "_forget_note", "_take_side_files", "forget_moved",
        "link_file",
    },
    "engine/replica_wal.py": {
        "ReplicaWal._backfill", "ReplicaWal._begin_generation", "ReplicaWal._copy_frames", "ReplicaWal._make_empty",
        "ReplicaWal._make_room", "ReplicaWal._publish", "ReplicaWal._set_read_mark", "ReplicaWal._write_run",
        "ReplicaWal._write_wal_header", "ReplicaWal.remove", "ReplicaWal.replace", "ReplicaWal.roll_back",
    },
    "engine/resync.py": {"Resync._finish", "Resync.pages"},
    "engine/shared_wal.py": {"SharedWal._create", "SharedWal.adopt"},
    "engine/startup.py": {
        "Startup._give_back", "Startup._prepare", "Startup._write_boot", "Startup.leave_in_order",
    },
    "engine/store.py": {"Store.unmounted"},
    "engine/takeover.py": {"_give_up_content"},
    "engine/wal_index_rebuild.py": {"_rebuild"},
    "filesystem/files.py": {"FileRequests._fallocate", "FileRequests._truncate", "FileRequests._write"},
    "filesystem/names.py": {
        "NameRequests._make.act", "NameRequests._open_existing.truncate",
        "NameRequests._open_existing.go_on", "NameRequests._rename.act", "NameRequests._unlink.act",
    },
    "mount_guard.py": {"abort", "fail", "forget_pages", "retire_once"},
}  # fmt: skip

# Modules that change files, and none of those: the log, tables, notes, copies, devices.
OTHER_WRITERS = {
    "cluster/tail.py", "daemon.py", "engine/database.py", "engine/files.py", "engine/forgetting.py",
    "engine/incoming.py", "engine/loan.py", "engine/lost.py", "engine/ltx_log.py", "engine/marker.py",
    "engine/page_checksums.py", "engine/registry.py", "engine/reserve.py", "engine/snapshot.py", "engine/soundness.py",
    "engine/spares.py", "engine/tombstones.py", "engine/transaction.py",
    "filesystem/cached_databases.py", "filesystem/device.py", "filesystem/mount.py", "filesystem/rings.py",
    "http/transfers.py", "lease/directory.py",
}  # fmt: skip
CHANGING = {
    "copy_file_range", "ftruncate", "link", "posix_fallocate", "pwrite", "pwritev", "remove", "rename", "replace",
    "sendfile", "truncate", "unlink", "write", "writev",
}  # fmt: skip
LIVE_FILES = {"database", "wal", "shm", "journal", "backing", "live"}


def changes_a_file(node: ast.AST) -> bool:
    """Whether a call changes a file or a name, or a flag says that an open will."""
    if isinstance(node, ast.Attribute):
        return node.attr in ("O_CREAT", "O_TRUNC")
    if not isinstance(node, ast.Call):
        return False
    call = node.func
    if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name):
        module, name = call.value.id, call.attr
        return (
            (module == "os" and name in CHANGING)
            or (module == "shutil" and name in ("copy", "copy2", "copyfile", "move", "rmtree"))
            or (module == "_libc" and name == "fallocate")
        )
    if isinstance(call, ast.Name) and call.id == "open":
        modes = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "mode")]
        return any(isinstance(mode, ast.Constant) and set(str(mode.value)) & set("wax+") for mode in modes)
    return isinstance(call, ast.Name) and call.id == "write_at"


def changers(node: ast.AST, within: tuple[str, ...] = ()) -> Iterator[tuple[str, ast.AST]]:
    """The functions that change files, and the calls."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        inside = (*within, child.name) if named else within  # type: ignore[attr-defined]
        if changes_a_file(child):
            yield ".".join(inside), child
        yield from changers(child, inside)


@parametrized([path for path in MODULES if package_of(path) != "cli"])
def test_only_these_write_an_applications_files(path: Path) -> None:
    found = list(changers(tree_of(path)))
    module = name_of(path)
    if module in OTHER_WRITERS:
        assert found, f"{module} changes no file any more"
        for function, call in found:
            for part in ast.walk(call):
                is_live = isinstance(part, ast.Attribute) and part.attr in LIVE_FILES
                assert not is_live, f"{module}: {function}, line {part.lineno}"  # type: ignore[attr-defined]
    else:
        functions_found = {function for function, _ in found}
        assert functions_found == LIVE_WRITERS.get(module, set()), "add it, with why it is safe, to ARCHITECTURE.md"


def test_the_document_names_all_who_write_an_applications_files() -> None:
    text = (ROOT.parent.parent / "docs" / "ARCHITECTURE.md").read_text()
    table = text.split("## Who writes an application's files")[1].split("\n## ")[0]
    for module in LIVE_WRITERS:
        assert f"`{module}`" in table, module
