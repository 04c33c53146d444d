"The prediction bank: the properties of the average, what is stored, and a file that survives crashes, other runs and damage"
import copy
import errno
import json
import os
import pickle
import random
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import semiseg_nb.bank as bank_module
from semiseg_nb.bank import (
    BankNotes,
    FileRows,
    PredictionBank,
    average_to_fields,
    bank_bytes,
    cell_means,
    distribution,
    fields_to_average,
    fields_to_rows,
    in_image,
    in_view,
    last_positions,
    moving_average,
    read_notes,
    row_checksums,
    row_layout,
    rows_to_fields,
    storage_settings,
    write_notes,
)
from semiseg_nb.core import UserError, generator
from semiseg_nb.losses import consistency
from semiseg_nb.policies import flip_crop

STORAGE = {"float32": {"dtype": "float32"}, "float16": {}, "uint8": {"dtype": "uint8"}, "stride 2": {"stride": 2}, "top 2": {"topk": 2},
           "top 2, stride 4, uint8": {"dtype": "uint8", "stride": 4, "topk": 2}, "ram": {"place": "ram"}}
EXACT = {k: v for k, v in STORAGE.items() if k in ("float32", "float16", "ram")}
storages = pytest.mark.parametrize("kwargs", STORAGE.values(), ids=STORAGE)
INDEX = torch.tensor([1, 4])


def probabilities(seed, n=2, c=5, h=8, w=12): return torch.randn(n, c, h, w, generator=generator(seed, "p"), dtype=torch.float64).mul(2).softmax(1)


def everywhere(p): return torch.ones(len(p), *p.shape[-2:], dtype=torch.bool)


def filled(n_updates=4, n=6, index=(1, 4), **kwargs):
    "A bank with some updates of two of its images, and the predictions"
    bank, given = PredictionBank(n, 5, (8, 12), **kwargs), [probabilities(k) for k in range(n_updates)]
    for p in given: bank.update(torch.tensor(index), p, everywhere(p))
    return bank, given


def make_bank(folder, n=6, size=(8, 12), name="bank", **kwargs): return PredictionBank(n, 5, size, file=str(folder / name), **kwargs)


def stored(folder, updates=1):
    "A bank file with two known rows, closed; and what it holds"
    bank = make_bank(folder)
    for k in range(updates): bank.update(INDEX, probabilities(k), everywhere(probabilities(k)))
    bank.flush()
    return bank.accumulated(INDEX)[0]


