"""The notebook that the README opens runs from its first cell to its last."""

import json
import re
import sys

import pytest

from running import ROOT, run
from tiny import lora_tensors


NOTEBOOK = ROOT / "tests" / "notebook.ipynb"

# What Jupyter does with a notebook: the cells in order, in one namespace; a cell's last expression is shown.
RUN_CELLS = """
import ast, json, sys
from pathlib import Path

notebook, shown = (Path(path) for path in sys.argv[1:])
namespace = {"__name__": "__main__"}
for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
    if cell["cell_type"] == "code":
        body = ast.parse("".join(cell["source"]), f"cell {number}").body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), namespace)
        value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace) if last else None
        if hasattr(value, "_repr_png_"):
            (shown / f"{number}.png").write_bytes(value._repr_png_())
"""


@pytest.fixture(scope="module")
def finished(tiny_model, shared_photos, tmp_path_factory):
    """The folder of a run of the whole notebook on the tiny model: two steps, then two more."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "shown").mkdir()
    environment = {
        "MODEL_NAME": str(tiny_model),
        "INSTANCE_DIR": str(shared_photos),
        "OUTPUT_DIR": str(folder / "lora"),
        "STEPS": "2",
        "HF_HOME": str(folder / "hf"),  # where write_basic_config writes
        "ACCELERATE_USE_CPU": "1",
    }
    run([sys.executable, "-c", RUN_CELLS, NOTEBOOK, folder / "shown"], environment, cwd=NOTEBOOK.parent)
    return folder


def test_the_notebook_configures_trains_goes_on_and_uses_the_lora(finished):
    assert (finished / "hf" / "accelerate" / "default_config.yaml").is_file()
    assert lora_tensors(finished / "lora")
    assert json.loads((finished / "lora" / "run.json").read_text())["steps"] == 4


def test_the_notebook_shows_the_contact_sheet_and_a_picture_of_the_lora(finished):
    from PIL import Image

    sheet, picture = (Image.open(path) for path in sorted((finished / "shown").iterdir(), key=lambda p: int(p.stem)))
    assert sheet.height > 2 * 64  # before the first step and after two
    assert picture.size == (64, 64)


def test_the_notebook_is_saved_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if "outputs" in cell)
    assert not re.search(r"/(home|root|Users)/|[A-Z]:\\\\", NOTEBOOK.read_text(encoding="utf-8"))
