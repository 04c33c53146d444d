"Networks: two halves that join, any size, every weight trained, encoders of timm, weights from files, errors in one sentence"
import contextlib
import socket
import time

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from semiseg_nb.core import EMA, UserError, seed_everything
from semiseg_nb.models import (
    AtStride8,
    EncoderNet,
    build_model,
    encoder_name,
    load_pretrained,
    read_pretrained,
    stride8_encoder,
)
from semiseg_nb.networks import DeepLabV3, PSPNet, PyramidPooling, UNet, Upsampler, count_parameters

OURS = ["unet", "deeplabv3", "psp"]
TINY = ["resnet18", "convnext_atto", "mobilenetv3_small_050"]


@pytest.fixture(autouse=True)
def seeded():
    seed_everything(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(*size, n=1): return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model", OURS)
def test_forward_is_decode_of_encode(model):
    net, x = build_model(model, 5, width=8).eval(), images(48, 64, n=2)
    features = net.encode(x)
    assert all(a.shape[-1] >= b.shape[-1] for a, b in zip(features, features[1:])), "finest first"
    assert torch.equal(net.decode(features, x.shape[-2:]), net(x))
    assert net.decode(features, (96, 128)).shape == (2, 5, 96, 128), "any size may be asked for"


@pytest.mark.parametrize("model", OURS)
@pytest.mark.parametrize("size", [(64, 64), (37, 53), (9, 17), (61, 8), (1, 1), (90, 120)])
def test_any_size_gives_logits_of_that_size(model, size):
    assert build_model(model, 3, width=4).eval()(images(*size)).shape == (1, 3, *size)


@pytest.mark.parametrize("model", OURS)
@pytest.mark.parametrize("n_classes", [2, 7, 21])
def test_one_channel_per_class(model, n_classes):
    assert build_model(model, n_classes, width=4).eval()(images(16, 16)).shape[1] == n_classes


@pytest.mark.parametrize("model", OURS)
def test_gradient_reaches_every_parameter_at_batch_one(model):
    net = build_model(model, 4, width=4).train()
    F.cross_entropy(net(images(32, 32)), torch.randint(0, 4, (1, 32, 32))).backward()
    for name, p in net.named_parameters(): assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("model", OURS)
def test_gradient_reaches_the_whole_image(model):
    net, x = build_model(model, 4, width=16).eval(), images(24, 24).requires_grad_()
    net(x).square().sum().backward()
    assert (x.grad.abs().sum(1) > 0).float().mean() > 0.99


@pytest.mark.parametrize("model", OURS)
def test_normalisation_is_inside(model):
    net = build_model(model, 3, width=4, mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.3)).eval()
    plain = build_model(model, 3, width=4, mean=(0, 0, 0), std=(1, 1, 1)).eval()
    weights = {k: v for k, v in net.state_dict().items() if k not in ("mean", "std")}
    plain.load_state_dict(weights, strict=False)
    x = images(16, 16)
    shifted = (x - torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1)) / torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(net(x), plain(shifted), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", OURS)
def test_channels_last_gives_the_same(model):
    net, x = build_model(model, 4, width=8).eval(), images(40, 24, n=2)
    a = net(x)
    b = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["unet", "deeplabv3"])  # the bins of a PSPNet divide the whole map: every shift changes what they hold
def test_shifts_by_the_stride_move_the_output_and_others_do_not(model):
    if model == "deeplabv3": net = DeepLabV3(4, 4, rates=(1,)).eval()
    else: net = UNet(4, 4).eval()
    x = images(64, 320)
    def change(s):
        with torch.no_grad(): a, b = net(x[..., 64:-64]), net(x[..., 64 - s:-64 - s])
        return float((a[..., 80:-80] - b[..., 80 + s:-80 + s]).abs().mean() / a.abs().mean())
    if model == "deeplabv3":  # its image pooling sees the whole image, which a shift changes: switch it off
        net.aspp.whole[0].weight.data.zero_()
    assert change(8) < 1e-5 and change(3) > 100 * max(change(8), 1e-8)