def in_child(f):
    "Exit code of a forked process that calls f"
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            f()
            os._exit(0)
        finally: os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_the_average_is_the_closed_form():
    alpha, z = 0.6, torch.zeros(2, 5, 8, 12, dtype=torch.float64)
    given = [probabilities(k) for k in range(7)]
    for n, p in enumerate(given, 1):
        z = moving_average(z, p, everywhere(p), alpha)
        closed = (1 - alpha) * sum(alpha ** (n - k) * q for k, q in enumerate(given[:n], 1))
        torch.testing.assert_close(z, closed, atol=1e-12, rtol=0)
        torch.testing.assert_close(z.sum(1), torch.full_like(z[:, 0], 1 - alpha**n), atol=1e-12, rtol=0)
        torch.testing.assert_close(distribution(z), closed / (1 - alpha**n), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kwargs", EXACT.values(), ids=EXACT)
def test_a_float16_bank_holds_the_closed_form(kwargs):
    bank, given = filled(7, **kwargs)
    closed = (1 - 0.6) * sum(0.6 ** (7 - k) * p for k, p in enumerate(given, 1)) / (1 - 0.6**7)
    q, valid = bank.read(torch.tensor([1, 4]))
    assert valid.all() and q.dtype == torch.float32
    torch.testing.assert_close(q.double(), closed, atol=2e-3, rtol=0)
    torch.testing.assert_close(q.sum(1), torch.ones(2, 8, 12), atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_constant_predictions_come_back_unchanged(alpha):
    bank, p, index = PredictionBank(2, 5, (8, 12), alpha=alpha, dtype="float32"), probabilities(0), torch.tensor([0, 1])
    for n in range(1, 6):
        bank.update(index, p, everywhere(p))
        torch.testing.assert_close(bank.read(index)[0].double(), p, atol=1e-5, rtol=0)
        torch.testing.assert_close(bank.accumulated(index)[0].double(), (1 - alpha**n) * p, atol=1e-5, rtol=0)     # without the correction


def test_alpha_zero_keeps_the_last_prediction():
    bank, given = filled(alpha=0.0, dtype="float32")
    torch.testing.assert_close(bank.read(torch.tensor([1, 4]))[0].double(), given[-1], atol=1e-6, rtol=0)


@storages
def test_a_pixel_that_was_never_valid_is_no_target(kwargs):
    bank, p, index = PredictionBank(3, 5, (8, 12), **kwargs), probabilities(0), torch.tensor([2, 0])
    valid = everywhere(p)
    valid[:, :, 8:] = False
    for k in range(3): bank.update(index, probabilities(k), valid)
    bank.update(index, p, everywhere(p) & (torch.arange(12) < 4))                # the left third once more: other counts
    q, known = bank.read(index)
    assert known[:, :, :6].all() and not known[:, :, 9:].any()
    torch.testing.assert_close(q.sum(1)[known], torch.ones(int(known.sum())), atol=1e-3, rtol=0)
    z = torch.randn(2, 5, 8, 12, requires_grad=True)
    loss = consistency(z, q, None, known, "mse")
    other = q + 100 * (~known)[:, None]
    assert consistency(z, other, None, known, "mse") == loss and torch.isfinite(loss)


@storages
def test_an_empty_bank_gives_a_loss_of_zero_and_finite_gradients(kwargs):
    q, known = PredictionBank(3, 5, (8, 12), **kwargs).read(torch.tensor([0, 1]))
    z = torch.randn(2, 5, 8, 12, requires_grad=True)
    for kind in ("mse", "kl", "js"):
        loss = consistency(z, q, None, known, kind)
        assert loss == 0 and not known.any()
        assert torch.isfinite(torch.autograd.grad(loss, z)[0]).all()


def test_read_warps_along_with_the_view():
    bank, given = filled(1, dtype="float32")
    policy, index = flip_crop(scale=(1, 1), shift=0, flip=1.0), torch.tensor([1, 4])
    drawn = policy.sample(2, (8, 12), generator(0, "view"))
    q, known = bank.read(index, policy, drawn)
    assert known.all()
    torch.testing.assert_close(q, bank.read(index)[0].flip(3), atol=1e-6, rtol=0)
    shift = flip_crop(scale=(1, 1), shift=0.4, flip=0.0)
    drawn = shift.sample(2, (8, 12), generator(0, "view"))
    assert torch.equal(bank.read(index, shift, drawn)[1], shift.valid(drawn)) and not shift.valid(drawn).all()


@storages
def test_an_update_leaves_the_other_rows_alone(kwargs):
    bank, _ = filled(**kwargs)
    others = torch.tensor([0, 1, 2, 3, 5])
    before, row = bank.accumulated(others)[0], bank.accumulated(torch.tensor([4]))[0]
    p = probabilities(9, n=1)
    bank.update(torch.tensor([4]), p, everywhere(p))
    assert torch.equal(bank.accumulated(others)[0], before) and not torch.equal(bank.accumulated(torch.tensor([4]))[0], row)


@storages
def test_nbytes_is_the_formula_and_what_is_stored(kwargs, tmp_path):
    settings = {k: v for k, v in kwargs.items() if k != "place"}
    bank = PredictionBank(6, 5, (9, 13), **kwargs)
    assert bank.nbytes == bank_bytes(6, 5, (9, 13), **settings) == bank.rows.data.numel()
    filed = PredictionBank(6, 5, (9, 13), file=str(tmp_path / "bank"), **settings)
    assert filed.nbytes == bank_bytes(6, 5, (9, 13), copies=2, **settings) == (tmp_path / "bank").stat().st_size


@pytest.mark.parametrize("gigabytes, n, classes, size, settings", [
    (91.0, 10582, 21, (320, 320), {"dtype": "float32"}), (45.5, 10582, 21, (320, 320), {}), (2.84, 10582, 21, (320, 320), {"stride": 4}),
    (0.71, 10582, 21, (320, 320), {"stride": 8}), (0.36, 10582, 21, (320, 320), {"stride": 8, "dtype": "uint8"}),
    (474, 2975, 19, (1024, 2048), {"dtype": "float32"}), (14.8, 2975, 19, (1024, 2048), {"stride": 4}), (3.7, 2975, 19, (1024, 2048), {"stride": 8}),
    (0.066, 400, 5, (128, 128), {}), (0.47, 10582, 21, (320, 320), {"stride": 4, "topk": 2})])      # 0.41 without the counts of updates
def test_known_sizes(gigabytes, n, classes, size, settings):
    assert bank_bytes(n, classes, size, **settings) / 1e9 == pytest.approx(gigabytes, rel=0.02)


@storages
def test_a_bank_in_a_file_equals_one_in_memory_and_reopens(kwargs, tmp_path):
    settings = {k: v for k, v in kwargs.items() if k != "place"}
    memory, _ = filled(**settings)
    filed, _ = filled(file=str(tmp_path / "bank"), **settings)
    everyone = torch.arange(6)
    assert torch.equal(memory.accumulated(everyone)[0], filed.accumulated(everyone)[0])
    filed.flush()
    again = PredictionBank(6, 5, (8, 12), file=str(tmp_path / "bank"), **settings)
    assert torch.equal(memory.accumulated(everyone)[0], again.accumulated(everyone)[0])
    assert not PredictionBank(6, 5, (8, 12), file=str(tmp_path / "bank"), fresh=True, **settings).accumulated(everyone)[0].any()


@storages
@pytest.mark.parametrize("n, size", [(2, (8, 12)), (1, (9, 13)), (3, (1, 1))])
def test_what_is_packed_comes_back(kwargs, n, size):
    settings = {k: v for k, v in kwargs.items() if k != "place"}
    settings |= {"stride": min(settings.get("stride", 1), min(size))}
    layout = row_layout(5, size, **settings)
    topk, dtype, (h, w) = settings.get("topk", 0), settings.get("dtype", "float16"), layout[0][1][-2:]
    p, count = probabilities(0, n=n, h=h, w=w).float() * (1 - 0.6**3), torch.full((n, h, w), 3, dtype=torch.uint8)
    fields = average_to_fields(p, count, dtype, topk)
    rows = fields_to_rows(fields)
    assert rows.dtype == torch.uint8 and len(rows) == n
    for a, b in zip(fields, rows_to_fields(rows, layout)): assert torch.equal(a, b) and a.dtype == b.dtype
    z, _ = fields_to_average(rows_to_fields(rows, layout), 5, 0.6)
    torch.testing.assert_close(z.sum(1), p.sum(1), atol=5 / 510, rtol=0)
    kept = p.topk(topk or 5, 1).indices
    torch.testing.assert_close(z.gather(1, kept), p.gather(1, kept), atol=1 / 510 + 1e-6 if dtype == "uint8" else 2**-11, rtol=0)


def test_top_k_spreads_the_rest_evenly():
    p = torch.tensor([0.6, 0.2, 0.1, 0.1, 0.0]).view(1, 5, 1, 1) * 0.4                # after one update at alpha .6
    z, count = fields_to_average(average_to_fields(p, torch.ones(1, 1, 1, dtype=torch.uint8), "float32", 2), 5, 0.6)
    torch.testing.assert_close(distribution(z)[0, :, 0, 0], torch.tensor([0.6, 0.2, 0.2 / 3, 0.2 / 3, 0.2 / 3]), atol=1e-6, rtol=0)


def test_small_steps_stall_in_eight_bits():
    "An increment below half of 1/255 is lost: the known price of uint8"
    bank = PredictionBank(1, 2, (1, 1), alpha=0.99, dtype="uint8")
    fine = PredictionBank(1, 2, (1, 1), alpha=0.99, dtype="float32")
    for b in (bank, fine):
        for value in [0.5] * 400 + [0.6] * 400:
            p = torch.tensor([value, 1 - value]).view(1, 2, 1, 1)
            b.update(torch.tensor([0]), p, everywhere(p))
    assert fine.read(torch.tensor([0]))[0][0, 0] > 0.595 and bank.read(torch.tensor([0]))[0][0, 0] < 0.58


def test_low_resolution_averages_the_valid_pixels():
    p = torch.arange(16.0).view(1, 1, 4, 4)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, 0, 0], valid[0, 2:, 2:] = False, False
    small, seen = cell_means(p, valid, (2, 2))
    assert small[0, 0, 0, 0] == pytest.approx((1 + 4 + 5) / 3) and seen.tolist() == [[[True, True], [True, False]]]


def test_an_image_that_comes_twice_in_a_batch_is_stored_once():
    assert last_positions(torch.tensor([3, 1, 3, 3, 1])).tolist() == [3, 4, 3, 3, 4]
    bank, p = PredictionBank(4, 5, (8, 12), dtype="float32"), probabilities(0, n=3)
    bank.update(torch.tensor([2, 0, 2]), p, everywhere(p))
    torch.testing.assert_close(bank.read(torch.tensor([2, 0]))[0].double(), p[[2, 1]], atol=1e-6, rtol=0)


def test_one_update_at_once_or_at_the_end_of_the_epoch_is_the_same():
    "Every image comes once in an epoch, so nobody reads a row between its update and the end"
    now, later = (PredictionBank(6, 5, (8, 12), dtype="float32") for _ in range(2))
    for epoch in range(3):
        staged, targets = [], []
        for index in torch.randperm(6, generator=generator(epoch, "order")).split(2):
            p = probabilities(100 * epoch + int(index[0]))
            targets.append((now.read(index)[0], later.read(index)[0]))
            now.update(index, p, everywhere(p))
            staged.append((index, p))
        for index, p in staged: later.update(index, p, everywhere(p))
        assert all(torch.equal(a, b) for a, b in targets)
    assert same(now, later)


def test_a_torn_write_leaves_the_old_row(tmp_path):
    file = FileRows(tmp_path / "bank", 3, 8)
    index, row = torch.tensor([1]), torch.full((1, 8), 7, dtype=torch.uint8)
    file.write(index, row), file.flush()
    file.write(index, torch.full((1, 8), 9, dtype=torch.uint8))
    assert file.read(index)[0, 0] == 9
    file.file.rows[1 + 3 * int(file.live[1]), 4:] = 3                          # the second half never arrived
    file.file.map.flush()
    again = FileRows(tmp_path / "bank", 3, 8)
    assert torch.equal(again.read(index), row) and not again.read(torch.tensor([0, 2])).any()


def test_a_process_killed_in_the_middle_of_a_write_leaves_whole_rows(tmp_path):
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            file, everyone = FileRows(tmp_path / "bank", 64, 512), torch.arange(64)
            for value in range(1, 6): file.write(everyone, torch.full((64, 512), value, dtype=torch.uint8))
            file.flush()
            for value in range(6, 10):
                for i in everyone.split(1):
                    file.write(i, torch.full((1, 512), value, dtype=torch.uint8))
                    if value < 9 or i < 40: continue
                    file.file.rows[int(file.live[40]) * 64 + 40, :100] = 77           # a part of the row
                    os.kill(os.getpid(), signal.SIGKILL)
        finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (FileRows(tmp_path / "bank", 64, 512).read(torch.arange(64)) == 5).all()       # the last flush, whole


def test_a_bank_file_that_has_moved_on_is_refused(tmp_path):
    def make(**kwargs): return PredictionBank(6, 5, (8, 12), file=str(tmp_path / "bank"), **kwargs)
    bank, p, index = make(), probabilities(0), torch.tensor([0, 1])
    bank.update(index, p, everywhere(p))
    early = copy.deepcopy(bank.state_dict())
    at_early = bank.accumulated(index)[0]
    bank.update(index, p, everywhere(p))
    late = copy.deepcopy(bank.state_dict())
    again = make(fresh=True)
    again.load_state_dict(early)                                          # its successor was noted, but nothing was written after it
    assert torch.equal(again.accumulated(index)[0], at_early)
    bank = make(fresh=True)
    bank.load_state_dict(late)
    bank.update(index, p, everywhere(p))
    with pytest.raises(UserError, match=r"state 1 of the bank .*bank, which is at state 2, of this run or of another: begin again with resume=False\."):
        make(fresh=True).load_state_dict(early)
    make(fresh=True).load_state_dict(late)


def test_a_fresh_run_protects_the_checkpoint_of_the_old_one(tmp_path):
    def make(): return PredictionBank(6, 5, (8, 12), file=str(tmp_path / "bank"), fresh=True)
    bank, p, index = make(), probabilities(0), torch.tensor([0, 1])
    bank.update(index, p, everywhere(p))
    state, rows = copy.deepcopy(bank.state_dict()), bank.accumulated(index)[0]
    other = make()
    assert not other.accumulated(index)[0].any()
    other.update(index, probabilities(1), everywhere(p))                  # it begins, and dies before its first checkpoint
    old = make()
    old.load_state_dict(state)
    assert torch.equal(old.accumulated(index)[0], rows)


def test_a_bank_larger_than_the_memory_is_refused():
    with pytest.raises(UserError, match=r"The bank would take .* GB, but this computer has .* GB of memory: stride=4 makes it .*or keep it in a file\."):
        PredictionBank(10**7, 21, (320, 320))


def test_a_file_of_another_bank_or_a_bad_folder_is_refused(tmp_path):
    make_bank(tmp_path)
    with pytest.raises(UserError, match=r"The notes .*bank.places are of 6 images with 960 bytes each, not of 7 with 960, so .*: delete both to begin anew"):
        make_bank(tmp_path, n=7)
    with pytest.raises(UserError, match="are of 6 images with 960 bytes each, not of 3 with 1920"): make_bank(tmp_path, n=3, size=(16, 12))      # as many bytes
    (tmp_path / "plain").write_text("a file, not a folder")
    with pytest.raises(UserError, match="a part of its path is a file and no folder, so choose another file"): make_bank(tmp_path / "plain")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="it is a folder, so give the name of a file in it"): make_bank(tmp_path, name="folder")
    for odd in ("", ".", 5):
        with pytest.raises(UserError, match="file is .* but it should be the name of a file, or None"): PredictionBank(6, 5, (8, 12), file=odd)


