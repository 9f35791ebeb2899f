from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import pytest
from matplotlib.font_manager import findfont, get_font

from evomerge.errors import ConfigError
from evomerge.report.charts import check_charts
from evomerge.report.radar import draw_radar, radar_figure
from evomerge.report.radar_table import RadarLine, RadarTable, read_radar_table
from evomerge.report.side_by_side import evaluation_radar
from tests.shared_data import shared_data
from tests.test_cli import run

WIDE = "model,size,Math,Writing,Coding\nbase,7B,2,4.5,6\n合体,7B,3,,7.5\n"
JAPANESE = RadarTable(
    ("数学", "文章作成", "コーディング"),
    (
        RadarLine(
            "進化マージ $x$", (1.0, 2.0, 3.0), ((0.5, 1.5), None, (2.0, 4.0)), 2.0, (1.5, 2.5)
        ),
    ),
)


def table_of(folder: Path, text: str) -> RadarTable:
    (folder / "table.csv").write_text(text, encoding="utf-8")
    return read_radar_table(folder / "table.csv")


def test_the_published_table_gives_the_published_picture() -> None:
    table = read_radar_table(shared_data("published/elyza_moe_japanese_mt_bench.csv"))
    assert table.categories == (
        *("Coding", "Extraction", "Humanities", "Math"),
        *("Reasoning", "Roleplay", "STEM", "Writing"),
    )
    assert [line.mean for line in table.lines] == [4.925, 5.675]
    for line in table.lines:  # the published mean is the categories'
        scores = [score for score in line.scores if score is not None]
        assert math.fsum(scores) / len(scores) == pytest.approx(line.mean, abs=1e-9)
    figure = radar_figure(table, 0, 10)
    (axes,) = figure.axes
    assert axes.get_ylim() == (0, 10)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(table.categories)
    for drawn, line in zip(axes.lines, table.lines, strict=True):
        angles, scores = (list(values) for values in drawn.get_data())
        assert scores == [*line.scores, line.scores[0]]
        turns = [angle / (2 * math.pi) for angle in angles]
        assert turns == pytest.approx([*(step / 8 for step in range(8)), 0])
    styles = {(drawn.get_color(), drawn.get_linestyle()) for drawn in axes.lines}
    assert len({colour for colour, _ in styles}) == len({style for _, style in styles}) == 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "ELYZA-japanese-Llama-2-13b-instruct   mean 4.925",
        "ELYZA-japanese-Llama-2-MoE-2x13B-v0.1   mean 5.675",
    ]


def test_a_line_for_each_model_may_lack_scores_and_has_its_own_mean(tmp_path: Path) -> None:
    table = table_of(tmp_path, WIDE)
    assert table.categories == ("Math", "Writing", "Coding")
    assert table.lines[0] == RadarLine("base", (2.0, 4.5, 6.0), (None,) * 3, 12.5 / 3)
    assert table.lines[1] == RadarLine("合体", (3.0, None, 7.5), (None,) * 3, 5.25)


def test_errors_are_read_from_columns_of_either_kind(tmp_path: Path) -> None:
    text = "model,A,B,C,A_se,B low,B high,avg_score,avg_score se\nx,1,2,3,0.5,1.5,2.25,2.5,0.1\n"
    (line,) = table_of(tmp_path, text).lines
    assert line.intervals[0] == pytest.approx((1 - 0.98, 1 + 0.98))
    assert line.intervals[1:] == ((1.5, 2.25), None)
    assert line.mean == 2.5
    assert line.mean_interval == pytest.approx((2.5 - 0.196, 2.5 + 0.196))


