"""Pieces of the self-contained HTML pages: their style, tables, and pictures inside the file."""
from __future__ import annotations

import base64
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #0072b2; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.lead { font-size: 1.15rem; border-left: 5px solid var(--good); padding: .3rem .9rem; background: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.strong td { font-weight: 600; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
figcaption, .note { opacity: .8; font-size: .92rem; } details { margin: .8rem 0; }
"""


def section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}"


def missing(what: str) -> str:
    return f"<p class='note'>{escape(what)}</p>"


def table(header: list, rows: list[list], strong: int | None = None) -> str:
    def line(cells, tag):
        return "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells)

    body = "".join(
        f"<tr{' class=strong' if index == strong else ''}>{line(row, 'td')}</tr>" for index, row in enumerate(rows)
    )
    return f"<div class='scroll'><table><thead><tr>{line(header, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"


def image(path: Path, alt: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f"<img alt='{escape(alt, quote=True)}' src='data:image/png;base64,{content}'>"


def picture(figure: dict, out: Path) -> str:
    caption = f"<figcaption><b>{escape(figure['title'])}.</b> {escape(figure['caption'])}</figcaption>"
    return f"<figure>{image(out / figure['file'], figure['title'])}{caption}</figure>"


def whole_page(title: str, body: list[str]) -> str:
    """The HTML document; `title` as text, `body` as pieces of HTML."""
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