@pytest.mark.parametrize("cause", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_known_by_its_cause_and_leaves_nothing(tmp_path, monkeypatch, cause):
    def full(*args): raise OSError(cause, "kein Platz")
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"The disk has no room for the bank .*bank of 0\.00 GB \(kein Platz\): free some space"): make_bank(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_limit_of_the_system_leaves_nothing(tmp_path):
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        with pytest.raises(UserError, match="The disk has no room for the bank"): make_bank(tmp_path)
    assert in_child(child) == 0 and not list(tmp_path.iterdir())


def test_a_file_is_for_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="A bank in a file is for one process"): PredictionBank(6, 5, (8, 12), file=str(tmp_path / "bank"))


# another run, another process
def test_a_second_run_on_one_file_is_refused_until_the_first_is_gone(tmp_path):
    "A killed process leaves no lock, and neither do the children that it started, as a data loader does"
    reader, writer = os.pipe()
    run = os.fork()
    if run == 0:
        bank = make_bank(tmp_path)
        bank.update(INDEX, probabilities(0), everywhere(probabilities(0)))
        worker = os.fork()
        if worker: os.write(writer, worker.to_bytes(8, "little"))
        time.sleep(60)
        os._exit(0)
    worker = int.from_bytes(os.read(reader, 8), "little")
    try:
        with pytest.raises(UserError, match=r"The bank .*bank is in use by another run: wait until it has ended, or choose another file\."): make_bank(tmp_path)
    finally:
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
    try: assert not make_bank(tmp_path).read(INDEX)[1].any()
    finally: os.kill(worker, signal.SIGKILL)
    assert {p.name for p in tmp_path.iterdir()} == {"bank", "bank.places"}


