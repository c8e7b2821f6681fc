"""``omega-qvla check layers`` and ``check ablation``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from omega_qvla_core.cli import app
from omega_qvla_core.quant.presets import ABLATIONS, GRID
from omega_qvla_core.quant.recipe import Recipe

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
runner = CliRunner()


def layer(rows=24, width=70, steps=3, tokens=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(rows, width, generator=generator),
        "x_calib": torch.randn(steps, tokens, width, generator=generator),
        "x_eval": torch.randn(steps, 10, width, generator=generator),
    }


def write(path, **layers):
    tensors = {f"{name}.{part}": tensor for name, parts in layers.items() for part, tensor in parts.items()}
    save_file(tensors, path)
    return path


@pytest.fixture
def file(tmp_path):
    layers = {"a": layer(), "block.3.o_proj": layer(rows=1, width=33, steps=1)}
    return write(tmp_path / "layers.safetensors", **layers)


def test_json_has_errors_per_layer_and_step(file):
    result = runner.invoke(app, ["check", "layers", str(file), "--json"])
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert set(printed) == {"recipe", "layers"} and printed["recipe"] == "executable_w4a4"
    assert set(printed["layers"]) == {"a", "block.3.o_proj"}
    for name, steps in (("a", 3), ("block.3.o_proj", 1)):
        found = printed["layers"][name]
        assert set(found) == {"error", "per_step"} and len(found["per_step"]) == steps
        assert 0 < found["error"] < 0.3


def test_recipe_and_activations_are_chosen(file):
    arguments = ["check", "layers", str(file), "--recipe", "w8a8", "--activations", "token", "--json"]
    printed = json.loads(runner.invoke(app, arguments).stdout)
    assert printed["recipe"] == "w8a8+token" and printed["layers"]["a"]["error"] < 0.03


def test_the_table_shows_ratios_to_a_reference(file, tmp_path):
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps({"a": {"paper_recipe": "x", "scores": {"x": {"w4a4": 1e9}}}}))
    result = runner.invoke(app, ["check", "layers", str(file), "--reference", str(reference)])
    assert result.exit_code == 0 and "0.000" in result.output and "block.3.o_proj" in result.output


def refused(*arguments, capfd):
    result = runner.invoke(app, ["check", *map(str, arguments)])
    text = result.output + capfd.readouterr().err
    assert result.exit_code == 1 and "Traceback" not in text
    assert text.count("error:") == 1
    return text


def broken(change):
    parts = layer()
    change(parts)
    return parts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("x_eval"), "a.x_eval"),
        (lambda parts: parts["weight"].__setitem__((0, 0), float("nan")), "a.weight holds NaN"),
        (lambda parts: parts["x_calib"].__setitem__((0, 0, 0), float("inf")), "a.x_calib holds NaN or Inf"),
        (lambda parts: parts["x_eval"].__setitem__((0, 0, 0), float("nan")), "a.x_eval holds NaN"),
        (lambda parts: parts.update(x_eval=torch.zeros(2, 5, 70)), "shapes"),
        (lambda parts: parts.update(x_calib=torch.zeros(3, 40, 71)), "shapes"),
        (lambda parts: parts.update(x_calib=torch.zeros(3, 0, 70)), "shapes"),
        (lambda parts: parts.update(x_calib=parts["x_calib"][:, :5].clone()), "layer a of .*5 tokens seen"),
        (lambda parts: parts.update(bias=torch.zeros(24)), "a.bias"),
    ],
)
def test_bad_files_are_one_line_that_names_the_layer(change, message, tmp_path, capfd):
    path = write(tmp_path / "bad.safetensors", a=broken(change))
    import re

    assert re.search(message, refused("layers", path, capfd=capfd))


def test_files_that_cannot_be_read_are_one_line(tmp_path, capfd):
    for content in (None, b"", b"not safetensors at all"):
        path = tmp_path / "layers.safetensors"
        if content is not None:
            path.write_bytes(content)
        assert "layers.safetensors" in refused("layers", path, capfd=capfd)


def test_unknown_recipes_activations_and_references_are_one_line(file, tmp_path, capfd):
    assert "did you mean" in refused("layers", file, "--recipe", "w4a9", capfd=capfd)
    assert "token_group" in refused("layers", file, "--activations", "tokens", capfd=capfd)
    reference = tmp_path / "reference.json"
    for content, message in (("{}", "none of the layers"), ('{"a": {}}', "scores"), ("{", "not valid JSON")):
        reference.write_text(content)
        assert message in refused("layers", file, "--reference", reference, capfd=capfd)
    assert "--reference" in refused("ablation", "--layers", file, capfd=capfd)


@pytest.mark.parametrize("families", [["pi05"], pytest.param(["pi05", "gr00t"], marks=pytest.mark.slow)], ids="+".join)
def test_actions_of_recorded_models_are_compared(families, tmp_path):
    out = tmp_path / "table.md"
    arguments = ["check", "ablation", "--policy", "", "--recipes", "w8a8,grid_none_rtn_onestep", "--out", str(out)]
    for family in families:
        arguments += ["--recorded", str(GOLDEN / family / "tiny")]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    header, _, eight, four = (line.split("|") for line in out.read_text().splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in header[2:-1]] == [f"{family}/tiny" for family in families]
    for column in range(2, 2 + len(families)):
        assert float(eight[column].split()[0]) < 0.1 * float(four[column].split()[0]) + 0.05


def test_recipes_of_the_ablation_load_by_name():
    assert len(GRID) == 16 and set(GRID) < set(ABLATIONS)
    for name in ABLATIONS:
        assert Recipe.load(name).name == name
    one = Recipe.preset("grid_svd_rtn_onestep").action_head
    assert (one.rotation, one.solver, one.per_step) == ("svd", "rtn", False)
    assert Recipe.preset("static_clip_hadamard").action_head.activation == "static_tensor"
    assert Recipe.preset("token_none").action_head.activation == "token"
