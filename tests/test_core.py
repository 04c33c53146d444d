"core: seeds, ramps, averages, files that are whole or absent, parameters of notebooks"
import copy
import errno
import math
import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from semiseg_nb import core
from semiseg_nb.core import (
    EMA,
    UserError,
    atomic_write,
    check_parameters,
    forever,
    frozen,
    generator,
    in_range,
    named_values,
    notebook_parameters,
    one_of,
    poly,
    ramp,
)

R = (0, 0.25, 0.5, 0.75, 1)


@pytest.mark.parametrize("kind, values", [
    ("sigmoid", (0.0067, 0.0601, 0.2865, 0.7316, 1)), ("linear", R), ("log", (0, 0.713, 0.918, 0.976, 0.9933)),
    ("exp", (0.0067, 0.0235, 0.0821, 0.287, 1)), ("cosine", (0, 0.146, 0.5, 0.854, 1)),
])
def test_ramps_have_the_published_values_and_are_clipped(kind, values):
    assert [ramp(r, kind) for r in R] == pytest.approx(values, abs=6e-4)
    assert ramp(-3, kind) == ramp(0, kind) and ramp(7, kind) == ramp(1, kind)


def test_poly_starts_at_one_and_ends_at_zero():
    assert poly(0) == 1 and poly(1) == 0 and poly(0.5) == pytest.approx(0.5**0.9) and poly(0.7, power=0) == 1


def test_streams_are_repeatable_and_independent():
    a = torch.rand(5, generator=generator(3, "labelled", 7))
    assert torch.equal(a, torch.rand(5, generator=generator(3, "labelled", 7)))
    for other in (generator(4, "labelled", 7), generator(3, "strong", 7), generator(3, "labelled", 8), generator(3, "labelled")):
        assert not torch.equal(a, torch.rand(5, generator=other))


def test_forever_shuffles_each_pass_anew_and_refuses_an_empty_loader():
    loader = torch.utils.data.DataLoader(range(20), batch_size=None, shuffle=True, generator=torch.Generator().manual_seed(0))
    stream = forever(loader)
    first, second = [next(stream) for _ in range(20)], [next(stream) for _ in range(20)]
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    with pytest.raises(UserError, match="at least one image"): next(forever([]))


def test_ema_with_a_constant_student_has_the_closed_form():
    student, a = nn.Linear(2, 2), 0.9
    ema = EMA(student, a)
    assert torch.equal(ema.net.weight, student.weight)
    ema.update(student)
    start = ema.net.weight.clone()
    target = torch.full_like(start, 3.0)
    with torch.no_grad(): student.weight.copy_(target)
    decays = 1.0
    for t in range(1, 40):
        ema.update(student)
        decays *= min(1 - 1 / (t + 1), a)
        torch.testing.assert_close(ema.net.weight, target + decays * (start - target))


def test_ema_averages_float_buffers_and_copies_integer_buffers():
    net = nn.BatchNorm1d(2)
    ema = EMA(net, 0.5)
    ema.update(net)
    net.train()(torch.randn(8, 2) + 4)
    before = ema.net.running_mean.clone()
    ema.update(net)
    torch.testing.assert_close(ema.net.running_mean, (before + net.running_mean) / 2)
    assert ema.net.num_batches_tracked == 1


def test_ema_survives_saving_and_gets_no_gradient():
    net = nn.Linear(1, 1)
    ema, other = EMA(net, 0.9), EMA(nn.Linear(1, 1), 0.9)
    for _ in range(3):
        with torch.no_grad(): net.weight.add_(1)
        ema.update(net)
    other.load_state_dict(ema.state_dict())
    with torch.no_grad(): net.weight.add_(1)
    ema.update(net), other.update(net)
    assert torch.equal(ema.net.weight, other.net.weight)
    assert not any(p.requires_grad for p in ema.parameters()) and not ema.train().net.training


def test_a_copy_of_a_frozen_network_is_itself():
    net = frozen(nn.Sequential(nn.BatchNorm2d(2)))
    other = copy.deepcopy(net)
    assert other.eval() is other and other[0].train() is other[0] and not other[0].training


def test_a_number_that_is_text_is_refused():
    with pytest.raises(UserError, match="lr is 'abc', but it should be at least 0"): in_range("lr", "abc", 0)


def test_frozen_keeps_batch_statistics():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    holder = nn.ModuleList([frozen(net)]).train()
    before = {k: v.clone() for k, v in holder.state_dict().items()}
    net(torch.randn(4, 1, 3, 3))
    assert all(torch.equal(v, before[k]) for k, v in holder.state_dict().items())
    assert not any(p.requires_grad for p in holder.parameters())


def test_one_of_names_the_choices_and_guesses():
    with pytest.raises(UserError, match=r"model 'unett' is not known \(did you mean 'unet'\?\): choose one of unet, deeplabv3"):
        one_of("unett", ["unet", "deeplabv3"], "model")
    assert one_of("unet", ["unet"], "model") == "unet"