def test_a_later_bank_of_the_same_process_takes_the_file_over(tmp_path):
    "So that the cell of a notebook can be run twice"
    earlier = make_bank(tmp_path)
    earlier.update(INDEX, probabilities(0), everywhere(probabilities(0)))
    make_bank(tmp_path, fresh=True).update(INDEX, probabilities(1), everywhere(probabilities(1)))
    for use in (lambda: earlier.read(INDEX), earlier.flush, earlier.state_dict, lambda: earlier.update(INDEX, probabilities(1), everywhere(probabilities(1)))):
        with pytest.raises(UserError, match="was opened again by a later method of this process: give every method a file of its own"): use()


def test_a_bank_in_a_file_cannot_be_copied(tmp_path):
    bank = make_bank(tmp_path)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(UserError, match="cannot be copied or pickled: save a checkpoint"): copied(bank)
    assert same(*(copy.deepcopy(filled()[0]) for _ in range(2)))


# damage
def test_a_flipped_bit_of_the_rows_is_found(tmp_path):
    held, raw, draw = stored(tmp_path), (tmp_path / "bank").read_bytes(), random.Random(0)
    known = read_notes(tmp_path / "bank.places", 6, 960)
    assert known.places.tolist() == [2, 0, 2, 2, 0, 2] and known.sums[INDEX].gt(0).all()
    assert torch.equal(make_bank(tmp_path).accumulated(INDEX)[0], held)
    for _ in range(60):
        at, bit, damaged = draw.randrange(len(raw)), draw.randrange(8), bytearray(raw)
        damaged[at] ^= 1 << bit
        (tmp_path / "bank").write_bytes(damaged)
        bank = make_bank(tmp_path)
        if at // 960 in (1, 4):
            with pytest.raises(UserError, match=rf"bank is damaged, the checksum of image {at // 960} is wrong: restore both files from a backup"): bank.read(INDEX)
        else: assert torch.equal(bank.accumulated(INDEX)[0], held)                  # another place: nobody reads it


