"""The network and its checkpoint file."""

import os
import platform

import pytest
import torch
import torchvision

import model


@pytest.fixture(scope="module")
def torchvision_alexnet():
    torch.manual_seed(0)
    return torchvision.models.alexnet(num_classes=101).eval()


def test_weights_move_to_and_from_torchvision_and_give_equal_logits(torchvision_alexnet):
    network = model.AlexNet(101, stride=4).eval()
    network.load_state_dict(torchvision_alexnet.state_dict())
    torchvision_alexnet.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(network(images), torchvision_alexnet(images), rtol=0, atol=1e-5)


def test_layers_are_the_reports(torchvision_alexnet):
    network = model.AlexNet()
    assert [name for name, _ in network.named_children()] == ["features", "avgpool", "classifier"]
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in torchvision_alexnet.state_dict().items()}
    first = network.features[0]
    assert (first.stride, first.padding) == ((2, 2), (2, 2))
    assert sum(p.numel() for p in network.parameters()) == 57_417_637
    with torch.inference_mode():
        assert network.features(torch.zeros(1, 3, 224, 224)).shape == (1, 256, 12, 12)


@pytest.mark.parametrize("stride", [2, 4])
def test_smallest_pictures_that_the_docstring_promises(stride, monkeypatch):
    monkeypatch.setattr(model, "HIDDEN", 8)
    network, smallest = model.AlexNet(3, stride).eval(), {2: 35, 4: 63}[stride]
    assert network(torch.zeros(1, 3, smallest, smallest)).shape == (1, 3)
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 3, smallest - stride, smallest - stride))


def test_he_initialisation_keeps_the_variance_and_starts_from_even_odds(monkeypatch):
    monkeypatch.setattr(model, "HIDDEN", 256)
    torch.manual_seed(0)
    network = model.AlexNet(10)
    model.init_he(network)
    for layer in (network.features[3], network.features[10], network.classifier[1]):
        assert layer.weight.std().item() == pytest.approx((2 / layer.weight[0].numel()) ** 0.5, rel=0.02)
        assert not layer.bias.any()
    odds = network.eval()(torch.randn(4, 3, 128, 128)).softmax(1)
    assert odds.max() < 0.3


def test_a_whitening_layer_gives_uncorrelated_outputs_and_their_negatives():
    layer = torch.nn.Conv2d(3, 64, 11, stride=7)
    smooth = torch.nn.functional.interpolate(torch.randn(256, 3, 24, 24), size=(96, 96), mode="bicubic")
    model.whiten(layer, smooth)
    outputs = layer(smooth).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(outputs[:, :32].T.cov(), torch.eye(32), rtol=0, atol=0.1)
    assert torch.equal(layer.weight[32:], -layer.weight[:32])
    flat = torch.ones(64, 3, 96, 96) * torch.rand(64, 3, 1, 1)  # most directions have no variance at all
    model.whiten(layer, flat)
    assert layer.weight.abs().max() < 4


def test_build_returns_the_saved_network(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "HIDDEN", 8)
    network = model.AlexNet(7, stride=4).eval()
    checkpoint = {"state_dict": network.state_dict(), "stride": 4, "versions": {"format": model.FORMAT}}
    model.save(checkpoint, tmp_path / "a.pth")
    again = model.build(model.load(tmp_path / "a.pth"))
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(network(images), again(images))
    assert not again.training


def test_two_processes_may_save_at_once(tmp_path):
    path = tmp_path / "net.pth"
    names = (f"{platform.node()}.{os.getppid()}", "elsewhere.999999999", f"{platform.node()}.{10**20}", "backup")
    others = [tmp_path / f"net.pth.{name}.tmp" for name in names]  # of one that lives, on another machine, of nobody
    for leftover in (*others, tmp_path / f"net.pth.{platform.node()}.999999999.tmp"):
        leftover.touch()
    model.check_writable(path, 1000)
    model.save({"step": 1}, path)
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    (tmp_path / "large").mkdir()
    link = tmp_path / "net.pth"
    link.symlink_to("large/net.pth")
    model.save({"step": 1}, link)
    assert link.is_symlink()
    assert torch.load(tmp_path / "large" / "net.pth") == {"step": 1}
    reading, writing = os.pipe()
    with model.replacing(f"/dev/fd/{writing}") as file:
        file.write(b"figures")
    assert os.read(reading, 100) == b"figures"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(model.CheckpointError, match="it is a device"):
        model.check_writable(tmp_path / "pipe", 1000)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.pth"
    model.save({"state_dict": {}, "versions": {}}, path)
    old = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        model.save({"state_dict": lambda: None}, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
