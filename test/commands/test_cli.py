"""The command line: bad input is one line that names the thing, exit code 1, and nothing is written."""

import pytest
from typer.testing import CliRunner

from omega_qvla_core.cli import app

runner = CliRunner()


def test_help_lists_the_verbs():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for verb in ("quantize", "eval", "train", "tabletop"):
        assert verb in result.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["quantize", "no_such_policy", "--out", "{tmp}/pack"], "no_such_policy"),
        (["quantize", "tabletop", "--recipe", "w3a3", "--out", "{tmp}/pack"], "w3a3"),
        (
            ["quantize", "tabletop", "--calibration", "{tmp}/none.safetensors", "--out", "{tmp}/pack"],
            "none.safetensors",
        ),
        (["train", "tabletop", "--demos", "{tmp}/empty", "--out", "{tmp}/run"], "empty"),
        (
            ["train", "tabletop", "--demos", "{tmp}/empty", "--out", "{tmp}/run", "--settings", '{"learning": 1}'],
            "'learning'",
        ),
        (["eval", "tabletop", "--checkpoint", "gone", "--rows", "unquantized,w4a16", "--out", "{tmp}/eval"], "gone"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, named, tmp_path, capfd):
    result = runner.invoke(app, [argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    error = result.output + capfd.readouterr().err
    assert result.exit_code == 1
    assert "error:" in error and named in error and "Traceback" not in error
    assert not (tmp_path / "pack").exists() and not (tmp_path / "run").exists()
