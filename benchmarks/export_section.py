"""The part of docs/export.md that is measured: Markdown of the rows of exports.py."""
from __future__ import annotations

from export_tables import LEGEND, cells, groups, name
from sections import about, table


def section(result: dict) -> str:
    """Tables, and below each what failed, with its reason."""
    parts = [f"{about(result)} {result['note']}\n", LEGEND.replace("* ", "\\* ") + "\n"]
    for title, columns, rows in groups(result):
        heads = [title, *(head for head, _ in columns)]
        parts.append(table(heads, [[name(row), *map(_escaped, cells(row))] for row in rows if "reason" not in row]))
        failed = [f"- No numbers for {name(row)}: {row['reason']}" for row in rows if "reason" in row]
        parts += ["\n".join(failed) + "\n"] if failed else []
    return "\n".join(parts)


def _escaped(cell: str) -> str:
    return cell.replace("*", "\\*")
