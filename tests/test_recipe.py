from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edgecomp import recipe
from edgecomp.cli import main
from edgecomp.compress.distill import Distill
from edgecomp.errors import RecipeError

GOOD = """\
name: small
model: edgecomp.demo.model:build
data:
  train: edgecomp.calibration_data.sample:fashion_train
  evaluation:
    source: edgecomp.calibration_data.sample:fashion_test
    limit: 100
seed: 7
metric: accuracy
steps:
  - prune: {sparsity: 0.3}
    gates: ["drop < 0.1"]
    on_failure: rollback
  - distill:
      epochs: 3
  - quantize
exports:
  - tflite-int8
  - coreml-pal4: {group_size: 8}
gates:
  all: ["sqnr_db > 10"]
  tflite-int8: ["size_bytes < 1MB"]
"""


def read(tmp_path: Path, text: str) -> recipe.Document:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return recipe.read(path)


def test_a_good_recipe(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD).recipe
    assert [s.name for s in found.steps] == ["prune", "distill", "quantize"]
    assert found.steps[0].on_failure == "rollback" and found.steps[0].gates == ("drop < 0.1",)
    assert found.steps[1].build(found.seed) == Distill(epochs=3, seed=7)
    assert found.exports[1].settings == {"group_size": 8}
    assert found.data.evaluation.limit == 100
    assert found.gates_of("tflite-int8") == ("sqnr_db > 10", "size_bytes < 1MB")
    assert found.gates_of("coreml-pal4") == ("sqnr_db > 10",)


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("epochs: 3", "epocs: 3", 14, "no setting 'epocs'; did you mean 'epochs'?"),
        ("epochs: 3", "epochs: three", 14, "epochs is 'three'"),
        ("epochs: 3", "epochs: 0", 14, "epochs is 0; expected 1 or more"),
        ("prune:", "prunne:", 11, "unknown step 'prunne'; did you mean 'prune'?"),
        ("steps:", "stepps:", 10, "unknown key 'stepps'; did you mean 'steps'?"),
        ("limit:", "limt:", 7, "unknown key 'limt'; did you mean 'limit'?"),
        ("limit: 100", "limit: 0", 7, "greater than or equal to 1"),
        ("model: ", "modell: ", 2, "unknown key 'modell'; did you mean 'model'?"),
        ("- tflite-int8", "- tflite-int", 18, "unknown target 'tflite-int'; did you mean 'tflite-int8'?"),
        ("  tflite-int8: [", "  tflite-int9: [", 20, "unknown target 'tflite-int9'"),
        ("- quantize", "- quantize: 3", 16, "settings of 'quantize' are 3"),
        ("drop < 0.1", "drop 0.1", 11, "gate 'drop 0.1' is not understood"),
        ("rollback", "undo", 13, "'stop', 'rollback' or 'continue'"),
        ("metric: accuracy", "metric: acuracy", 9, "did you mean 'accuracy'?"),
        ("name: small", "name: [small", 2, "not valid YAML"),
        ("limit: 100", "preprocessing: {sizes: 3}", 7, "no setting 'sizes'; did you mean 'size'?"),
        ("limit: 100", "preprocessing: {std: [0.0]}", 7, "every value must be positive"),
    ],
)
def test_a_message_names_the_line_and_the_nearest_key(
    tmp_path: Path, old: str, new: str, line: int, says: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert str(caught.value).startswith(f"{tmp_path / 'recipe.yaml'}:{line}:")
    assert says in str(caught.value)


def test_missing_keys_files_and_other_documents(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="key 'data' is missing"):
        read(tmp_path, "model: a:b\n")
    with pytest.raises(RecipeError, match="expected keys such as model"):
        read(tmp_path, "- a\n- b\n")
    with pytest.raises(RecipeError, match="no recipe at"):
        recipe.read(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        recipe.read(tmp_path / "bytes.yaml")


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with pytest.raises(RecipeError, match="not valid YAML"):
        read(tmp_path, f"model: !!python/object/apply:os.mkdir ['{marker}']\n")
    assert not marker.exists()


@given(st.text(max_size=60))
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(RecipeError):
            recipe.read(path)


def test_the_command_prints_or_writes_the_schema(tmp_path: Path) -> None:
    printed = CliRunner().invoke(main, ["schema"])
    assert printed.exit_code == 0 and json.loads(printed.stdout) == json.loads(
        json.dumps(recipe.json_schema())
    )
    written = CliRunner().invoke(main, ["schema", "--out", str(tmp_path / "recipe.schema.json")])
    assert written.exit_code == 0 and written.stdout == ""
    assert (tmp_path / "recipe.schema.json").read_text() == printed.stdout


def test_the_schema_lists_steps_settings_and_targets() -> None:
    schema = json.loads(json.dumps(recipe.json_schema()))
    assert schema["$defs"]["step-distill"]["properties"]["temperature"]["default"] == 4.0
    assert schema["$defs"]["step-distill"]["additionalProperties"] is False
    assert "tflite-int8" in json.dumps(schema["$defs"]["ExportEntry"])
    assert {"model", "data"} <= set(schema["required"])