def test_a_flipped_bit_of_the_notes_is_found(tmp_path):
    stored(tmp_path)
    path = tmp_path / "bank.places"
    raw = path.read_bytes()
    assert len(raw) == 41 + 6 * 5 + 4
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"bank\.places .*choose another file\."): read_notes(path, 6, 960)
    path.write_bytes(raw)
    assert read_notes(path, 6, 960).flushes == 1


OLD = {"places": torch.zeros(6, dtype=torch.uint8), "generation": 1, "changed": False}             # of the first edition
HUGE = bank_module.NOTES_HEAD.pack(bank_module.NOTES_MARK, 2**62, 2**62, -1, 255)
ODD = {"nothing": b"", "text": b"places: none\n" * 100, "json": b'{"places": [1e400, NaN]}', "zeros": bytes(75), "nan": b"\xff" * 75,
       "random": random.Random(0).randbytes(75), "pickle": pickle.dumps({"places": print}), "number": pickle.dumps(float("nan")), "old": OLD,
       "module": nn.Linear(2, 2), "huge": HUGE, "huge, long": HUGE + bytes(34), "mark": bank_module.NOTES_MARK, "large": b"x" * 10**6}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_notes_are_one_sentence(tmp_path, odd):
    stored(tmp_path)
    rows = (tmp_path / "bank").read_bytes()
    path = tmp_path / "bank.places"
    if isinstance(odd, bytes): path.write_bytes(odd)
    else: torch.save(odd, path)
    with pytest.raises(UserError, match=r"bank\.places .*: .*(delete both to begin anew, or choose another file)\.$") as e: make_bank(tmp_path)
    assert "\n" not in str(e.value) and (tmp_path / "bank").read_bytes() == rows


