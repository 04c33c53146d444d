"""Parity with the official implementations: the vectors under tests/parity/ hold inputs, weights and outputs of their code (see the README there).

`HOME` says where the pieces live in this package: when one moves, change its line and nothing else.
"""
import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

VECTORS = Path(__file__).parent / "parity"
TOLERANCE = 1e-5
HOME = {  # piece of this package -> its module
    "Upsampler": "networks", "EMA": "core", "ramp": "core", "poly": "core",
    "consistency": "losses", "cross_entropy": "losses", "paste": "cutmix",
    "Clock": "clock", "load_task": "catalogue", "UniMatch": "unimatch", "CPS": "pseudo_labels", "PlainCPS": "pseudo_labels",
    "tsa_threshold": "uda", "class_mask": "pseudo_labels", "pseudo_label": "pseudo_labels", "kept": "pseudo_labels", "hard_loss": "pseudo_labels",
    "f_noise": "cct", "f_drop": "cct", "dropout": "cct", "con_msk": "cct", "obj_msk": "cct", "i_vat": "cct",
    "object_boxes": "cct", "sub_boxes": "cct", "g_cutout": "cct",
    "FCDiscriminator": "adversarial", "bce_map": "adversarial", "REAL": "adversarial", "FAKE": "adversarial", "PatchDiscriminator": "adversarial", "Pool": "adversarial",
    "upfirdn2d": "stylegan2", "minibatch_std": "stylegan2", "ModulatedConv": "stylegan2", "Generator": "stylegan2", "Discriminator": "stylegan2",
    "r1_penalty": "adversarial", "path_penalty": "stylegan2",
    "inversion_lr": "inversion", "sharp_cross_entropy": "inversion", "squared_dice_loss": "inversion",
}


def ours(*names):
    "Pieces of the package"
    found = [getattr(importlib.import_module(f"semiseg_nb.{HOME[n]}"), n) for n in names]
    return found[0] if len(found) == 1 else found


def read(name):
    "The arrays of a file as float32 or integer tensors; scalars as numbers, weights in a dict under 'sd'"
    arrays, weights = {}, {}
    with np.load(VECTORS / f"{name}.npz") as file:
        for key in file.files:
            value = file[key].astype(np.float32) if file[key].dtype == np.float16 else file[key]
            if key.startswith("sd."): weights[key.removeprefix("sd.")] = torch.from_numpy(value)
            else: arrays[key] = torch.from_numpy(value) if value.ndim else value.item()
    return arrays | ({"sd": weights} if weights else {})


def equal(mine, official):
    "Within 1e-5 of the official value, relative to its size"
    torch.testing.assert_close(torch.as_tensor(mine, dtype=torch.float64), torch.as_tensor(official, dtype=torch.float64), atol=TOLERANCE, rtol=TOLERANCE)


def gradient(value, of, seen_through=None): return torch.autograd.grad(value if seen_through is None else (value * seen_through).sum(), of)[0]


def weights_into(module, weights):
    "Load official weights; tensors that only one side has are none of the learnt ones"
    missing, unexpected = module.load_state_dict(weights, strict=False)
    learnt = {name for name, _ in module.named_parameters()}
    assert not unexpected and not learnt & set(missing), (missing, unexpected)
    return module


# ------------------------------------------------------------------ shared: averages, schedules

def test_averaged_weights():
    EMA, v = ours("EMA"), read("ema_decay0.9")
    student = nn.Linear(3, 2, bias=False)
    mean = EMA(student, 0.9)
    for now, official in zip(v["student"], v["teacher"]):
        with torch.no_grad(): student.weight.copy_(now)
        mean.update(student)
        equal(mean.net.weight.detach(), official)


@pytest.mark.parametrize("kind", ["sigmoid", "linear", "cosine", "log", "exp"])
def test_ramps(kind):
    ramp, v = ours("ramp"), read("schedules")
    equal([ramp(f, kind) for f in v["fraction"].tolist()], v[f"ramp_{kind}"])


