"""The HTML face of a view: escaped, self-contained, without scripts. Hover a token for its id."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from sftdata.outlet import visible
from sftdata.show.page import make_page, read_style
from sftdata.show.view import DocumentView, Piece, View


def view_fragment(view: View, *, ids: bool = False) -> str:
    """Return a view as HTML that can stand anywhere in a page that has the style sheet `view`.

    Args:
        ids: write the token ids beside each piece, besides showing them on hover.
    """
    key = '<p class="key"><span class="t">trained</span> · context · <span class="s">control token</span> · ↵ newline</p>'
    documents = "".join(_document(document, ids) for document in view.documents)
    padding = f'<p class="pad">{view.padding:,} tokens of padding, never trained</p>' if view.padding else ""
    return f'<div class="sft-view">{key}{documents}{padding}</div>'


def view_page(view: View, *, ids: bool = False) -> str:
    """Return a view as one self-contained page."""
    title = _safe(view.title or "examples")
    body = f"<header><h1>{title}</h1></header><main><section>{view_fragment(view, ids=ids)}</section></main>"
    return make_page(title, body, "view")


def notebook_html(view: View) -> str:
    """Return a view for the output cell of a notebook."""
    return f"<style>{read_style('view')}</style><p><b>{_safe(view.title)}</b></p>{view_fragment(view)}"


def _document(document: DocumentView, ids: bool) -> str:
    number = f"example {document.example_id} · " if document.example_id >= 0 else ""
    share = document.tokens_trained / max(document.tokens, 1)
    told = f"{number}{document.tokens:,} tokens · {document.tokens_trained:,} trained ({share:.0%})"
    body = "".join(
        f'<div class="turn"><b>{_safe(role)}</b><div>{"".join(_spans(pieces, ids))}</div></div>'
        for role, pieces in document.turns()
    )
    return f'<h4>{_safe(document.origin)}<small>{told}</small></h4><div class="doc">{body}</div>'


def _spans(pieces: tuple[Piece, ...], ids: bool) -> Iterator[str]:
    for piece in pieces:
        classes = " ".join(name for name, has in (("t", piece.trained), ("s", piece.special)) if has)
        numbers = " ".join(map(str, piece.ids))
        attribute = f' class="{classes}"' if classes else ""
        text = _safe(piece.text).replace("\n", '<i class="n">↵</i>\n')
        yield f'<span{attribute} data-ids="{numbers}" title="{numbers}">{text}</span>'
        if ids:
            yield f"<sub>{numbers}</sub>"


def _safe(text: str) -> str:
    return escape(visible(text))
