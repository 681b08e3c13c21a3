"""The code behind a formatter: its module and what that imports from beside it, as bytes, so that other code has another name."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType

_INSTALLED = ("site-packages", "dist-packages")


def read_code(module: str) -> dict[str, bytes]:
    """Return the source of a module, and of each module that it imports, itself or through others, from the folder it lies in.

    What is installed is not followed, nor what is imported by a name that is only made at run time. A module without a source
    file has none.

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

    What it imports only when it is called is imported as usual, so in one process that lives on it may be as it was before.

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
    """Let modules be imported anew, and leave no compiled copy behind, which would outlive a change within one second."""
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