@pytest.mark.parametrize("kind", ["linear", "log", "exp"])
def test_thresholds_of_annealing(kind):
    tsa_threshold, v = ours("tsa_threshold"), read("schedules")
    equal([tsa_threshold(f, 5, kind) for f in v["fraction"].tolist()], v[f"tsa_{kind}_C5"])


def test_learning_rate():
    poly, v = ours("poly"), read("schedules")
    equal([poly(f, 0.9) for f in v["fraction"].tolist()], v["poly_0.9"])


def test_learning_rate_of_an_inversion():
    inversion_lr, v = ours("inversion_lr"), read("schedules")
    equal([inversion_lr(f, 0.1) for f in v["fraction"].tolist()], v["inversion_lr_0.1"])


# ------------------------------------------------------------------ CCT

def light_decoder():
    "The official decoder's weights in ours; its last ReLU is applied by `published`"
    v = read("cct_upsampler")
    weights = {"scores.weight": v["scores"]} | {f"blocks.{i}.{name}": v[f"{name[0]}{i}"] for i in range(3) for name in ("weight", "bias")}
    return weights_into(ours("Upsampler")(12, 5, 8), weights), v


def published(decoder): return lambda e: decoder(e).relu()


def test_light_decoder():
    decoder, v = light_decoder()
    e = v["e"].requires_grad_()
    out = published(decoder)(e)
    equal(decoder(e).detach(), v["out_default"])
    equal(out.detach(), v["out_faithful"])
    equal(gradient(out, e, v["cot"]), v["grad_e"])


def test_perturbations():
    (f_noise, f_drop, dropout, con_msk, obj_msk), v = ours("f_noise", "f_drop", "dropout", "con_msk", "obj_msk"), read("cct_perturb")
    e, objects = v["e"], v["logits"].argmax(1) != 0
    equal(f_noise(e, v["noise"].expand_as(e)), v["f_noise"])
    equal(f_drop(e, torch.full((len(e), 1, 1, 1), v["gamma"])), v["f_drop"])
    equal(dropout(e, v["dropout_u"]), v["dropout"])
    equal(con_msk(e, objects), v["con_msk"])
    equal(obj_msk(e, objects), v["obj_msk"])


def test_virtual_adversarial_features():
    "The official probe has a fixed length, ours one in deviations of the features"
    (decoder, _), i_vat, v = light_decoder(), ours("i_vat"), read("cct_ivat")
    e = v["e"]
    equal(e.std((1, 2, 3), keepdim=True), v["std"])
    equal(i_vat(e, published(decoder), v["start"], v["xi"] / v["std"], v["eps"]) - e, v["r"])


def test_guided_cutout_erases_what_the_official_one_does_and_a_rim_of_one_cell():
    "Different on purpose: boxes of connected components, and every cell that a box touches, where the official code samples the nearest pixel"
    (object_boxes, sub_boxes, g_cutout), v = ours("object_boxes", "sub_boxes", "g_cutout"), read("cct_gcutout")
    boxes = sub_boxes(object_boxes(v["logits"].argmax(1) != 0), v["u"].view(2, 2).flip(1))
    assert np.array_equal(boxes, v["ours_sub"].numpy())
    out = g_cutout(v["e"], boxes, v["logits"].shape[-2:])
    equal(out, v["ours_out"])
    official, erased = v["official_mask_cells"][:, 0] == 0, ((out == 0) & (v["e"] != 0)).any(1)
    rim = F.max_pool2d(official[:, None].float(), 3, 1, 1)[:, 0] > 0
    assert (erased >= official).all() and (erased <= rim).all()
    for (_, top, bottom, left, right), mask in zip(boxes, v["official_mask_full"][:, 0] == 0):
        rows, cols = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert max(abs(top - int(rows[0])), abs(bottom - 1 - int(rows[-1])), abs(left - int(cols[0])), abs(right - 1 - int(cols[-1]))) <= 2