@pytest.mark.parametrize("model", OURS)
def test_half_precision_trains(model):
    net = build_model(model, 4, width=4).train().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16): loss = F.cross_entropy(net(images(37, 40, n=2)).float(), torch.randint(0, 4, (2, 37, 40)))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("model", OURS)
def test_a_few_steps_learn_one_batch(model):
    net, x, y = build_model(model, 3, width=8), images(32, 32, n=4), torch.zeros(4, 32, 32, dtype=torch.long)
    y[:, 8:24, 8:24], y[:, :, 28:] = 1, 2
    x = (x + torch.eye(3)[y].permute(0, 3, 1, 2)) / 2
    optimiser = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(25):
        loss = F.cross_entropy(net(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.45


def test_one_pixel_left_is_said_in_one_sentence():
    net = UNet(3, 4)
    with pytest.raises(UserError, match=r"8x8 px.*BatchNorm"): net.train()(images(8, 8))
    assert net.train()(images(8, 8, n=2)).shape == (2, 3, 8, 8)
    assert net.eval()(images(8, 8)).shape == (1, 3, 8, 8)


def test_budgets_are_similar():
    unet, deeplab = count_parameters(UNet(5, 12)), count_parameters(DeepLabV3(5, 12))
    assert 0.5 < unet / deeplab < 2 and unet == 271_961


# PSPNet and its decoder
def test_the_light_decoder_has_the_published_size():
    assert count_parameters(Upsampler(512, 21, 8)) == 16_296
    for stride, blocks in ((1, 0), (2, 1), (4, 2), (16, 4)):
        up = Upsampler(6, 3, stride)
        assert len(up.blocks) == blocks and up(torch.rand(2, 6, 5, 7)).shape == (2, 3, 5 * stride, 7 * stride)
        assert up.scores.bias is None


def test_a_fresh_decoder_enlarges_without_a_pattern():
    up, e = Upsampler(6, 3, 8), torch.rand(2, 6, 5, 7)
    cells = F.relu(F.relu(up.scores(e) + 1) + 1)  # two ReLUs with bias 1, none in the last block
    torch.testing.assert_close(up(e), F.interpolate(cells, scale_factor=8))


def test_a_decoder_can_start_afresh():
    up = Upsampler(6, 3, 8)
    before, used = up.scores.weight.clone(), torch.rand(1, 6, 4, 4)
    for p in up.parameters(): torch.nn.init.normal_(p)
    up.reset_parameters()
    torch.testing.assert_close(up(used), F.interpolate(F.relu(F.relu(up.scores(used) + 1) + 1), scale_factor=8))
    assert not torch.equal(up.scores.weight, before)


def test_the_last_relu_is_left_out_unless_it_is_asked_for():
    e = torch.rand(1, 6, 4, 4)
    for final_relu in (False, True):
        up = Upsampler(6, 3, 4, final_relu)
        for p in up.parameters(): torch.nn.init.normal_(p)
        assert bool(up(e).min() >= 0) == final_relu


def test_every_channel_of_a_fresh_decoder_is_alive():
    maps = F.avg_pool2d(torch.randn(4, 64, 24, 24).relu(), 3)
    for _ in range(20):
        up = Upsampler(64, 2, 8)
        up(maps).square().sum().backward()
        assert all((p.grad.flatten(1).abs().sum(1) > 0).all() for p in [up.scores.weight, *(c.weight for c in up.blocks)])


@pytest.mark.parametrize("stride", [0, 3, 12, -8])
def test_strides_that_are_not_reached_by_doubling_are_refused(stride):
    with pytest.raises(UserError, match=rf"stride={stride} .*1, 2, 4, 8"): Upsampler(4, 2, stride)


@pytest.mark.parametrize("size", [(64, 64), (37, 53), (9, 17), (1, 1)])
def test_psp_encodes_to_one_map_that_is_not_negative(size):
    net = PSPNet(3, 4).eval()
    (e,) = net.encode(images(*size))
    assert e.shape == (1, net.channels[0], -(-size[0] // 8), -(-size[1] // 8)) and net.channels == [16]
    assert e.min() >= 0 and (e > 0).any()


def test_pyramid_pooling_sees_the_whole_and_its_parts():
    pool = PyramidPooling(8, 4).eval()
    x = torch.rand(1, 8, 12, 12).requires_grad_()
    pool(x)[0, :, 0, 0].sum().backward()
    assert (x.grad.abs().sum(1) > 0).all(), "one corner looks at every place"
    assert len(pool.parts) == 4 and not any(isinstance(m, torch.nn.BatchNorm2d) for m in pool.parts[0])
    assert pool.train()(torch.rand(1, 8, 12, 12)).shape == (1, 4, 12, 12)


@pytest.mark.parametrize("encoder", TINY)
def test_psp_with_an_encoder_has_one_map_at_stride_8_and_trains(encoder):
    net = build_model("psp", 3, encoder=encoder)
    for size in ((40, 56), (37, 53), (64, 64)):
        with torch.no_grad(): (e,) = net.eval().encode(images(*size))
        assert e.shape == (1, net.channels[0], -(-size[0] // 8), -(-size[1] // 8)) and e.min() >= 0
        assert net.decode([e], size).shape == (1, 3, *size)
    before = {k: p.clone() for k, p in net.train().named_parameters()}
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    F.cross_entropy(net(images(64, 64, n=2)), torch.randint(0, 3, (2, 64, 64))).backward()
    optimiser.step()
    assert all(p.grad is not None for p in net.parameters()) and any(not torch.equal(p, before[k]) for k, p in net.named_parameters())


@pytest.mark.parametrize("encoder, inner, channels", [("resnet50", 8, 2048), ("resnet50d", 8, 2048), ("poolformer_m36", 32, 512), ("convnext_base", 32, 512)])
def test_large_encoders_give_psp_its_map(encoder, inner, channels):
    with torch.device("meta"): net = build_model("psp", 21, encoder=encoder)
    (e,) = net.eval().encode(torch.empty(1, 3, 50, 70, device="meta"))
    assert e.shape == (1, 512, 7, 9) and net.channels == [512] and net.decode([e], (50, 70)).shape == (1, 21, 50, 70)
    assert isinstance(net.encoder, AtStride8) and (net.encoder.inner, net.encoder.channels) == (inner, channels)
    assert count_parameters(net.decoder) == 16_296


def test_encoders_that_cannot_be_dilated_are_added_up():
    with torch.device("meta"): dense, res = stride8_encoder("densenet121"), stride8_encoder("resnet18")
    assert (dense.inner, res.inner) == (32, 8) and res.fit is None and len(dense.fit) == 3


def test_what_lies_in_the_padding_is_not_pooled():
    net = build_model("psp", 3, encoder="convnext_atto").eval()
    with torch.no_grad():
        (e,) = net.encode(images(40, 40))
        whole = net.pooling(net.encoder(net.normalise(F.pad(images(40, 40), (0, 24, 0, 24), value=0.5)))[..., :5, :5])
    torch.testing.assert_close(e, whole)


def test_psp_refuses_one_pixel_at_the_coarsest_stride_inside():
    net = build_model("psp", 3, encoder="convnext_atto").train()
    with pytest.raises(UserError, match=r"32x32 px.*stride 32"): net(images(32, 32))
    assert net(images(32, 32, n=2)).shape == (2, 3, 32, 32)


# encoders of timm and segmentation-models-pytorch
@pytest.mark.parametrize("model, encoder", [("unet", e) for e in TINY] + [("deeplabv3", "resnet18"), ("deeplabv3plus", "mobilenetv3_small_050"), ("deeplabv3", "convnext_atto")])
def test_encoders_share_the_interface(model, encoder):
    net, x = build_model(model, 3, encoder=encoder).eval(), images(40, 56)
    with torch.no_grad():
        features = net.encode(x)
        assert torch.equal(net.decode(features, (40, 56)), net(x)) and net(x).shape == (1, 3, 40, 56)
    assert all(f.shape[1] > 0 for f in features)
    net.train()(images(64, 64)).square().mean().backward()  # batch 1: image pooling has no BatchNorm
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("encoder", ["resnet50", "resnet101", "convnext_base", "poolformer_m36"])
def test_large_encoders_are_built(encoder):
    with torch.device("meta"): net = build_model("unet", 4, encoder=encoder)
    assert isinstance(net, EncoderNet) and count_parameters(net) > 2e7
    assert net.eval()(torch.empty(1, 3, 50, 64, device="meta")).shape == (1, 4, 50, 64)


def test_padding_of_the_frame_is_cut_off_again():
    net = build_model("unet", 3, encoder="resnet18", mean=(0.5,) * 3).eval()
    x = images(48, 64)
    whole = F.pad(x, (0, 0, 0, 16), value=0.5)  # the mean colour, by hand
    with torch.no_grad(): torch.testing.assert_close(net(x), net(whole)[..., :48, :])


def test_an_encoder_of_fixed_size_refuses_in_one_sentence():
    net = build_model("unet", 3, encoder="swin_tiny_patch4_window7_224").eval()
    with pytest.raises(UserError, match=r"64x64 px.*224"): net(images(64, 64))


def test_networks_can_be_copied_and_averaged():
    for net in (*(build_model(m, 3, width=4) for m in OURS), build_model("unet", 3, encoder="resnet18"), build_model("psp", 3, encoder="mobilenetv3_small_050")):
        average = EMA(net, decay=0.5)
        average.update(net)
        with torch.no_grad(): torch.testing.assert_close(average(images(32, 32)), net.eval()(images(32, 32)))


def test_names_are_found_and_close_ones_proposed():
    assert encoder_name("resnet50") == "resnet50" and encoder_name("convnext_base") == "tu-convnext_base"
    assert encoder_name("tu-poolformer_m36") == "tu-poolformer_m36"
    for kind, match in [(dict(model="unett"), "unett.*did you mean 'unet'"), (dict(encoder="resnet5o"), "resnet5o.*did you mean.*resnet50"),
                        (dict(model="deeplabv3plus"), "needs an encoder"), (dict(pretrained=True), "needs an encoder"),
                        (dict(model="deeplabv3", encoder="poolformer_m36"), "does not go with"), (dict(encoder="vit_tiny_patch16_224"), "does not go with"), (dict(model="psp", encoder="vit_tiny_patch16_224"), "does not go with model 'psp'"),
                        (dict(model="psp", encoder="resnet5o"), "resnet5o.*did you mean.*resnet50"), (dict(model="pspnet", encoder="resnet18"), "did you mean 'psp'")]:
        with pytest.raises(UserError, match=match): build_model(n_classes=3, **kind)


@pytest.mark.parametrize("model", ["unet", "psp"])
@pytest.mark.parametrize("encoder", ["resnet18", "convnext_atto"])
def test_pretrained_without_a_network_ends_quickly_in_one_sentence(encoder, model, monkeypatch, tmp_path):
    from huggingface_hub import constants
    def refuse(*args, **kwargs): raise OSError("no network")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):  # nothing from an earlier download either
        if hasattr(constants, name): monkeypatch.setattr(constants, name, str(tmp_path))
    before, start = constants.HF_HUB_OFFLINE, time.perf_counter()
    with pytest.raises(UserError, match=f"pretrained weights of encoder '{encoder}'.*weights=<local"):
        build_model(model, 3, encoder=encoder, pretrained=True)
    assert time.perf_counter() - start < 10 and constants.HF_HUB_OFFLINE == before


@pytest.mark.parametrize("encoder, stride", [("tu-mobilenetv3_small_050", 8), ("convnext_atto", 32)])
def test_pretrained_weights_are_asked_for_once_at_the_stride_that_is_used(encoder, stride, monkeypatch):
    from segmentation_models_pytorch import encoders
    real, asked = encoders.get_encoder, []
    def spy(name, weights=None, output_stride=32):
        if weights: asked.append((name.removeprefix("tu-"), weights, output_stride))
        return real(name, weights=None, output_stride=output_stride)
    monkeypatch.setattr(encoders, "get_encoder", spy)
    monkeypatch.setattr("semiseg_nb.models._hub", contextlib.nullcontext)
    net = build_model("psp", 3, encoder=encoder, pretrained=True, mean=(0.1, 0.1, 0.1))
    assert asked == [(encoder.removeprefix("tu-"), True, stride)] and net.inner == stride
    assert net.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406]), "what the encoder was trained with"


# weights from files
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_own_weights_go_through_a_file(kind, tmp_path):
    path, net = tmp_path / f"net.{kind}", build_model("deeplabv3", 4, width=4, mean=(0.1, 0.2, 0.3))
    save_file(net.state_dict(), path) if kind == "safetensors" else torch.save(net.state_dict(), path)
    again = build_model("deeplabv3", 4, width=4, weights=path)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("model", ["unet", "psp"])
@pytest.mark.parametrize("encoder", TINY)
def test_a_local_file_of_a_classifier_fills_the_encoder(encoder, model, tmp_path):
    import timm
    classifier, path = timm.create_model(encoder, pretrained=False), tmp_path / "classifier.safetensors"
    save_file(classifier.state_dict(), path)
    net = build_model(model, 3, encoder=encoder, weights=path, mean=(0.1, 0.1, 0.1))
    filled = net.encoder.encoder if model == "psp" else net.encoder
    plain = {k.replace(".", "_"): v for k, v in classifier.state_dict().items()}
    for name, value in filled.state_dict().items():
        assert torch.equal(value, plain[name.removeprefix("model.").replace(".", "_")]), name
    assert net.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406]), "what the encoder was trained with"


@pytest.mark.parametrize("model", ["unet", "psp"])
def test_whole_networks_with_an_encoder_go_through_a_file(model, tmp_path):
    path, net = tmp_path / "net.pth", build_model(model, 3, encoder="mobilenetv3_small_050")
    torch.save({"state_dict": net.state_dict()}, path)
    again = build_model(model, 3, encoder="mobilenetv3_small_050", weights=path)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))


