"""What a benchmark writes, and that an interrupted one goes on where it was."""

import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from report import Report, begin, curves, markdown_table


def test_an_interrupted_benchmark_goes_on_with_its_next_cell(tmp_path):
    computed = []

    def benchmark(interrupt_at):
        out = Report("demo", tmp_path, short=True, seed=0)
        for index in range(4):

            def compute(index=index):
                if index == interrupt_at:
                    raise KeyboardInterrupt
                computed.append(index)
                return {"index": index, "values": (np.float32(0.5), torch.tensor([1, 2]))}

            cell = out.cell(f"cell {index}", compute)
            assert cell == {"index": index, "values": [0.5, [1, 2]]}

    with pytest.raises(KeyboardInterrupt):
        benchmark(2)
    benchmark(None)
    assert computed == [0, 1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["demo-short.json"]


def test_cells_of_another_setting_are_refused_unless_forgotten(tmp_path):
    Report("demo", tmp_path, short=True, seed=0, steps=20).cell("a", lambda: 1)
    with pytest.raises(ValueError, match=r"steps was 20, now is 10\. Give another --output, or --restart"):
        Report("demo", tmp_path, short=True, seed=0, steps=10)
    assert Report("demo", tmp_path, short=False, seed=0, steps=10).cell("a", lambda: 2) == 2  # a file of its own
    out = Report("demo", tmp_path, short=True, restart=True, seed=0, steps=10)
    assert out.cell("a", lambda: 3) == 3
    assert json.loads((tmp_path / "demo-short.json").read_text())["setting"] == {"seed": 0, "steps": 10}


def test_a_cell_that_is_no_json_is_refused(tmp_path):
    with pytest.raises(TypeError, match="got complex"):
        Report("demo", tmp_path, short=True).cell("a", lambda: 1j)


def test_finish_writes_tables_conditions_and_plot(tmp_path, capsys):
    out = begin("What it does.", "demo", ["--output", str(tmp_path / "new"), "--full"], seed=3)
    assert not out.short
    out.cell("old", lambda: 1)
    out._cells["old"]["commit"] = "0123abc"
    out._commit, out._used_commits = "fedcba9", set()
    out.cell("old", lambda: 1)
    out.table(["method", "time"], [["full", "1.00"], ["a|b", "0.75"]], title="Speed", note="a note")
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    out.plot(figure)
    out.finish(packages=["torch"])
    text = (tmp_path / "new" / "demo-full.md").read_text()
    assert text.startswith("# demo\n\n**Speed**\n\n| method | time |\n| ------ | ---: |\n| full   | 1.00 |\n")
    assert r"| a\|b" in text and "a note" in text
    assert "full setting: seed 3; " in text and "some cells are of commit 0123abc" in text
    assert text.partition("\n\n")[2].strip() in capsys.readouterr().out
    assert Image.open(tmp_path / "new" / "demo-full.png").size == (240, 120)
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".json", ".md", ".png"}


def test_curves_join_sorted_points_in_one_colour_a_family():
    panels = {"distance": {"a": [(0.9, 1.0), (0.5, 2.0)], "b": [(0.7, 3.0)]}, "error": {"b": [(0.7, 1e-3)]}}
    figure = curves(panels, "time", logarithmic=["error"])
    first, second = figure.axes
    assert first.lines[0].get_xydata().tolist() == [[0.5, 2.0], [0.9, 1.0]]
    assert [line.get_label() for line in first.lines] == ["a", "b"]
    assert first.lines[1].get_color() == second.lines[0].get_color() != first.lines[0].get_color()
    assert (first.get_ylabel(), first.get_xlabel(), first.get_yscale()) == ("distance", "time", "linear")
    assert second.get_yscale() == "log"


def test_the_short_setting_is_asked_for_and_excludes_the_full_one(tmp_path):
    assert begin("", "demo", ["--short", "--output", str(tmp_path)]).short
    with pytest.raises(SystemExit):
        begin("", "demo", ["--short", "--full"])


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match="2 entries each"):
        markdown_table(["a", "b"], [["1"]])