# "mse" and "kl" are the official losses times the number of classes; "js" is the definition
@pytest.mark.parametrize("kind, value, slope", [("mse", "mse_C", "grad_mse"), ("kl", "kl_C", "grad_kl"), ("js", "js_true", None)])
def test_distances(kind, value, slope):
    consistency, v = ours("consistency"), read("cct_losses")
    z = v["z"].requires_grad_()
    loss = consistency(z, v["q"], kind=kind)
    equal(loss.detach(), v[value])
    if slope: equal(gradient(loss, z), v[slope])


# ------------------------------------------------------------------ pseudo-labels

def test_cutmix_seg():
    "Pasted logits, one confidence rate per batch, squared error summed over the classes"
    (paste, pseudo_label, kept, consistency), v = ours("paste", "pseudo_label", "kept", "consistency"), read("cutmix_seg")
    teacher = torch.stack([v["teacher0"], v["teacher1"]], 1).flatten(0, 1)                # partners are neighbours
    everywhere, box = torch.ones(4, 12, 12, dtype=torch.bool), v["box"].repeat_interleave(2, 0)
    z_w = paste(box, teacher)[0][::2]
    rate = kept(pseudo_label(z_w, v["threshold"], everywhere[::2]), everywhere[::2])
    z = v["student"].requires_grad_()
    loss = rate * consistency(z, z_w.softmax(1), valid=everywhere[::2], kind="mse")
    equal(loss.detach(), v["loss"])
    equal(gradient(loss, z), v["grad"])


def test_classmix():
    "Half of the classes of each image, pasted onto the next one; hard labels, one confidence rate per batch"
    (class_mask, pseudo_label, kept, hard_loss), v = ours("class_mask", "pseudo_label", "kept", "hard_loss"), read("classmix")
    mask = class_mask(v["labels"], v["keys"])
    assert torch.equal(mask, v["mask"] == 1)
    p = torch.where(mask[:, None], v["soft"], v["soft"].roll(-1, 0))
    z_w, valid = p.clamp(min=1e-12).log(), torch.ones_like(mask)
    rate = kept(pseudo_label(z_w, v["threshold"], valid), valid)
    equal(rate, v["rate"])
    z = v["logits_student"].requires_grad_()
    loss = rate * hard_loss(z, pseudo_label(z_w, 0.0, valid), valid)
    equal(loss.detach(), v["loss"])
    equal(gradient(loss, z), v["grad"])


class Answers(nn.Module):
    "A network whose answers are given: with gradient those of the student, without it those of the teacher"

    def __init__(self, student, teacher=None):
        super().__init__()
        self.student, self.teacher = nn.Parameter(student), teacher

    def forward(self, x): return self.student if torch.is_grad_enabled() else self.teacher
    def encode(self, x): return [x]
    def decode(self, features, size): return self.student


def step_on(method, y, valid, **boxes):
    "The losses of one step when views change nothing, and validity and boxes are given: optimiser -> losses"
    class Given(ours("Clock")):
        def boxes(self, images, part=1.0, stream="cutmix"): return boxes[stream.replace(" ", "")]
    method.policies = []
    method.weak_view = lambda u, clock: (u, valid)
    method.strong_view = lambda x_w, clock, stream="strong": x_w
    blank = torch.rand(len(y), 3, *y.shape[1:])
    updates = method.updates({"image": blank, "mask": y}, {"image": blank}, Given(1, 2))
    return {name: losses for name, losses, *_ in updates}


def task(): return ours("load_task")("scenes", n_labelled=6, size=32)