def test_a_file_that_does_not_fit_is_named_with_its_keys(tmp_path):
    path = tmp_path / "narrow.pth"
    torch.save(UNet(5, 4).state_dict(), path)
    with pytest.raises(UserError, match=r"narrow.pth.*does not fit.*first down\.0\.0\.0\.weight"): build_model("unet", 5, width=8, weights=path)
    with pytest.raises(UserError, match=r"narrow\.pth.*does not fit"): build_model("unet", 5, encoder="resnet18", weights=path)
    net = UNet(5, 8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UserError): load_pretrained(net, path)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "a refused file changes nothing"


@pytest.mark.parametrize("name", ["absent.pth", "text.pth", "text.safetensors", "cut.pth", "object.pth", "list.pth"])
def test_files_that_are_not_weights_are_refused(name, tmp_path):
    path = tmp_path / name
    if name.startswith("text"): path.write_text("no weights")
    if name == "cut.pth":
        torch.save(UNet(5, 4).state_dict(), path)
        path.write_bytes(path.read_bytes()[:2000])
    if name == "object.pth": torch.save(UNet(5, 4), path)  # a pickled module could run code
    if name == "list.pth": torch.save([torch.ones(1)], path)
    with pytest.raises(UserError, match=name) as e: read_pretrained(path)
    assert e.value.__cause__ is None and "Traceback" not in str(e.value)
