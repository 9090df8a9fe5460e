"""Tables for a paper: the arms, their differences from base, every condition; as CSV, Markdown and LaTeX."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from esr_train.files import replacing
from eval.conditions import order, title
from eval.metrics import METRICS, headline
from eval.report.attack_figures import SUCCESSES, attacks
from eval.report.story import shown, task_rows
from eval.statistics import Estimate
from eval.summary import LAST, RECALIBRATED, STEERED, Summary, Table

FIRST = (STEERED, "unsteered", RECALIBRATED)
"""Conditions of the headline's tables; the others are controls."""
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "≥": r"$\geq$", "×": r"$\times$",
    "…": r"\ldots{}", "\u202f": r"\,", "–": "--",
}  # fmt: skip


@dataclass(frozen=True)
class PaperTable:
    """Estimates of arms under conditions.

    Args:
        estimates: condition -> arm -> metric -> estimate.
        signed: whether they are differences, of rates in percentage points.
    """

    name: str
    caption: str
    estimates: Mapping[str, Mapping[str, Mapping[str, Estimate]]]
    signed: bool = False

    def to_csv(self) -> str:
        """A line for each number, rates as shares of 1; every metric that was measured."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(("condition", "arm", "metric", "value", "low", "high", "n", "unscored"))
        for condition, arms in self.estimates.items():
            for arm, metrics in arms.items():
                for name, each in metrics.items():
                    writer.writerow((condition, arm, name, each.value, each.low, each.high, each.n, each.unscored))
        return buffer.getvalue()

    def to_markdown(self) -> str:
        """A table of the headline's metrics, an arm a line."""
        head = ["", *(METRICS[name].title for name in headline()), "n"]
        lines = [_line(head), _line(["---", *(["---:"] * (len(head) - 1))])]
        for condition, arms in self.estimates.items():
            lines.append(_line([f"**{title(condition)}**", *([""] * (len(head) - 1))]))
            lines += [_line([arm, *self._cells(metrics)]) for arm, metrics in arms.items()]
        return "\n".join([*lines, "", self.caption, ""])

    def to_latex(self) -> str:
        """The same for LaTeX's `booktabs`."""
        head = ["", *(METRICS[name].title for name in headline()), "$n$"]
        columns = len(head)
        lines = [r"\begin{tabular}{l" + "r" * (columns - 1) + "}", r"\toprule", _row([*map(_latex, head[:-1]), "$n$"])]
        for condition, arms in self.estimates.items():
            lines += [r"\midrule", rf"\multicolumn{{{columns}}}{{l}}{{\textit{{{_latex(title(condition))}}}}} \\"]
            lines += [_row(map(_latex, [arm, *self._cells(metrics)])) for arm, metrics in arms.items()]
        return "\n".join([f"% {self.caption}", *lines, r"\bottomrule", r"\end{tabular}", ""])

    def _cells(self, metrics: Mapping[str, Estimate]) -> list[str]:
        several = metrics.get("multi_attempt_rate")
        most = several.n if several else 0
        return [*(_cell(metrics.get(name), name, self.signed, most) for name in headline()), str(most)]


def paper_tables(summary: Summary) -> list[PaperTable]:
    """The tables of a run for which there are numbers."""
    interval = "95 % intervals clustered by direction (unsteered: by prompt)."
    conditions = sorted(summary.conditions, key=order)
    first = [name for name in conditions if name in FIRST]
    points = f"Differences from base on the same cells, rates in percentage points; {interval}"
    tables = [
        PaperTable("headline", f"The arms; {interval}", _by_condition(summary.arms, first)),
        PaperTable("paired", points, _by_condition(summary.paired, conditions), signed=True),
        PaperTable("conditions", f"Every condition; {interval}", _by_condition(summary.arms, conditions)),
        PaperTable(
            "not_degenerate",
            f"The arms without responses that the judge called degenerate; {interval}",
            _by_condition(summary.not_degenerate, conditions),
        ),
    ]
    return [table for table in tables if table.estimates]


