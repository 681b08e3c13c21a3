"""The user's own function from a row to a training row, named `module:function`, or given as it is."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from sftdata.errors import DataError, UsageError
from sftdata.output import counted
from sftdata.sources.chunks import RawRow

Formatter = Callable[[Any], Any]
_Function = TypeVar("_Function", bound=Callable[[Any], object])


def by_columns(formatter: _Function) -> _Function:
    """Mark a formatter that takes a dict of columns and returns a list, one example for each row.

    It is called with one row at a time, so that a bad row costs no other.

    >>> @by_columns
    ... def questions(columns):
    ...     return [{"prompt": q, "completion": a} for q, a in zip(columns["q"], columns["a"])]
    """
    formatter.takes_columns = True  # type: ignore[attr-defined]
    return formatter


_given: dict[str, Formatter] = {}  # by name; functions of this process alone


def name_formatter(formatter: str | Formatter | None) -> tuple[str | None, bool]:
    """Return the name of a formatter, and whether only this process knows it.

    A function that no import finds is named with a hash of its source, so that a set made with other code is
    not resumed; what the function refers to is not hashed.
    """
    if formatter is None or isinstance(formatter, str):
        return formatter, False
    if not callable(cast(object, formatter)):
        what = f"formatter: found {type(formatter).__name__}; expected a function, or its name."
        raise UsageError(what, "give it as it is, or as module:function.")
    module = getattr(formatter, "__module__", "") or ""
    name = getattr(formatter, "__qualname__", type(formatter).__qualname__)
    if module != "__main__" and getattr(sys.modules.get(module), name, None) is formatter:
        return f"{module}:{name}", False
    try:
        source = inspect.getsource(formatter)
    except (OSError, TypeError):
        source = repr(getattr(getattr(formatter, "__code__", None), "co_code", name))
    spec = f"{module}:{name}@{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    _given[spec] = formatter
    load_formatter.cache_clear()
    return spec, True


def formatter_sha256(spec: str) -> str | None:
    """Return the hash of a formatter's code on disk; None if it has no source, or its name holds the hash.

    Raises:
        UsageError: there is no such module, or a package on the way to it fails.
    """
    sources = {} if spec in _given else _read(spec)
    return code_sha256(sources) if sources else None


@lru_cache(maxsize=8)
def load_formatter(spec: str, sha256: str | None = None) -> Formatter:
    """Return the function of that name; modules in the current directory are found too.

    Args:
        sha256: of `formatter_sha256`, what the code must be.

    Raises:
        UsageError: no such module or function, or the module fails to import.
        DataError: the code is another.
    """
    function = _given.get(spec) or _import(spec, sha256)
    return _row_by_row(spec, function) if getattr(function, "takes_columns", False) else function


def _row_by_row(spec: str, function: Formatter) -> Formatter:
    """Call a function of columns with one row at a time, so that a bad row costs no other."""

    def formatter(row: RawRow) -> object:
        row = row if isinstance(row, dict) else {"text": row}
        made = list(function({name: [value] for name, value in row.items()}))
        if len(made) != 1:
            raise ValueError(f"{spec} made {counted(len(made), 'example')} of one row; expected one for each")
        return made[0]

    return formatter


def _read(spec: str) -> dict[str, bytes]:
    """Return the sources of a formatter's module."""
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        what = f"--formatter {spec}: expected module:function."
        raise UsageError(what, "write it as --formatter my_rows:to_messages.")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()  # it may have been written within the second
    with _import_errors(spec):
        return read_code(module_name)


def _import(spec: str, sha256: str | None) -> Formatter:
    module_name, _, function_name = spec.partition(":")
    sources = _read(spec)
    with _import_errors(spec):
        if module_name in sources:
            module = run_code(module_name, sources)
        else:
            module = importlib.import_module(module_name)
    if sha256 is not None and {code_sha256(sources), code_sha256(_read(spec))} != {sha256}:
        what = f"--formatter {spec}: its code changed while it was in use; no set is made with two versions."
        raise DataError(what, "run the same command again.")
    function = getattr(module, function_name, None)
    if not callable(function):
        what = f"--formatter {spec}: {module_name} has no function {function_name!r}."
        raise UsageError(what, "check the name.")
    made: Formatter = function
    return made


@contextmanager
def _import_errors(spec: str) -> Iterator[None]:
    """Turn whatever the user's module raises into one line."""
    module_name = spec.partition(":")[0]
    try:
        yield
    except Exception as error:
        what = f"--formatter {spec}: {module_name} cannot be imported ({type(error).__name__}: {error})."
        raise UsageError(what, f"run from the folder that holds {module_name}.py, or install it.") from None


# ------------------------------------------------------------------------------- the code behind a formatter
#
# Its module and what that imports from beside it, as bytes, so that other code has another hash.

_INSTALLED = ("site-packages", "dist-packages")


def read_code(module: str) -> dict[str, bytes]:
    """Return the source of a module, and of each that it imports, directly or not, from its own folder.

    Installed packages are not followed, nor imports by a name that is only made at run time. A module without
    a source file has none.

    Returns:
        module name -> source, in the order of names; the module itself among them.

    Raises:
        Exception: whatever a package raises on the way to the module.
    """
    spec = find_spec(module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return {}
    root = Path(spec.origin)
    for _ in range(module.count(".") + 1 + (root.name == "__init__.py")):
        root = root.parent
    top = module.partition(".")[0] if root.name in _INSTALLED else None
    sources: dict[str, bytes] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file(root, name)
        if name not in sources and path is not None and top in (None, name.partition(".")[0]):
            sources[name] = path.read_bytes()
            waiting += _imports(
                sources[name], name if path.name == "__init__.py" else name.rpartition(".")[0]
            )
    return dict(sorted(sources.items()))


def code_sha256(sources: dict[str, bytes]) -> str:
    """Return one hash of all sources, hex."""
    whole = hashlib.sha256()
    for name, source in sources.items():
        whole.update(f"{name} {len(source)}\n".encode() + source)
    return whole.hexdigest()


def run_code(module: str, sources: dict[str, bytes]) -> ModuleType:
    """Run a module from the source that was read, whatever of it was imported before, and return it.

    What it imports only when it is called is imported as usual, so in a process that lives on it may be
    outdated.

    Raises:
        Exception: whatever the module raises.
    """
    spec = find_spec(module)
    assert spec is not None
    with _without(sources):
        made = module_from_spec(
            ModuleSpec(module, spec.loader, origin=spec.origin, is_package=_is_package(spec))
        )
        made.__file__ = spec.origin
        if spec.submodule_search_locations is not None:
            made.__path__ = list(spec.submodule_search_locations)
        sys.modules[module] = made
        exec(compile(sources[module], spec.origin or module, "exec"), made.__dict__)
    return made


@contextmanager
def _without(names: dict[str, bytes]) -> Iterator[None]:
    """Let modules be imported anew; leave no compiled copy, which would outlive a change within a second."""
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes
        sys.modules.update(before)


def _is_package(spec: ModuleSpec) -> bool:
    return spec.submodule_search_locations is not None


def _file(root: Path, name: str) -> Path | None:
    path = root.joinpath(*name.split("."))
    return next((found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()), None)


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Yield the absolute names that a source may import: of `from a import b` both a and a.b."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return  # running it says what is wrong
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".") if package else []
            base = parents[: len(parents) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield from _with_parents(f"{stem}.{alias.name}".strip("."))


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[: index + 1]) for index in range(len(parts)))
