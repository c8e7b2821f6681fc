"""Checkpoint folders: what loads, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omega_qvla_core.checkpoints import folder as folder_module
from omega_qvla_core.checkpoints.description import DESCRIPTION_FILES
from omega_qvla_core.checkpoints.folder import (
    WEIGHTS_FILE,
    load_checkpoint,
    load_weights,
    resolve_folder,
    save_checkpoint,
)
from omega_qvla_core.errors import CheckpointError, ConfigError, OmegaQVLAError
from omega_qvla_core.runtime.random_policy import random_policy

A_WEIGHT = "action_in_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "random"
    random_policy(0).save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def test_weights_are_stored_in_bfloat16_and_loaded_in_float32(folder):
    assert {value.dtype for value in load_file(folder / WEIGHTS_FILE).values()} == {torch.bfloat16}
    _, model = load_checkpoint(folder)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert not model.training


def test_saving_a_loaded_checkpoint_gives_the_same_files(folder, tmp_path):
    save_checkpoint(*load_checkpoint(folder), tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted([*DESCRIPTION_FILES, WEIGHTS_FILE])
    for name in (*DESCRIPTION_FILES, WEIGHTS_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_official_key_lists_load(folder):
    tied = "paligemma_with_expert.paligemma.lm_head.weight"
    _, before = load_checkpoint(folder)

    def change(tensors):
        tensors["paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"] = tensors.pop(tied)
        tensors["paligemma_with_expert.gemma_expert.lm_head.weight"] = torch.zeros(5, 64)

    change_tensors(folder, change)
    _, after = load_checkpoint(folder)
    assert torch.equal(before.state_dict()[tied], after.state_dict()[tied])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(A_WEIGHT), f"lacks 1 tensors: {A_WEIGHT}"),
        (lambda t: t.update(extra=torch.zeros(2)), "has the unexpected 1 tensors: extra"),
        (lambda t: t.update({A_WEIGHT: torch.zeros(3, 4)}), f"tensor {A_WEIGHT} is F32 [3, 4]; config.json makes it"),
        (lambda t: t.update({A_WEIGHT: t[A_WEIGHT].to(torch.int8)}), f"tensor {A_WEIGHT} is I8"),
        (lambda t: t.clear() or t.update(a=torch.zeros(1)), "more; it has the unexpected 1 tensors: a"),
    ],
)
def test_wrong_tensors_are_named(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_refused_file_leaves_the_model_unchanged(folder):
    _, model = load_checkpoint(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    change_tensors(folder, lambda t: [value.zero_() for value in t.values()] and t.pop(A_WEIGHT))
    with pytest.raises(CheckpointError):
        load_weights(model, folder / WEIGHTS_FILE)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(folder, share):
    path = folder / WEIGHTS_FILE
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(folder)


def test_pickles_are_never_read(folder):
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing; a checkpoint folder"):
        load_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin beside it is a pickle"):
        load_checkpoint(folder)
    torch.save({"a": torch.zeros(1)}, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="holds a pickle"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", DESCRIPTION_FILES)
def test_missing_and_damaged_json_is_named(folder, name, monkeypatch):
    path = folder / name
    whole = path.read_text()
    for content in (whole[: len(whole) // 2], "", "[" * 100_000, "\udcff".encode("utf-8", "surrogateescape")):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(OmegaQVLAError, match=name):
            load_checkpoint(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_checkpoint(folder)


def test_a_huge_json_file_is_not_read(folder):
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match=r"tokenizer.json has 1073741824 bytes"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(family="gr00t"), "family is 'gr00t'"),
        (lambda c: c.update(format_version=2), "format_version is 2"),
        (lambda c: c.update(nam="x"), "unknown key 'nam'; did you mean 'name'"),
        (lambda c: c.update(name=""), "name is ''"),
        (lambda c: c["model"].update(action_dim=6), "lists 7 actions, model.action_dim is 6"),
        (lambda c: c["model"].update(vocab_size=5), "model.vocab_size is 5"),
        (
            lambda c: c["model"].update(action_horizon=8),
            "norm_stats.actions has shape (16, 7); the policy needs (8, 7)",
        ),
        (lambda c: c["policy"]["cameras"][1].update(height=64), "'wrist' is 64 x 56, model.vision.image_size is 56"),
        (lambda c: c["policy"]["state_names"].pop(), "'gripper' is delta"),
        (
            lambda c: c["model"].update(vision={"kind": "keypoint", "image_size": 64}),
            "'front' is 56 x 56, model.vision.image_size is 64",
        ),
    ],
)
def test_configurations_that_do_not_fit_are_refused(folder, change, message):
    change_json(folder / "config.json", change)
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_wrong_size_is_refused_before_memory_is_taken(folder):
    change_json(folder / "config.json", lambda c: c["model"].update(lm_mlp_dim=10**11))
    with pytest.raises(CheckpointError, match="mlp"):
        load_checkpoint(folder)


def test_shipped_names_resolve_and_are_listed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "SHIPPED", tmp_path / "policies")
    shutil.copytree(folder, tmp_path / "policies" / "some_policy")
    (tmp_path / "policies" / "unfinished").mkdir()
    assert resolve_folder("some_policy") == tmp_path / "policies" / "some_policy"
    assert resolve_folder(folder) == folder
    with pytest.raises(CheckpointError, match=r"no checkpoint folder 'none_such'; shipped names: some_policy$"):
        resolve_folder("none_such")
    with pytest.raises(CheckpointError, match="'some_polcy'; shipped names: some_policy; did you mean 'some_policy'"):
        resolve_folder("some_polcy")
    with pytest.raises(CheckpointError, match="is a file; give the checkpoint's folder"):
        resolve_folder(folder / WEIGHTS_FILE)
