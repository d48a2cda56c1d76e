from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

import recipes.replacing
from recipes.checkpoint import (
    load_parameters,
    read_json,
    read_tensors,
    seal,
    verify,
    write_json,
    write_tensors,
)
from recipes.errors import CheckpointError


@pytest.fixture
def full_disk(monkeypatch):
    """Fails when what was written is flushed, as a full disk does, with the partial file there."""

    def fail(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recipes.replacing, "flush", fail)


def test_tensors_come_back_bit_for_bit_even_if_they_share_memory(tmp_path):
    tied = torch.randn(3, 4)
    tensors = {
        "a": tied,
        "b": tied,
        "t": tied.T,
        "half": torch.randn(2).bfloat16(),
        "none": torch.empty(0, 2),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    back = read_tensors(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("write", [write_tensors, write_json])
def test_a_failed_write_leaves_what_stood_there(tmp_path, write, full_disk, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(CheckpointError, match="No space left"):
        write(path, {})
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("read", "name"), [(read_tensors, "x.safetensors"), (read_json, "x.json")])
def test_reading_what_is_missing_or_truncated(tmp_path, read, name):
    path = tmp_path / name
    with pytest.raises(CheckpointError, match="is missing"):
        read(path)
    write_tensors(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="damaged"):
        read(path)


def test_parameters_take_what_fits_and_its_type():
    module = nn.Linear(2, 3).bfloat16()
    weight = torch.randn(3, 2)
    load_parameters(module, {"weight": weight}, Path("x"))
    assert torch.equal(module.weight, weight)
    assert module.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [{"weigth": torch.ones(3, 2)}, {"bias": torch.ones(4)}])
def test_what_does_not_fit_changes_nothing(wrong):
    module = nn.Linear(2, 3)
    before = module.weight.clone()
    with pytest.raises(CheckpointError, match="does not fit the student"):
        load_parameters(module, {"weight": torch.zeros(3, 2), **wrong}, Path("x"))
    assert torch.equal(module.weight, before)


def test_a_sealed_folder_is_verified_file_by_file(tmp_path):
    (tmp_path / "sub").mkdir()
    files = [tmp_path / "a", tmp_path / "sub" / "b"]
    for file in files:
        file.write_bytes(b"12345")
    seal(tmp_path)
    verify(tmp_path)
    (tmp_path / "later").write_bytes(b"")
    verify(tmp_path)
    files[1].write_bytes(b"123")
    with pytest.raises(CheckpointError, match="b is truncated: 3 bytes instead of 5"):
        verify(tmp_path)
    files[1].unlink()
    with pytest.raises(CheckpointError, match="b is missing"):
        verify(tmp_path)
