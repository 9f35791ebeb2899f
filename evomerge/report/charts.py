"""Charts as files: PNG, SVG or PDF, with Japanese letters, the same bytes for the same numbers."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from evomerge.errors import ConfigError, OutputExistsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's, told apart by every kind of colour vision, darkest first; black for text only.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_KINDS = (".png", ".svg", ".pdf")
_JAPANESE_PACKAGE, _JAPANESE_FONT = "matplotlib_fontja", "fonts/ipaexg.ttf"
_SETTINGS: Any = {
    "font.family": ["DejaVu Sans", "IPAexGothic"],
    "font.size": 10.0,
    "text.parse_math": False,  # a $ in a model's name is a $
    "svg.fonttype": "path",  # the letters are drawn right wherever the font is missing
    "svg.hashsalt": "evomerge",
}


def check_charts(paths: Sequence[Path], *, overwrite: bool = False) -> None:
    """Raises ConfigError unless charts can be written to `paths` (PNG, SVG or PDF by suffix)."""
    for path in paths:
        if path.suffix.lower() not in _KINDS:
            raise ConfigError(f"{path}: a chart's name ends in {', '.join(_KINDS)}")
        if path.is_dir() or (path.exists() and not overwrite):
            raise OutputExistsError(f"{path}: exists already; --overwrite replaces it")
    if find_spec("matplotlib") is None:
        raise ConfigError("charts need matplotlib: pip install 'evomerge[plots]'")


def write_charts(draw: Callable[[], Figure], paths: Sequence[Path]) -> list[str]:
    """Writes the figure that `draw` makes to each path; what is worth knowing, a sentence each.

    Raises ConfigError where a file cannot be written.
    """
    import matplotlib as mpl

    with mpl.rc_context(_SETTINGS), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _register_japanese()
        figure = draw()
        drawn = [(path, _bytes_of(figure, path.suffix.lower()[1:])) for path in paths]
    for path, content in drawn:
        _write(path, content)
    return list(dict.fromkeys(str(one.message).splitlines()[0] for one in caught))


def broken(name: str, width: int) -> str:
    """`name` in lines of at most `width` columns, of which a Japanese letter takes two."""
    return "\n".join(line.plain.rstrip() for line in Text(name).wrap(Console(), width))


def columns_of(text: str) -> int:
    """The columns of its longest line, of which a Japanese letter takes two."""
    return max(map(cell_len, text.splitlines()), default=0)


def _register_japanese() -> None:
    """Lets matplotlib find the font of the package matplotlib-fontja, without importing that.

    Its import would change every chart of the process.
    """
    from matplotlib.font_manager import fontManager

    if any(font.name == "IPAexGothic" for font in fontManager.ttflist):
        return
    spec = find_spec(_JAPANESE_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    if folders and (file := Path(folders[0]) / _JAPANESE_FONT).is_file():
        fontManager.addfont(file)


def _bytes_of(figure: Figure, kind: str) -> bytes:
    content = io.BytesIO()
    # Without a date the same table gives the same bytes.
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    # Tight: whatever the longest name is, it is in the picture.
    figure.savefig(
        content, format=kind, metadata=dated.get(kind), bbox_inches="tight", pad_inches=0.15
    )
    return content.getvalue()


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