def test_unimatch():
    "Our whole step; the official loss is half of ours"
    v = read("unimatch_loss")
    streams = ["pred_x", None, "pred_u_s1", "pred_u_s2", "pred_u_w_fp"]
    net = Answers(torch.cat([v[name or "pred_u_w"] for name in streams]))
    method = ours("UniMatch")(net, task(), threshold=v["threshold"], warmup=0.0)
    losses = step_on(method, v["mask_x"], v["valid"], cutmix=v["box1"], cutmix2=v["box2"])["net"]
    equal(losses["supervised"].detach(), v["loss_x"])
    equal(losses["strong"].detach(), (v["loss_u_s1"] + v["loss_u_s2"]) / 4)
    equal(losses["feature"].detach(), v["loss_u_w_fp"] / 2)
    total = sum(losses.values()) / 2
    equal(total.detach(), v["loss"])
    for name, slope in zip(streams, gradient(total, net.student).chunk(5)): equal(slope, v[f"grad_{name}"] if name else torch.zeros_like(slope))


def test_cps():
    "Our whole step; no pixel is unknown, for the official code would count it"
    v = read("cps")
    nets = [Answers(torch.cat([v[f"pred_sup_{side}"], v[f"pred_unsup_{side}"]])) for side in "lr"]
    method = ours("PlainCPS")(nets[0], task(), net_b=nets[1], weight=v["weight"], warmup=0.0)
    first, second = step_on(method, v["gts"], torch.ones_like(v["gts"], dtype=torch.bool)).values()
    equal(first["supervised"].detach(), v["loss_sup"])
    equal(second["supervised_b"].detach(), v["loss_sup_r"])
    equal((first["cross"] + second["cross_b"]).detach(), v["cps_loss"])
    for side, net, losses in zip("lr", nets, (first, second)):
        equal(gradient(sum(losses.values()), net.student), torch.cat([v[f"grad_pred_sup_{side}"], v[f"grad_pred_unsup_{side}"]]))


def test_cps_with_cutmix():
    "The cross losses of our whole step; the second batch of the official code is the first one, neighbours swapped"
    v = read("cps_cutmix")
    students = [v[f"logits_cons_stu_{i}"] for i in (1, 2)]
    nets = [Answers(torch.cat([torch.zeros_like(z), z]), v[f"logits_u0_tea_{i}"]) for i, z in enumerate(students, 1)]
    method = ours("CPS")(nets[0], task(), net_b=nets[1], weight=v["weight"], warmup=0.0)
    unknown = torch.full_like(v["box"], 255, dtype=torch.long)
    first, second = step_on(method, unknown, torch.ones_like(v["box"]), cutmix=v["box"]).values()
    equal((first["cross"] + second["cross_b"]).detach(), v["cps_loss"])
    for i, net, loss in ((1, nets[0], first["cross"]), (2, nets[1], second["cross_b"])):
        equal(gradient(loss, net.student)[2:], v[f"grad_logits_cons_stu_{i}"])


# ------------------------------------------------------------------ discriminators

def test_discriminator_of_advsemiseg():
    "With zeros around the maps as there (ours repeats the border), and before the answer is enlarged"
    v = read("advsemiseg_d")
    D = ours("FCDiscriminator")(4, ndf=2, n_layers=5)
    convs = [m for m in D.layers if isinstance(m, nn.Conv2d)]
    for i, conv in enumerate(convs):
        weights_into(conv, {"weight": v[f"w{i}"], "bias": v[f"b{i}"]})
        conv.padding_mode = "zeros"
    assert len(convs) == 5
    with torch.no_grad(): equal(D.layers(v["p"]), v["out_zero_padding"])


@pytest.mark.parametrize("kind", ["real", "fake"])
def test_losses_of_advsemiseg(kind):
    (bce_map, target), v = ours("bce_map", kind.upper()), read("advsemiseg_bce")
    z = v["logits"].requires_grad_()
    loss = bce_map(z, target, v["labels"] != 255)
    equal(loss.detach(), v[kind])
    equal(gradient(loss, z), v[f"grad_{kind}"])


