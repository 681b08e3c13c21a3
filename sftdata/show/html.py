"""The HTML face of a view: escaped, self-contained, without scripts. Hover a token for its id."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from sftdata.show.escape import visible
from sftdata.show.page import make_page
from sftdata.show.view import DocumentView, Piece, View

# Colours are mixed into what lies behind them, so that one sheet serves light and dark pages, notebooks included.
VIEW_CSS = """
.sft-view { font: 13px/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.sft-view h4 { font: 600 13px/1.4 ui-sans-serif, system-ui, sans-serif; margin: 1.2em 0 .5em; display: flex; flex-wrap: wrap;
  gap: .2em .8em; align-items: baseline; }
.sft-view h4 small { font-weight: 400; opacity: .65; font-size: 12px; }
.sft-view .doc { white-space: pre-wrap; border-left: 3px solid rgba(128,128,128,.35); padding: .15em 0 .15em .9em; margin: 0; }
.sft-view .t { background: rgba(38,166,91,.20); text-decoration: underline; text-decoration-color: rgb(38,166,91);
  text-decoration-thickness: 2px; text-underline-offset: 3px; text-decoration-skip-ink: none; }
.sft-view .s { color: rgb(120,110,220); font-weight: 600; }
.sft-view .n { opacity: .4; }
.sft-view sub { font-size: 9px; opacity: .6; margin: 0 .25em 0 .1em; vertical-align: baseline; }
.sft-view .pad { opacity: .6; font-style: italic; margin: 1em 0 0; }
.sft-view .key { opacity: .85; font-size: 12px; }
.sft-view span:hover { outline: 1px solid rgb(38,166,91); }
"""


def view_fragment(view: View, *, ids: bool = False) -> str:
    """Return a view as HTML that can stand anywhere in a page whose style sheet holds `VIEW_CSS`.

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
    return make_page(title, f"<header><h1>{title}</h1></header><main><section>{view_fragment(view, ids=ids)}</section></main>", VIEW_CSS)


def notebook_html(view: View) -> str:
    """Return a view for the output cell of a notebook."""
    return f"<style>{VIEW_CSS}</style><p><b>{_safe(view.title)}</b></p>{view_fragment(view)}"


def _document(document: DocumentView, ids: bool) -> str:
    number = f"example {document.example_id} · " if document.example_id >= 0 else ""
    share = document.tokens_trained / max(document.tokens, 1)
    told = f"{number}{document.tokens:,} tokens · {document.tokens_trained:,} trained ({share:.0%})"
    body = "".join(_spans(document.pieces, ids))
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