class Full:
    "A disk that takes so many bytes, and then no more"
    def __init__(self, file, room): self.file, self.room = file, room
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *args): self.file.close()

    def write(self, data):
        self.room -= len(data)
        if self.room < 0: raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("writer", [lambda f: f.write(b"x" * 5000), lambda f: torch.save(torch.zeros(5000), f)], ids=["bytes", "torch"])
def test_a_full_disk_is_one_sentence_and_the_older_file_stays(tmp_path, monkeypatch, writer):
    path = atomic_write(tmp_path / "sub" / "a.bin", lambda f: f.write(b"old"))
    monkeypatch.setattr(core, "open", lambda *a: Full(open(*a), 1000), raising=False)
    with pytest.raises(UserError, match=r"Could not write .*a\.bin \(No space left on device\); the older file is untouched: free some space"):
        atomic_write(path, writer)
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["a.bin"]


def test_an_error_of_the_writer_is_not_taken_for_a_full_disk(tmp_path):
    def fails(f): raise RuntimeError("this tensor cannot write itself")
    with pytest.raises(RuntimeError, match="cannot write itself"): atomic_write(tmp_path / "a.bin", fails)
    assert not os.listdir(tmp_path)


def test_what_killed_processes_left_is_cleared_and_what_running_ones_write_stays(tmp_path):
    mine = core.temporary_name(tmp_path / "a.bin")
    dead = mine.with_name(mine.name.replace(str(os.getpid()), str(2**22 + 1)))
    for path in (mine, dead): path.write_text("")
    core.clear_temporaries(tmp_path)
    assert mine.exists() and not dead.exists()


@pytest.mark.parametrize(("text", "why"), [
    (b"{", "is no readable JSON"), (b"[1e999]", "no finite number"), (b"[NaN]", "NaN is no number"), (b"[1" + b"0" * 400 + b"]", "too large a number"),
    (b"[" * 100_000, "nested too deeply"), (b"\xff\xfe", "is no text"),
])
def test_json_that_is_none_is_refused_in_one_sentence(tmp_path, text, why):
    (tmp_path / "card.json").write_bytes(text)
    with pytest.raises(UserError, match=rf"The card .*card\.json .*{why}.*: train again\."): core.read_json(tmp_path / "card.json", "card", "train again")
    with pytest.raises(UserError, match="There is no card"): core.read_json(tmp_path / "none.json", "card")


class Shape:
    @core.checked
    def __init__(self, net, *, weight: core.NonNegative = 1.0, n: core.Count = 2, kind: Literal["weak", "strong"] = "weak", size: int | None = None,
                 mirror: bool = True):
        self.weight, self.n, self.kind, self.size, self.mirror = weight, n, kind, size, mirror


class Square(Shape):
    @core.checked
    def __init__(self, net, *, part: core.Fraction = 0.5, **shape):
        super().__init__(net, **shape)
        self.part = part


@pytest.mark.parametrize(("setting", "said"), [
    (dict(part=80), "part is 80, but it should be between 0 and 1"), (dict(part=float("nan")), "part is nan"), (dict(weight=-1), "weight is -1, but it should be at least 0"),
    (dict(n=0), "n is 0, but it should be a whole number at least 1|n is 0, but it should be at least 1"), (dict(n=1.5), "n is 1.5, but it should be a whole number"),
    (dict(n=True), "n is True, but"), (dict(kind="wek"), r"kind 'wek' is not known \(did you mean 'weak'\?\)"), (dict(mirror=1), "mirror is 1, but it should be True or False"),
    (dict(size="large"), "size is 'large', but"), (dict(weight=float("inf")), "weight is inf"), (dict(wieght=1), r"setting of Square 'wieght' is not known \(did you mean 'weight'\?\)"),
])
def test_a_setting_that_its_annotation_does_not_allow_is_refused(setting, said):
    with pytest.raises(UserError, match=said): Square(None, **setting)


class Nested:
    @core.checked
    def __init__(self, *, storage: dict, channels: dict[int, int] | None = None, critic: Mapping = {}):
        self.channels, self.critic, self.storage = channels, critic, storage


@pytest.mark.parametrize("setting", [
    dict(channels=64), dict(channels=[4, 8]), dict(channels=MappingProxyType({4: 8})), dict(critic="wide"), dict(critic=None), dict(critic=[("ndf", 8)]),
    dict(storage=None), dict(storage="stride=4"),
])
def test_settings_of_a_part_are_a_dictionary(setting):
    (name, value), = setting.items()
    with pytest.raises(UserError) as refusal: Nested(**{"storage": {}} | setting)
    assert str(refusal.value) == f"{name} is {value!r}, but it should be a dictionary of names and values."


def test_a_dictionary_passes_as_it_is():
    channels, critic, storage = {4: 8}, MappingProxyType({"ndf": 8}), OrderedDict(stride=4)
    parts = Nested(channels=channels, critic=critic, storage=storage)
    assert parts.channels is channels and parts.critic is critic and parts.storage is storage
    assert Nested(storage={}, channels=None).channels is None and Nested(storage={}, critic={"ndf": 8}).critic == {"ndf": 8}