def test_patch_discriminator_of_cyclegan():
    v = read("cyclegan_patchgan")
    D = weights_into(ours("PatchDiscriminator")(3, ndf=3, n_layers=2), v["sd"])
    with torch.no_grad(): equal(D(v["x"]), v["out"])


def test_pool_of_old_images(monkeypatch):
    "The official coin and place are fed in: above a half it returns an old image"
    v = read("image_pool")
    pool = ours("Pool")(v["size"], (1, 1, 1))
    for i, (coin, place, official) in enumerate(zip(v["coin"], v["place"], v["out"])):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *size, coin=coin, **_: torch.full(size, 1 - coin.item()))
            patch.setattr(torch, "randperm", lambda n, place=place, **_: (torch.arange(n) + place) % n)
            equal(pool(torch.full((1, 1, 1, 1), float(i)), torch.Generator()).flatten()[0], official)


# ------------------------------------------------------------------ StyleGAN2 and SemanticGAN

CHANNELS = {4: 8, 8: 6, 16: 4}


@pytest.mark.parametrize("name, how", [("up2_pad21", dict(up=2, pad=(2, 1))), ("down2_pad11", dict(down=2, pad=(1, 1))), ("pad21", dict(pad=(2, 1))),
                                       ("up2_pad_m1_3", dict(up=2, pad=(-1, 3)))])
def test_upfirdn2d(name, how):
    upfirdn2d, v = ours("upfirdn2d"), read("upfirdn2d")
    equal(upfirdn2d(v["x"], v["kernel"], **how), v[name])


@pytest.mark.parametrize("up", [0, 1])
def test_modulated_convolution(up):
    v = read(f"modulated_conv_up{up}")
    conv = ours("ModulatedConv")(6, 5, 3, 8, up=bool(up))
    weights_into(conv, {"weight": v["weight"], "style.weight": v["mod_weight"], "style.bias": v["mod_bias"]})
    with torch.no_grad(): equal(conv(v["x"], v["style"]), v["out"])


def test_minibatch_deviation():
    minibatch_std, v = ours("minibatch_std"), read("minibatch_std")
    equal(minibatch_std(v["x"]), v["out"])


def generator():
    "The network, its vectors and the noise maps that the official one was given"
    v = read("stylegan2_g16")
    return weights_into(ours("Generator")(16, 8, CHANNELS), v["sd"]), v, [v[f"noise{i}"] for i in range(5)]


def test_generator():
    G, v, noise = generator()
    with torch.no_grad():
        w = G.mapping(v["z"])
        equal(w, v["w"])
        equal(G.synthesis(w, noise)[0], v["out"])


def test_path_length_penalty():
    (G, _, noise), path_penalty, v = generator(), ours("path_penalty"), read("path_length_g16")
    w = v["w"].requires_grad_()
    image = G.synthesis(w, noise)[0]
    penalty, mean = path_penalty(image, w, torch.tensor(v["mean_before"]), v["direction"])
    slope = gradient(image, w, v["direction"] / math.sqrt(16 * 16))
    equal(slope.square().sum(2).mean(1).sqrt(), v["lengths"])
    equal(penalty.detach(), v["penalty"])
    equal(mean, v["mean_after"])


def test_discriminator_of_stylegan2():
    v = read("stylegan2_d16")
    D = weights_into(ours("Discriminator")(16, 3, CHANNELS), v["sd"])
    with torch.no_grad(): equal(D(v["x"]), v["out"])
    equal(ours("r1_penalty")(D, v["x"], 10.0).detach(), v["r1_gamma10"])


@pytest.mark.parametrize("name, piece, tau", [("ce", "sharp_cross_entropy", 0.1), ("dice", "squared_dice_loss", 0.3)])
def test_label_losses_of_semanticgan(name, piece, tau):
    v = read("semantic_label_losses")
    z = v["logits"].requires_grad_()
    loss = ours(piece)(z, v["labels"], tau)
    equal(loss.detach(), v[name])
    equal(gradient(loss, z), v[f"grad_{name}"])
