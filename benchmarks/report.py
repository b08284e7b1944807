"""What a benchmark leaves behind: finished cells that survive an interrupt, tables, a plot. See `measure`."""

import argparse
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from measure import commit, conditions


class Report:
    """One benchmark in one setting. Files: `<output>/<name>-<short|full>.{json,md,png}`.

    Args:
        name: of the benchmark, part of the files' names.
        output: folder, made when missing.
        short: the short setting.
        restart: forget the cells of before.
        setting: everything else that the cells depend on, as JSON can hold it.

    Raises:
        ValueError: the cells in `output` were made in another setting.
    """

    def __init__(self, name: str, output: Path, *, short: bool, restart: bool = False, **setting: Any) -> None:
        self.name = name
        self.short = short
        self.folder = output
        self._parts: list[str] = []
        self._figure: Figure | None = None
        self._commit = commit()
        self._setting = json.loads(json.dumps(setting, default=_plain))
        self._cells: dict[str, dict[str, Any]] = {}
        self._used_commits: set[str] = set()
        output.mkdir(parents=True, exist_ok=True)
        if restart:
            self.path("json").unlink(missing_ok=True)
        if self.path("json").exists():
            self._read()

    def path(self, suffix: str) -> Path:
        """Of one of the files."""
        return self.folder / f"{self.name}-{'short' if self.short else 'full'}.{suffix}"

    def cell(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value that is kept under `key`, computed and written now if there is none.

        Args:
            key: all that tells this cell from others of the benchmark, for instance method, parameter and seed.
            compute: gives the value: numbers, strings, lists, dicts; arrays and tensors become lists.

        Returns:
            the value as it is read from JSON, also the first time.
        """
        if key not in self._cells:
            value = json.loads(json.dumps(compute(), default=_plain))
            self._cells[key] = {"value": value, "commit": self._commit}
            text = json.dumps({"setting": self._setting, "cells": self._cells}, indent=1) + "\n"
            write_whole(self.path("json"), text.encode())
        self._used_commits.add(self._cells[key]["commit"])
        return self._cells[key]["value"]

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "", note: str = "") -> None:
        """Print a Markdown table, and keep it for `finish`. Entries are formatted by the caller."""
        self.text(
            "\n\n".join(part for part in (title and f"**{title}**", markdown_table(columns, rows), note) if part)
        )

    def text(self, text: str) -> None:
        """Print a paragraph, and keep it for `finish`."""
        print(f"\n{text}", flush=True)
        self._parts.append(text)

    def plot(self, figure: Figure) -> None:
        """Keep the figure for `finish`."""
        self._figure = figure

    def finish(self, packages: Sequence[str] = ()) -> None:
        """Write the tables and the plot, and say under which conditions they came about.

        Args:
            packages: peers whose versions matter.
        """
        setting = ", ".join(f"{name} {value}" for name, value in self._setting.items())
        lines = [f"{'short' if self.short else 'full'} setting: {setting}"] if setting else []
        lines.append(conditions(packages))
        others = sorted(self._used_commits - {self._commit})
        if others:
            lines.append(f"some cells are of commit {', '.join(others)}")
        self.text("; ".join(lines))
        write_whole(self.path("md"), ("\n\n".join([f"# {self.name}", *self._parts]) + "\n").encode())
        written = [self.path("md")]
        if self._figure is not None:
            save_figure(self._figure, self.path("png"))
            written.append(self.path("png"))
        print(f"\nwrote {' and '.join(str(path) for path in written)}", flush=True)

    def _read(self) -> None:
        kept = json.loads(self.path("json").read_text())
        then, now = kept["setting"], self._setting
        differences = [
            f"{name} was {then.get(name)}, now is {now.get(name)}"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]
        if differences:
            raise ValueError(
                f"{self.path('json')} holds cells of another setting: {'; '.join(differences)}. Give another "
                "--output, or --restart to forget them."
            )
        self._cells = kept["cells"]


def begin(description: str, name: str, argv: Sequence[str] | None = None, **setting: Any) -> Report:
    """The report of a script, by its command line.

    Args:
        description: the script's docstring, shown by `--help`.
        name: of the benchmark.
        argv: of the command line; default: of this process.
        **setting: see `Report`.
    """
    return begin_parsed(make_parser(description).parse_args(argv), name, **setting)


def begin_parsed(args: argparse.Namespace, name: str, **setting: Any) -> Report:
    """`begin` for a script with arguments of its own: `make_parser`, `parse_args`, then this."""
    return Report(name, args.output, short=args.short, restart=args.restart, **setting)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--short", action="store_true", help="fewer rounds and samples")
    size.add_argument("--full", dest="short", action="store_false", help="the default")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder of table, plot and cells")
    parser.add_argument("--restart", action="store_true", help="forget the cells of an earlier run")
    return parser


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns in line, so that it can be read as plain text too; numbers to the right.

    Raises:
        ValueError: a row has another length than `columns`.
    """
    wrong = [row for row in rows if len(row) != len(columns)]
    if wrong:
        raise ValueError(f"`rows` must have {len(columns)} entries each, like `columns`, got {wrong[0]}.")
    entries = [[str(entry).replace("|", r"\|") for entry in row] for row in [columns, *rows]]
    widths = [max(3, *(len(row[i]) for row in entries)) for i in range(len(columns))]
    right = [i > 0 and all(_is_number(row[i]) for row in entries[1:]) for i in range(len(columns))]
    lines = []
    for row in entries:
        padded = [e.rjust(w) if r else e.ljust(w) for e, w, r in zip(row, widths, right, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * (width - 1) + (":" if r else "-") for width, r in zip(widths, right, strict=True)]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], x: str, *, logarithmic: Collection[str] = ()
) -> Figure:
    """Some families of ways in one or more panels, each family's points joined from left to right.

    Args:
        panels: what is on the y axis, to family, to points (x, y). A family has the same colour in all panels.
        x: what is on the x axis.
        logarithmic: panels whose y axis is.
    """
    figure = Figure(figsize=(4.8 * len(panels) + 2, 4), layout="constrained")
    families = list(dict.fromkeys(family for series in panels.values() for family in series))
    for axes, (label, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for family, points in series.items():
            number = families.index(family)
            style = {"marker": "osD^vPX*"[number % 8], "color": f"C{number % 10}", "markersize": 5}
            axes.plot(*zip(*sorted(points), strict=True), label=family, **style)
        axes.set(xlabel=x, ylabel=label, yscale="log" if label in logarithmic else "linear")
        axes.grid(alpha=0.3)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside right center")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all; without pyplot's global state."""
    unfinished = path.with_suffix(".unfinished")
    figure.savefig(unfinished, format="png", dpi=120)
    os.replace(unfinished, path)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def _is_number(entry: str) -> bool:
    return re.match(r"[-+−<>≤≥]?\s?\d", entry) is not None or entry in ("", "-", "nan")


def _plain(value: Any) -> Any:
    """For JSON: arrays, tensors and their scalars, paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"A cell must hold numbers, strings, lists or dicts, got {type(value).__name__}.")
