"""From a Matplotlib figure to SVG that belongs in our page.

Matplotlib draws with stand-in colours and stand-in texts. Afterwards, on the parsed XML, colours become the page's CSS variables (so a
figure follows light and dark), and stand-ins become the real words (so no name ever meets mathtext or font lookup, and the serialiser
escapes it). Ids nobody refers to go, the others get the figure's prefix: several figures share one HTML document.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET  # parses only what Matplotlib just wrote
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from aivmm.reports.format import clean
from aivmm.reports.palette import SLOTS

INK, MUTED, LINE, SURFACE = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
_COLOURS = {INK: "--ink", MUTED: "--muted", LINE: "--line", SURFACE: "--surface"}
_COLOURS.update({f"#0a0c{slot:02x}": f"--t{slot}" for slot in range(SLOTS)})

_HEX = re.compile(r"#[0-9a-f]{6}\b")
_STAND_IN = re.compile(r"~(\d+)~")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_FONT = re.compile(r"font: (?:\w+ )*?([\d.]+)px [^;]*")
_FAMILY = re.compile(r"font-family: [^;]*;? ?")
_NO_TURN = re.compile(r"rotate\(-?0 [^)]*\)")
_NAMESPACE = re.compile(r"^\{[^}]*\}")


def target_colour(slot: int) -> str:
    """Return the stand-in colour of a target's slot."""
    return f"#0a0c{slot:02x}"


class Canvas:
    """One figure to be: its Matplotlib side, and the words that replace the stand-ins."""

    def __init__(self, prefix: str, width: int, height: int) -> None:
        """Make a figure of `width` x `height` CSS pixels whose ids start with `prefix`."""
        self.prefix = prefix
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        self._words: list[str] = []

    def say(self, text: str) -> str:
        """Return a stand-in for any text from outside: give it to Matplotlib instead of the text."""
        self._words.append(clean(text))
        return f"~{len(self._words) - 1}~"

    def to_svg(self, *, title: str, description: str, css_class: str) -> Markup:
        """Return the figure as an inline `<svg role="img">` without namespaces, fonts, dates or colours of its own."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}, transparent=True)
        root = ET.fromstring(buffer.getvalue())
        _strip(root)
        names = _rename_ids(root, self.prefix)
        for element in root.iter():
            self._restyle(element, names)
        root.attrib.clear()
        root.attrib.update({"class": css_class, "viewBox": f"0 0 {self.width} {self.height}", "role": "img"})
        root.attrib["aria-labelledby"] = f"{self.prefix}title {self.prefix}desc"
        for index, (tag, text) in enumerate((("title", title), ("desc", description))):
            child = ET.Element(tag, {"id": f"{self.prefix}{tag}"})
            child.text = clean(text)
            root.insert(index, child)
        return Markup(ET.tostring(root, encoding="unicode"))  # the serialiser has escaped every name

    def _restyle(self, element: ET.Element, names: dict[str, str]) -> None:
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            key = _NAMESPACE.sub("", key)
            if key == "href":
                value = "#" + names[value[1:]]
            value = _REFERENCE.sub(lambda match: f"url(#{names[match[1]]})", value)
            if key == "transform" and _NO_TURN.fullmatch(value):
                continue
            value = _FAMILY.sub("", _FONT.sub(r"font-size: \1px", value))
            element.attrib[key] = _HEX.sub(lambda match: f"var({_COLOURS[match[0]]})" if match[0] in _COLOURS else match[0], value)
        if element.text:
            element.text = _STAND_IN.sub(lambda match: self._words[int(match[1])], element.text)


@contextmanager
def drawing(salt: str) -> Iterator[None]:
    """Set what makes Matplotlib deterministic and quiet in style, for the time of the block."""
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 12,
        "text.color": INK,
        "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED,
        "axes.labelsize": 12,
        "axes.titlesize": 12,
        "axes.linewidth": 1,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": LINE,
        "grid.linewidth": 1,
        "grid.alpha": 1.0,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.minor.visible": False,
        "ytick.minor.visible": False,
        "path.simplify": True,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    with mpl.rc_context():
        mpl.rcdefaults()  # a user's matplotlibrc does not change a report
        mpl.rcParams.update(settings)
        yield


def _strip(root: ET.Element) -> None:
    """Drop metadata and Matplotlib's `*{...}` style sheet, which would reach the whole page; drop namespaces from tags."""
    for parent in list(root.iter()):
        for child in list(parent):
            if _NAMESPACE.sub("", child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _NAMESPACE.sub("", element.tag)
        element.tail = None
        if element.tag != "text" and element.text and not element.text.strip():
            element.text = None


def _rename_ids(root: ET.Element, prefix: str) -> dict[str, str]:
    """Give ids that are referred to short prefixed names, and remove the others. Return old to new."""
    wanted: dict[str, str] = {}
    for element in root.iter():
        for key, value in element.attrib.items():
            found = [value[1:]] if _NAMESPACE.sub("", key) == "href" and value.startswith("#") else _REFERENCE.findall(value)
            for name in found:
                wanted.setdefault(name, f"{prefix}{len(wanted)}")
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in wanted:
            element.attrib["id"] = wanted[name]
    return wanted