def save_tables(folder: Path, summary: Summary) -> None:
    """Write `<name>.csv`, `.md` and `.tex` of every table; ratios, attacks, tasks, goals as CSV where there are any."""
    made = {"ratios.csv": _ratios(summary), "attacks.csv": _attacks(summary)}
    made |= {"tasks.csv": _tasks(summary), "goals.csv": _goals(summary)}
    files = {name: text for name, text in made.items() if text}
    for table in paper_tables(summary):
        files |= {
            f"{table.name}.csv": table.to_csv(),
            f"{table.name}.md": table.to_markdown(),
            f"{table.name}.tex": table.to_latex(),
        }
    for name, text in files.items():
        with replacing(folder / name) as file:
            file.write(text)


def _ratios(summary: Summary) -> str:
    """Resistance factors and perplexities over the base model's, a line each."""
    found = [("resistance", arm, (each.value, each.low, each.high, each.n)) for arm, each in summary.resistance.items()]
    found += [("perplexity", arm, (each.value, each.low, each.high, each.n)) for arm, each in summary.retention.items()]
    lines = [",".join(map(str, (name, arm, *numbers))) for name, arm, numbers in found]
    return "\n".join(["ratio,arm,value,low,high,n", *lines, ""]).replace("None", "") if lines else ""


def _tasks(summary: Summary) -> str:
    """What every arm scored in tasks, a line for each number."""
    lines = [
        f"{name},{arm},{key},{found.value},{found.low},{found.high},{found.n}"
        for arm, name, estimates in task_rows(summary)
        for key, found in estimates.items()
    ]
    return "\n".join(["task,arm,of,value,low,high,n", *lines, ""]).replace("None", "") if lines else ""


def _goals(summary: Summary) -> str:
    """What became of steering towards every goal, a line for each number; `<arm>-base`: differences on shared cells."""
    rows = [
        (goal, arm, name, found.value, found.low, found.high, found.n)
        for arm, goals in summary.goals.items()
        for goal, estimates in goals.items()
        for name, found in estimates.items()
    ]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([("goal", "arm", "measure", "value", "low", "high", "n"), *rows])
    return buffer.getvalue() if rows else ""


def _attacks(summary: Summary) -> str:
    """What every attack did to every arm, a line for each number and one for the base model's own last score."""
    rows = [
        (each.name, each.arm, name, "minus base" if minus else "", found)
        for each in attacks(summary)
        for minus, estimates in enumerate((each.own, each.paired))
        for name in (LAST, *SUCCESSES)
        if (found := estimates.get(name)) and found.n
    ]
    effects = [(name, "base", LAST, "minus unsteered", found) for name, found in summary.efficacy.items()]
    lines = [(*row[:-1], row[-1].value, row[-1].low, row[-1].high, row[-1].n) for row in [*effects, *rows]]
    buffer = io.StringIO()
    header = ("attack", "arm", "metric", "of", "value", "low", "high", "n")
    csv.writer(buffer, lineterminator="\n").writerows([header, *lines])
    return buffer.getvalue() if rows else ""


def _by_condition(arms: Table[Estimate], conditions: Sequence[str]) -> dict[str, dict[str, Mapping[str, Estimate]]]:
    groups = {name: {arm: found[name] for arm, found in arms.items() if name in found} for name in conditions}
    return {name: group for name, group in groups.items() if group}


def _cell(measured: Estimate | None, name: str, signed: bool, most: int) -> str:
    """Number and interval; how many responses it is of, where these are not the `most` that the line has."""
    text = shown(measured, METRICS[name].is_rate, signed)
    if not measured or not text:
        return "–"
    interval = f" [{text.interval.replace(' to ', ', ')}]" if text.interval else ""
    return text.value + interval + (f" of {measured.n}" if measured.n < most else "")


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _row(cells: "Sequence[str] | map[str]") -> str:
    return " & ".join(cells) + r" \\"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
