"""`sftdata init --from`: the files that settings of another tool become."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from sftdata.errors import UsageError
from sftdata.output import StoreUrl, counted, print_line


def init_from(source: Path, file: str, output: Path | StoreUrl) -> None:
    """Write the settings of another tool as two files, and say what was not carried over."""
    from sftdata.carried import registry_text, settings_text
    from sftdata.other_tools import carry_over

    found = carry_over(source, str(output))
    base = Path("sft.yaml" if file == "-" else file)
    data, train, named = (base.with_name(f"{base.stem}{end}.yaml") for end in ("", "-train", "-datasets"))
    of, texts = f"From {source.name} of {found.tool}.", dict[Path, str]()
    if found.sources:
        found.data["registry"] = str(named)
        found.origins["data", "registry"] = ["the datasets, since each is read in its own way"]
        texts[named] = registry_text(found.sources, named.parent, of, {})
    texts[data] = settings_text(
        found, "data", f"{of} Look: sftdata preview {data}; build: sftdata prepare {data}"
    )
    texts[train] = settings_text(found, "train", f"{of} Train: sfttrain run -c {train}")
    _write_new(file, texts, found.lost)
    carried = len(found.carried)
    counts = f"{carried} settings carried over, {len(found.needless)} needless, {len(found.lost)} not"
    if file != "-":
        print_line(
            f"{of} {counts}. Wrote {' and '.join(map(str, texts))}. Look at them, then:"
            f" sftdata prepare {data} && sfttrain run -c {train}",
            err=True,
        )


def registry_from(source: Path, file: str) -> None:
    """Write a dataset_info.json as a registry, and say what was not carried over."""
    from sftdata.carried import registry_text
    from sftdata.other_datasets import read_dataset_info

    found = read_dataset_info(source)
    head = f"From {source.name} of {found.tool}; names of inputs for sftdata prepare."
    text = registry_text(found.sources, Path(file).parent, head, found.lost)
    _write_new(file, {Path(file): text}, found.lost)
    if file != "-":
        print_line(f"{counted(len(found.sources), 'source')}. Wrote {file}.", err=True)


def _write_new(file: str, texts: Mapping[Path, str], lost: Mapping[str, str]) -> None:
    """Write files that are not there yet, or print what they would hold; say what was not carried over."""
    if file == "-":
        typer.echo("\n---\n".join(texts.values()), nl=False)
        return
    if there := next(filter(Path.exists, texts), None):
        raise UsageError(f"{there}: exists already.", "name another file with -f, or - to print.")
    for path, text in texts.items():
        path.write_text(text, "utf-8")
    for name, reason in lost.items():
        print_line(f"not carried over: {name}: {reason}", err=True)