def test_numbers_of_numpy_become_those_of_python():
    shape = Square(None, part=np.float32(0.25), n=np.int64(3), weight=2, mirror=np.bool_(False))
    assert [type(v) for v in (shape.part, shape.n, shape.weight, shape.mirror)] == [float, int, float, bool]
    assert (shape.part, shape.n, shape.weight, shape.mirror, shape.size) == (0.25, 3, 2.0, False, None)


def test_a_frozen_network_can_be_pickled_and_stays_frozen():
    net = pickle.loads(pickle.dumps(frozen(nn.Sequential(nn.BatchNorm2d(2)))))
    assert not nn.ModuleList([net]).train()[0][0].training


def test_a_folder_that_is_a_file_is_reported(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(UserError, match="Could not write"): atomic_write(tmp_path / "results" / "a.json", lambda f: f.write(b"x"))


CELL = "# parameters\nsteps = 900\nlr = 1e-3\nmodel = 'unet'\nencoder = None\nresume = True"
GOOD = {"steps": 900, "lr": 1e-3, "model": "unet", "encoder": None, "resume": True}


def test_known_parameters_pass():
    assert check_parameters(CELL, "# Parameters\nsteps = 5\nencoder = 'resnet18'\n", GOOD | {"steps": 5, "encoder": "resnet18", "lr": 1}) == \
        GOOD | {"steps": 5, "encoder": "resnet18", "lr": 1}


def test_unknown_parameter_is_named():
    with pytest.raises(UserError, match=r"parameter 'step' is not known \(did you mean 'steps'\?\)"): check_parameters(CELL, "step = 5", GOOD)


@pytest.mark.parametrize("name, value", [("steps", "many"), ("steps", 2.5), ("model", 3), ("resume", 1), ("steps", True)])
def test_a_parameter_of_another_type_is_named(name, value):
    with pytest.raises(UserError, match=f"parameter '{name}' is .*as in {name} = "): check_parameters(CELL, "", GOOD | {name: value})


@pytest.mark.parametrize("given, wanted", [("[96, 128]", [96, 128]), ([96, 128], [96, 128]), ("{'gan': {'lr': 1e-3}}", {"gan": {"lr": 1e-3}}),
                                           ("[96, ", "[96, "), ("resnet18", "resnet18"), (96, 96), (None, None)])
def test_a_list_may_come_as_text(given, wanted):
    "`papermill -p size \"[96, 128]\"` hands over a string, `-y` and other versions a list; the cells below find the list"
    cell, namespace = "# parameters\nsize = None\nname = 'x'", {"size": given, "name": "[a]"}
    assert notebook_parameters(namespace | {"In": [cell]}) == {"size": wanted, "name": "[a]"}
    namespace["In"] = [cell]
    notebook_parameters(namespace)
    assert namespace["size"] == wanted and namespace["name"] == "[a]", "text whose default is text stays text"


def test_a_list_as_text_is_still_of_the_right_kind():
    cell = "# parameters\nseeds = [0]\nsteps = 5"
    assert check_parameters(cell, "", {"seeds": "[0, 1]", "steps": 5}) == {"seeds": [0, 1], "steps": 5}
    with pytest.raises(UserError, match=r"parameter 'steps' is \[5\]"): check_parameters(cell, "", {"seeds": [0], "steps": "[5]"})
    with pytest.raises(UserError, match="parameter 'seeds' is '0, 1'"): check_parameters(cell, "", {"seeds": "0, 1", "steps": 5})


def test_notebook_parameters_reads_the_history_of_the_kernel():
    history = ["", "import x", CELL, "# Parameters\nsteps = 7\n", "params = notebook_parameters(globals())"]
    assert notebook_parameters({"In": history, **GOOD, "steps": 7})["steps"] == 7
    history[3] = "# Parameters\nstops = 7\n"
    with pytest.raises(UserError, match="'stops' is not known"): notebook_parameters({"In": history, **GOOD})
    with pytest.raises(UserError, match="Run the parameters cell first"): notebook_parameters({"In": [""]})


def test_half_life_of_the_average():
    assert round(math.log(0.5) / math.log(0.99)) == 69


def test_settings_from_a_command_line():
    assert named_values(["flip=False", "bank=None"]) == {"flip": False, "bank": None}
    with pytest.raises(UserError, match="'lr' has no value: write NAME=VALUE"): named_values(["lr"])
    with pytest.raises(UserError, match="setting 'strech' is not known .did you mean 'stretch'"): named_values(["strech=true"], ("stretch", "crop"))
    assert named_values(["lr=0.5", "skip=true", "size=[96,128]", "views=strong", "kinds=a=b"]) == {"lr": 0.5, "skip": True, "size": [96, 128], "views": "strong", "kinds": "a=b"}
