"""The network, its checkpoint file, and weights from elsewhere."""

import argparse
import errno
import io
import os
import pickle
import zipfile
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

import model


@pytest.fixture
def network(monkeypatch) -> model.AlexNet:
    """A network for seven classes, with narrow layers."""
    monkeypatch.setattr(model, "HIDDEN", 8)
    torch.manual_seed(0)
    return model.AlexNet(7, stride=4).eval()


def test_the_layers_are_torchvisions_and_give_equal_logits():
    torch.manual_seed(0)
    theirs, ours = torchvision.models.alexnet(num_classes=101).eval(), model.AlexNet(101, 4).eval()
    assert [*dict(ours.named_children())] == ["features", "avgpool", "classifier"]
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)
        assert model.AlexNet().features(images).shape == (2, 256, 12, 12)  # with stride 2
    assert sum(p.numel() for p in ours.parameters()) == 57_417_637


@pytest.mark.parametrize(("stride", "smallest"), [(2, 35), (4, 63)])
def test_the_smallest_images_are_those_that_the_docstring_promises(stride, smallest, network):
    network = model.AlexNet(3, stride).eval()
    assert network(torch.zeros(1, 3, smallest, smallest)).shape == (1, 3)
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 3, smallest - stride, smallest - stride))


def test_he_initialisation_keeps_the_variance_and_starts_from_even_odds(monkeypatch):
    monkeypatch.setattr(model, "HIDDEN", 256)
    torch.manual_seed(0)
    network = model.AlexNet(10)
    model.init_he(network)
    for layer in (network.features[3], network.features[10], network.classifier[1]):
        expected = (2 / layer.weight[0].numel()) ** 0.5
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert not layer.bias.any()
    assert network.eval()(torch.randn(4, 3, 128, 128)).softmax(1).max() < 0.3


def test_a_whitening_layer_gives_uncorrelated_outputs_and_their_negatives():
    layer = nn.Conv2d(3, 64, 11, stride=7)
    smooth = nn.functional.interpolate(torch.randn(256, 3, 24, 24), size=(96, 96), mode="bicubic")
    model.whiten(layer, smooth)
    outputs = layer(smooth).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(outputs[:, :32].T.cov(), torch.eye(32), rtol=0, atol=0.1)
    assert torch.equal(layer.weight[32:], -layer.weight[:32])
    flat = torch.ones(64, 3, 96, 96) * torch.rand(64, 3, 1, 1)  # most directions have no variance
    model.whiten(layer, flat)
    assert layer.weight.abs().max() < 4


# ----------------------------------------------------------------------------- saving and loading