def test_a_line_for_each_model_and_category_is_the_same_table(tmp_path: Path) -> None:
    wide = table_of(tmp_path, "name,a,b,c,a se\nx,1,2,3,0.5\ny,4,5,,\n")
    rows = ["x,a,1,0.5", "x,b,2,", "y,b,5,", "x,c,3,", "y,a,4,"]
    assert table_of(tmp_path, "\ufeffmodel,category,score,se\n" + "\n".join(rows)) == wide


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b,c\n1,2,3\n", ["no column model", "a, b, c"]),
        ("model,a,b\nx,1,2\n", ["3 categories or more", "a, b"]),
        ("model,a,b,c\n", ["3 categories or more"]),
        ("model,a,b,c\nx,1,2,3\ny,1,many,3\n", [":3", "b is 'many'"]),
        ("model,a,b,c\nx,1,2\n", [":2", "3 cells, but 4 columns"]),
        ("model,a,b,c,a\nx,1,2,3,4\n", ["'a' is there twice"]),
        ("model,a,b,c\nx,1,2,3\ny,,,\n", [":3", "y has no score"]),
        ("model,a,b,c\n,1,2,3\n", [":2", "no name"]),
        ("model,a,b,c,a low,a high\nx,1,2,3,2,3\n", [":2", "a low 2.0"]),
        ("model,a,b,c,a se\nx,1,2,3,-1\n", [":2", "a se is -1.0"]),
        ("model,category,score\nx,a,1\nx,a,2\n", [":3", "x has a a second time"]),
    ],
)
def test_a_mistake_in_a_table_is_told_with_its_place(
    text: str, words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        table_of(tmp_path, text)
    assert all(word in str(error.value) for word in ["table.csv", *words]), str(error.value)


def test_a_table_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes("model,数学,b,c\nx,1,2,3\n".encode("cp932"))
    with pytest.raises(ConfigError, match=r"table\.csv: cannot be read as CSV in UTF-8"):
        read_radar_table(tmp_path / "table.csv")


def test_japanese_is_drawn_with_a_japanese_font_and_a_dollar_as_itself(tmp_path: Path) -> None:
    assert draw_radar(JAPANESE, [tmp_path / "a.svg"], title="日本語") == []
    svg = (tmp_path / "a.svg").read_text()
    for font, letters in (
        ("IPAexGothic", "日本語数学文章作成コーディング進化マージ"),
        ("DejaVu Sans", "$x"),
    ):
        glyphs = get_font(findfont(font))
        wanted = {f"{glyphs.get_char_index(ord(letter)):x}" for letter in letters}
        prefix = font.replace(" ", "")
        assert "0" not in wanted
        assert wanted <= set(re.findall(f'id="{prefix}-([0-9a-f]+)"', svg))


def test_what_no_font_has_is_told(tmp_path: Path) -> None:
    table = RadarTable(("a", "b", "\U00013000"), JAPANESE.lines)
    (note,) = draw_radar(table, [tmp_path / "a.png"])
    assert "77824" in note


def test_the_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.png", "b.png", "a.svg", "b.svg", "a.pdf", "b.pdf")]
    draw_radar(JAPANESE, paths[::2])
    draw_radar(JAPANESE, paths[1::2])
    for first, second in zip(paths[::2], paths[1::2], strict=True):
        assert first.read_bytes() == second.read_bytes()
    header = paths[0].read_bytes()[:24]
    width, height = struct.unpack(">II", header[16:])
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(width, height) > 1000


def test_intervals_are_bars_along_the_spokes() -> None:
    (axes,) = radar_figure(JAPANESE, 0, 5).axes
    bars = [line for line in axes.lines[1:] if len(set(line.get_xdata())) == 1]
    assert [list(bar.get_ydata()) for bar in bars] == [[0.5, 1.5], [2.0, 4.0]]


def test_long_names_are_broken_and_leave_the_circle_its_size(tmp_path: Path) -> None:
    model, category = "名前-" * 30, "a very long name of a category of somebody"
    table = RadarTable(
        (category, *JAPANESE.categories),
        (RadarLine(model, (1.0, 2.0, 3.0, 4.0), (None,) * 4, 2.5),),
        measure="mean grade (exact)",
    )
    paths = tmp_path / "long.png", tmp_path / "short.png"
    assert draw_radar(table, paths[:1]) == []
    draw_radar(JAPANESE, paths[1:])
    figure = radar_figure(table, 0, 5)
    (legend,) = figure.legends
    (label,) = (text.get_text() for text in legend.get_texts())
    assert label.replace("\n", "").startswith(model)
    assert max(map(len, label.split("   ")[0].splitlines())) <= 32  # of 48 columns
    assert legend.get_title().get_text() == "mean grade (exact)"
    names = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert names[0].split() == category.split()
    assert max(map(len, names[0].splitlines())) <= 16
    (width, _), (plain, _) = (struct.unpack(">II", path.read_bytes()[16:24]) for path in paths)
    assert width == pytest.approx(plain, rel=0.15)


@pytest.mark.parametrize(
    ("scores", "ends"),
    [((0.2, 0.9, 1.0), (0, 1)), ((3, 4, 5), (0, 5)), ((7, 7, 7), (0, 10)), ((3, 230, 4), (0, 300))],
)
def test_the_rim_is_a_usual_top_of_a_scale(
    scores: tuple[float, ...], ends: tuple[float, float], tmp_path: Path
) -> None:
    table = RadarTable(("a", "b", "c"), (RadarLine("x", scores, (None,) * 3, 1.0),))
    with pytest.raises(ConfigError, match=f"goes from {ends[0]} to 0"):
        draw_radar(table, [tmp_path / "a.png"], bounds=(None, 0))
    with pytest.raises(ConfigError, match=f"goes from 400 to {ends[1]}"):
        draw_radar(table, [tmp_path / "a.png"], bounds=(400, None))
    assert list(tmp_path.iterdir()) == []


def test_the_rim_of_an_evaluation_holds_its_intervals_whole(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    row = {
        "model": "x",
        "score": 4.0,
        "interval": [3.0, 5.0],
        "categories": dict.fromkeys(names, 4.0),
        "category_intervals": {name: [2.5, 5.5] for name in names},
    }
    table = evaluation_radar({"scorer": "judge", "judge": "j", "models": [row]})
    with pytest.raises(ConfigError, match="goes from 400 to 10"):
        draw_radar(table, [tmp_path / "a.png"], bounds=(400, None))


def test_the_command_writes_every_file_and_replaces_none_unasked(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text(WIDE)
    files = [tmp_path / "out.png", tmp_path / "out.svg"]
    ran = run("radar", table, *files, "--title", "数学", "--max", "8")
    assert (ran.status, ran.out, ran.err) == (0, f"{files[0]}\n{files[1]}\n", "")
    assert all(file.stat().st_size > 10_000 for file in files)
    refused = run("radar", table, *files)
    assert refused.status == 2
    assert "out.png: exists already; --overwrite replaces it" in refused.err
    assert run("radar", table, *files, "--overwrite").status == 0
    assert run("radar", table, tmp_path / "out.gif").err.startswith(f"error: {tmp_path}/out.gif:")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "out.svg", "table.csv"]


def test_a_place_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    check_charts([tmp_path / "nowhere" / "a.png"])
    with pytest.raises(ConfigError, match=r"a\.png: cannot be written: No such file"):
        draw_radar(JAPANESE, [tmp_path / "nowhere" / "a.png"])