@pytest.mark.parametrize("left", [0, 1, 20, 40, 41, 60, 74])
def test_cut_notes_are_one_sentence(tmp_path, left):
    stored(tmp_path)
    path = tmp_path / "bank.places"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match=r"bank\.places .*choose another file\.$"): make_bank(tmp_path)


def test_notes_come_back(tmp_path):
    notes = BankNotes(torch.tensor([0, 1, 2], dtype=torch.uint8), torch.tensor([7, 2**32 - 1, 0]), 2**40, True)
    write_notes(tmp_path / "n", notes, 8)
    back = read_notes(tmp_path / "n", 3, 8)
    assert torch.equal(back.places, notes.places) and torch.equal(back.sums, notes.sums) and (back.flushes, back.changed) == (2**40, True)
    rows = torch.tensor([[1, 2, 3], [0, 0, 0]], dtype=torch.uint8)
    assert row_checksums(rows).tolist() == [0x55BC801D, 0xFF41D912]


def test_a_folder_or_a_closed_file_in_place_of_the_notes(tmp_path, monkeypatch):
    stored(tmp_path)
    def closed(*args): raise PermissionError(errno.EACCES, "Permission denied")
    with monkeypatch.context() as m:
        m.setattr(bank_module, "open", closed, raising=False)
        with pytest.raises(UserError, match=r"bank\.places cannot be opened \(Permission denied\): allow this user to read and write it") as e: make_bank(tmp_path)
        assert "delete" not in str(e.value)
    with monkeypatch.context() as m:
        m.setattr(os, "open", closed)
        with pytest.raises(UserError, match=r"The bank .*bank cannot be opened \(Permission denied\): allow this user") as e: make_bank(tmp_path)
        assert "delete" not in str(e.value)
    (tmp_path / "bank.places").unlink()
    (tmp_path / "bank.places").mkdir()
    with pytest.raises(UserError, match=r"bank\.places cannot be opened .* it is a folder"): make_bank(tmp_path)