def test_build_returns_the_saved_network(network, tmp_path):
    checkpoint = {"state_dict": network.state_dict(), "stride": 4, "versions": {}}
    model.save(checkpoint, tmp_path / "net.pth")
    again = model.build(model.load(tmp_path / "net.pth"))
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(network(images), again(images))
    assert not again.training


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "large").mkdir()
    link = tmp_path / "net.pth"
    link.symlink_to("large/net.pth")
    model.save({"step": 1}, link)
    assert link.is_symlink()
    assert torch.load(tmp_path / "large" / "net.pth", weights_only=True) == {"step": 1}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(failing, tmp_path, monkeypatch):
    path = tmp_path / "net.pth"
    model.save({"step": 1}, path)

    def fail(*args):
        assert [*tmp_path.glob("*.tmp")]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(model.CheckpointError, match=r"net.pth: .*No space left .* untouched"):
        model.save({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [*tmp_path.iterdir()] == [path]


# ------------------------------------------------------------------------ weights from elsewhere


def renamed(change):
    return lambda weights: {change(name): tensor for name, tensor in weights.items()}


FORMS = {
    "bare": lambda weights: weights,
    "in state_dict": lambda weights: {"epoch": 90, "state_dict": weights, "best_acc1": 56.5},
    "in model_state_dict": lambda weights: {"optimizer": {"lr": 1}, "model_state_dict": weights},
    "DataParallel": renamed("module.{}".format),
    "DataParallel of features": renamed(lambda name: name.replace("features.", "features.module.")),
    "torch.compile": renamed("_orig_mod.{}".format),
    "torch.compile of features": renamed(lambda n: n.replace("features.", "features._orig_mod.")),
    "DDP of torch.compile": renamed("module._orig_mod.{}".format),
    "in a class": renamed("net.{}".format),
    "in a class, with others": lambda weights: {
        "head.weight": torch.ones(3), **renamed("backbone.alexnet.{}".format)(weights)
    },
    "torch.compile of a layer": renamed(lambda n: n.replace("s.0.", "s.0._orig_mod.")),
    "DataParallel of torch.compile of features": renamed(
        lambda n: n.replace("features.", "features._orig_mod.module.")
    ),
    "beside a teacher": lambda weights: {
        **renamed("net.{}".format)(weights),
        **{f"teacher.{name}": 0 * tensor for name, tensor in weights.items()},
    },
    "AveragedModel": lambda weights: {
        "n_averaged": torch.tensor(9), **renamed("module.{}".format)(weights)
    },
    "with counters": lambda weights: {**weights, "features.0.total_ops": torch.ones(1)},
    "a dict in a dict": lambda weights: {"model": {"ema": {"state_dict": weights}}},
    "beside arguments": lambda weights: {"args": argparse.Namespace(lr=1), "model": weights},
    "half": lambda weights: {name: tensor.half() for name, tensor in weights.items()},
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_in_whatever_form_others_save_them(form, zipped, network, tmp_path):
    weights = {name: tensor.half().float() for name, tensor in network.state_dict().items()}
    path = tmp_path / "net.pth"
    torch.save(FORMS[form](weights), path, _use_new_zipfile_serialization=zipped)
    target = model.AlexNet(7, stride=4)
    assert model.transfer(target, model.load(path), list("abcdefg"))
    assert {tensor.dtype for tensor in target.state_dict().values()} == {torch.float32}
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("difference", ["number", "names"])
def test_the_last_layer_stays_as_it_is_where_the_classes_differ(difference, network):
    source = model.AlexNet(1000 if difference == "number" else 7)
    checkpoint = {"state_dict": source.state_dict(), "stride": 2}
    if difference == "names":
        checkpoint["classes"] = list("ABCDEFG")
    last = network.classifier[-1].weight.clone()
    assert not model.transfer(network, checkpoint, list("abcdefg"))
    assert torch.equal(network.classifier[-1].weight, last)
    assert torch.equal(network.classifier[4].weight, source.classifier[4].weight)


def refusals(network) -> dict:
    """Return what is refused: name -> (content of the file, words of the reason)."""
    weights, itself = network.state_dict(), {}
    itself["itself"] = itself
    wider = {**weights, "features.3.weight": torch.zeros(200, 64, 5, 5)}
    fewer = {name: tensor for name, tensor in weights.items() if name != "features.3.bias"}
    return {
        "a pickled network": (network, "refused: it holds objects that could run code"),
        "any object": (SimpleNamespace(weights=weights), "refused"),
        "another network": (nn.Linear(2, 2).state_dict(), "holds no AlexNet's weights"),
        "a dict in itself": (itself, "holds no AlexNet's weights"),
        "an empty dict": ({}, "holds no AlexNet's weights"),
        "a tensor": (torch.zeros(3), "holds a Tensor, not a checkpoint"),
        "other sizes": (wider, "not AlexNet's: .*features.3.weight"),
        "a missing layer": (fewer, "not AlexNet's: .*features.3.bias"),
        "another layer": ({**weights, "features.1.weight": torch.ones(64)}, "not AlexNet's"),
        "a second head": ({**weights, "fc.weight": torch.ones(2)}, "not AlexNet's"),
        "nan": ({**weights, "classifier.6.bias": torch.full((7,), torch.nan)}, "are not finite"),
        "numbers": ({**weights, "features.0.weight": torch.tensor(3)}, "not AlexNet's"),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_what_is_not_alexnets_weights_is_refused_with_the_reason(zipped, network, tmp_path):
    path = tmp_path / "net.pth"
    for content, reason in refusals(network).values():
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(model.CheckpointError, match=reason):
            model.build(model.load(path))


def another_zip() -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "no checkpoint")
    return archive.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged, or not a PyTorch checkpoint"),
        (another_zip(), "damaged"),
        (b"garbage" * 9, "damaged"),
        (b"PK\x03\x04" + bytes(99), "damaged"),
        (pickle.dumps({"state_dict": os.system}, 2), "refused|damaged"),
        (None, "cannot be read .No such file.*; train.py writes one"),
    ],
)
def test_files_that_are_no_checkpoints_are_refused(content, reason, tmp_path):
    path = tmp_path / "net.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(model.CheckpointError, match=reason):
        model.load(path)
