"checkpoint: what is written can be read back, and nothing else is taken for it"
import json

import pytest
import torch
from safetensors.torch import save
from torch import nn

from semiseg_nb.checkpoint import fingerprint, load_weights, read_state, read_weights, save_weights, write_state
from semiseg_nb.core import UserError


def net(n=2): return nn.Sequential(nn.Conv2d(3, n, 1), nn.BatchNorm2d(n))


def test_names_with_dots_stay_apart_and_the_card_comes_back(tmp_path):
    for lr in (0.001, 0.002): save_weights(net(), tmp_path / f"uda_lr{lr}", {"lr": lr})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["uda_lr0.001.safetensors", "uda_lr0.002.safetensors"]
    assert read_weights(tmp_path / "uda_lr0.002")[1] == {"lr": 0.002}


@pytest.mark.parametrize("content", [b"", b"hello\n", b"{}", b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_a_text_file_is_no_checkpoint_and_no_weights(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="checkpoint.*checksum is missing.*choose another out_dir"): read_state(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no readable safetensors file .*copy or train it again"): load_weights(net(), tmp_path / "a")


@pytest.mark.parametrize("read", [read_state, lambda p: load_weights(net(), p)])
def test_a_file_that_may_not_be_read_is_never_to_be_deleted(tmp_path, monkeypatch, read):
    path = save_weights(net(), tmp_path / "a", {})
    def denied(self): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(type(path), "read_bytes", denied)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\): check the permissions") as e: read(path)
    assert "delete" not in str(e.value)
    monkeypatch.undo()
    path.unlink(), path.mkdir()
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"): read(path)


def test_every_flipped_bit_is_found(tmp_path):
    path = write_state(tmp_path / "a.pt", {"x": torch.arange(4.0)})
    whole = path.read_bytes()
    for i in range(0, len(whole), 37):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1:])
        with pytest.raises(UserError): read_state(path)


def test_a_card_that_was_changed_is_found(tmp_path):
    path = save_weights(net(), tmp_path / "a", {"lr": 0.001})
    path.write_bytes(path.read_bytes().replace(b"0.001", b"0.003"))
    with pytest.raises(UserError, match="card does not match its checksum"): read_weights(path)


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t.pop("0.bias"), "'0.bias' is missing"), (lambda t: t.update(more=torch.zeros(1)), "'more' is unknown"),
    (lambda t: t.update({"0.bias": torch.zeros(3)}), r"'0.bias' is \(3,\) there and \(2,\) here"),
    (lambda t: t.update({"0.bias": torch.zeros(2).half()}), "'0.bias' is float16"), (lambda t: t.update({"0.bias": torch.full((2,), float("nan"))}), "holds nan"),
])
def test_weights_with_other_tensors_are_refused_in_one_sentence(tmp_path, change, said):
    tensors = net().state_dict()
    change(tensors)
    (tmp_path / "a.safetensors").write_bytes(save(tensors, {"card": json.dumps({}), "fingerprint": fingerprint(tensors)}))
    with pytest.raises(UserError, match=said): load_weights(net(), tmp_path / "a")