def test_a_file_that_is_no_bank_is_left_alone(tmp_path):
    for content in (b"the only copy of a thesis", bytes(11520)):
        (tmp_path / "bank").write_bytes(content)
        with pytest.raises(UserError, match="has no notes bank.places beside it, so it is not taken for a bank: delete it if it is one, or choose another file"):
            make_bank(tmp_path, fresh=True)
        assert (tmp_path / "bank").read_bytes() == content and len(list(tmp_path.iterdir())) == 1


def test_a_bank_that_lost_a_part_is_refused(tmp_path):
    stored(tmp_path)
    with open(tmp_path / "bank", "r+b") as f: f.truncate(5000)
    with pytest.raises(UserError, match="has 5000 bytes where 11520 are expected, so it is not whole: restore both files from a backup, or delete both"): make_bank(tmp_path)


def test_notes_that_cannot_be_written_are_told_before_the_first_step(tmp_path, monkeypatch):
    def refused(*args): raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(UserError, match=r"bank\.places \(Read-only file system\)"): make_bank(tmp_path / "new folder")
    assert not list((tmp_path / "new folder").iterdir())


def test_what_a_killed_start_left_is_cleared(tmp_path):
    make_bank(tmp_path)
    with open(tmp_path / "bank", "r+b") as f: f.truncate(4096)                        # killed while the disk was reserved
    (tmp_path / ".bank.places.4242.tmp").write_bytes(b"half")
    (tmp_path / ".other.places.4242.tmp").write_bytes(b"of somebody else")
    bank = make_bank(tmp_path)
    assert not bank.accumulated(torch.arange(6))[0].any() and (tmp_path / "bank").stat().st_size == 11520
    assert {p.name for p in tmp_path.iterdir()} == {"bank", "bank.places", ".other.places.4242.tmp"}


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    "Also where the counts agree: its checksums are others"
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    stored(tmp_path / "a"), stored(tmp_path / "b", updates=2)
    states = {name: copy.deepcopy(make_bank(tmp_path / name).state_dict()) for name in "ab"}
    with pytest.raises(UserError, match=r"belongs to state 1 of the bank .*, which is at state 1, of this run or of another"): make_bank(tmp_path / "a").load_state_dict(states["b"])
    make_bank(tmp_path / "a").load_state_dict(states["a"])
    broken = states["a"] | {"rows.live": torch.full((6,), 9, dtype=torch.uint8)}
    with pytest.raises(UserError, match="begin again with resume=False"): make_bank(tmp_path / "a").load_state_dict(broken)
    os.replace(tmp_path / "b/bank", tmp_path / "a/bank")                                # the rows of another run under the same notes
    bank = make_bank(tmp_path / "a", fresh=True)
    bank.load_state_dict(states["a"])
    with pytest.raises(UserError, match="the checksum of image 1 is wrong"): bank.read(INDEX)


