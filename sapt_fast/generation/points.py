"""Reads the points of a skeleton: numbered lists and bullets, as models write them."""
# ruff: noqa: RUF001

import re
from typing import NamedTuple

_CHINESE = "一二三四五六七八九十"
_CIRCLED = "①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯⑰⑱⑲⑳"
_BULLETS = "-*+•–—·‣▪◦●○■"
_SEPARATORS = r".):：、．）。\]"

# What may stand before a title: emphasis or a heading, then a number or a bullet.
_MARKER = re.compile(
    rf"""
    (?P<indent>\s*)
    (?:\#{{1,6}}\s+)?(?:\*\*|__)?
    (?:(?:point|step|punkt|punto|étape|第)\s*)?
    (?:
        (?P<nested>\d+(?:\.\d+)+[{_SEPARATORS}]?)(?=\s)
      | [(（\[]?(?P<number>\d{{1,3}}|[{_CHINESE}]{{1,3}})(?:点|步)?(?:\*\*|__)?[{_SEPARATORS}](?!\d)
      | (?P<circled>[{_CIRCLED}])
      | [(]?(?P<roman>[ivxIVX]{{1,5}}|[a-zA-Z])[.)](?=\s)
      | (?P<bullet>[{_BULLETS}])(?=\s)
    )
    \s*
    """,
    re.VERBOSE | re.IGNORECASE,
)
_RANKS = ("number", "circled", "roman", "bullet")


class _Line(NamedTuple):
    kind: str
    indent: int
    title: str


def parse_points(text: str, *, complete: bool = True) -> list[str]:
    """Returns the titles of a skeleton's points, without duplicates.

    Points are the items of the outermost list: numbers of any script, circled numbers, Roman
    numerals and letters, else bullets. Items inside another item are not points, and neither is
    text before, between and after the items. Numbers need not be in order.

    Args:
        text: the skeleton, with its opening.
        complete: whether the model ended it. If not, the last title is only kept if a line end
            follows it, or if it is the only one.
    """
    lines: list[_Line] = []
    waiting = False  # whether the last marker has no title yet
    for line in text.expandtabs(4).splitlines():
        match = _MARKER.match(line)
        if match is None:
            if waiting and line.strip():
                lines[-1] = lines[-1]._replace(title=_title(line))
                waiting = False
            continue
        kind = next((name for name in _RANKS if match[name] is not None), "nested")
        lines.append(_Line(kind, len(match["indent"]), _title(line[match.end() :])))
        waiting = not lines[-1].title
    kinds = {line.kind for line in lines}
    outer = next((kind for kind in _RANKS if kind in kinds), None)
    items = [line for line in lines if line.kind == outer]
    if not items:
        return []
    indent = min(line.indent for line in items)
    titles = [line.title for line in items if line.indent <= indent + 1]
    if len(titles) == 1 and outer == "number":
        titles = _in_one_line(titles[0])
    cut = not complete and len(titles) > 1 and not text.endswith("\n")
    first: dict[str, str] = {}
    for title in titles[:-1] if cut else titles:
        first.setdefault(title.casefold(), title)
    return [title for title in first.values() if title]


def _title(text: str) -> str:
    """A title without emphasis and without the mark that ends it."""
    text = re.sub(r"(\*\*|__|`)", "", text).strip()
    return text.strip("*_# ").rstrip(" :：,;，；.。").strip()


def _in_one_line(text: str) -> list[str]:
    """Splits "A 2. B 3. C" where the numbers count on from 2."""
    titles, number = [], 2
    while match := re.search(rf"\s{number}[.)]\s+", text):
        titles.append(_title(text[: match.start()]))
        text, number = text[match.end() :], number + 1
    return [*titles, _title(text)]
