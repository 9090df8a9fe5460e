"""Every example runs as its first lines say, offline, and prints what it found."""

import json
import runpy
import sys

import pytest

from tests.conftest import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "make_rows": ("[steered towards ", "off_topic: ", "cue: ", "answer: "),
    "show_mask": ("29 of 68 tokens trained", "[[ Wait, that's not right.", "<|eot_id|>]]"),
    "train_with_injection": ("loss under each row's own steering: ",),
    "steer": ("jazz at 0.0 residual norms", "jazz at 1.0 residual norms", "generate() under "),
}
"""Words that an example's output must hold."""
SCREEN = 60
"""Lines that fit on one."""


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_an_example_runs_on_the_shipped_tiny_model(path, assets, monkeypatch, capsys):
    # As a script, but in this process: importing the libraries takes longer than most of them.
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().out
    assert said.strip()
    assert [words for words in SAYS.get(path.stem, ()) if words not in said] == []
    assert f"python examples/{path.name}" in path.read_text()


def test_there_are_examples_of_one_screen():
    assert {"make_rows", "measure", "show_mask", "steer", "train_with_injection"} <= {path.stem for path in EXAMPLES}
    assert {path.name: n for path in EXAMPLES if (n := len(path.read_text().splitlines())) > SCREEN} == {}


def test_the_notebook_was_executed_on_the_script_as_it_is():
    cells = json.loads((ROOT / "examples" / "steer.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script = (ROOT / "examples" / "steer.py").read_text(encoding="utf-8").split('"""', 2)[2]
    assert code[0] == "%cd -q .."
    assert "\n\n".join(code[1:]) == script.strip()
    printed = "".join(text for cell in cells for output in cell.get("outputs", ()) for text in output["text"])
    assert [words for words in SAYS["steer"] if words not in printed] == []