# frames and settings
def test_in_image_is_the_way_back(tmp_path):
    z = torch.randn(2, 5, 8, 12, generator=generator(0, "z"))
    mirror = flip_crop(scale=(1, 1), shift=0, flip=1.0)
    drawn = mirror.sample(2, (8, 12), generator(0, "view"))
    own = torch.rand(2, 8, 12, generator=generator(1, "own")) < 0.7
    p, known = in_image(z, own, mirror, drawn)
    assert torch.equal(known, own.flip(2))
    torch.testing.assert_close(p, z.flip(3).softmax(1), atol=1e-6, rtol=0)
    q, valid = in_view(p, (8, 12), mirror, drawn)
    assert valid.all() and torch.allclose(q, z.softmax(1), atol=1e-6)


@pytest.mark.parametrize("kwargs, text", [
    ({"alpha": 1.0}, "alpha is 1.0, but it should be between 0 and 0.999"), ({"alpha": float("nan")}, "alpha is nan"), ({"dtype": "float8"}, "dtype 'float8' is not known"),
    ({"stride": 0}, "stride is 0"), ({"stride": 9}, "stride is 9"), ({"topk": 9}, "topk is 9"), ({"topk": -1}, "topk is -1"), ({"place": "cloud"}, "place 'cloud' is not known"),
    ({"fresh": 1}, "fresh is 1"), ({"dtpye": "uint8"}, "'dtpye' is not known .did you mean 'dtype'")])
def test_a_wrong_setting_is_named(kwargs, text):
    with pytest.raises(UserError, match=text): PredictionBank(6, 5, (8, 12), **kwargs)


def test_more_classes_than_a_byte_can_name_are_refused_with_topk():
    with pytest.raises(UserError, match="topk is 2, but a class is stored as one byte and there are 300 classes: use topk=0"): PredictionBank(1, 300, (4, 4), topk=2)
    PredictionBank(1, 300, (4, 4)), PredictionBank(1, 256, (4, 4), topk=2)


def test_storage_settings_are_checked_by_name():
    assert storage_settings(None) == {} and storage_settings({"stride": 4}) == {"stride": 4}
    with pytest.raises(UserError, match="storage setting 'strid' is not known .did you mean 'stride'.*choose one of dtype, stride, topk, place, file"): storage_settings({"strid": 4})
    with pytest.raises(UserError, match="storage setting 'alpha' is not known"): storage_settings({"alpha": 0.5})
    with pytest.raises(UserError, match="storage is 'stride=4', but it should be a dictionary such as"): storage_settings("stride=4")


# the lesson
def test_the_solutions_of_the_exercises():
    lesson = json.loads((Path(__file__).resolve().parents[1] / "nbs/15_bank.ipynb").read_text(encoding="utf-8"))
    cells = {c["id"]: "".join(c["source"]) for c in lesson["cells"]}
    code, = re.findall(r"```python\n(.*?)```", cells["solutions"], re.S)
    names = {"bank_bytes": bank_bytes}
    exec(code, names)
    empty = [cells[f"exercise-{i}"].removeprefix("# ").strip() for i in (1, 2, 3)]
    assert set(empty) == {"smallest_stride", "share_of_first", "stalls"} <= set(names) and code.count("assert") == 3
