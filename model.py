"""AlexNet, and saving and loading checkpoints.

network = AlexNet(num_classes=101)
logits = network(torch.rand(64, 3, 224, 224))  # (64, 101)

save({"state_dict": network.state_dict(), ...}, "alexnet.pth")
network = build(load("alexnet.pth"))
"""

import argparse
import contextlib
import os
import re
import time
import warnings
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN = 4096  # units of each of the two hidden linear layers

torch.serialization.add_safe_globals([argparse.Namespace])  # many scripts save their arguments


class CheckpointError(Exception):
    """A checkpoint cannot be read, used or written; the message says what to do."""


class AlexNet(nn.Module):
    """Krizhevsky's network in its one-tower form (https://arxiv.org/abs/1404.5997).

    Its parameters have the names and shapes of torchvision's `alexnet`, so weights move between
    the two. With `stride=4` the logits are equal as well.

    Args:
        num_classes: the number of logits.
        stride: of the first convolution. 2 is the lab report's. 4 is the paper's and
            torchvision's, with a quarter of the arithmetic.
        dropout: the probability of zeroing an input of the first two linear layers.
    """

    def __init__(self, num_classes: int = 101, stride: int = 2, dropout: float = 0.5):
        super().__init__()
        self.features = nn.Sequential(  # shapes are for 224 x 224 images and stride 2
            nn.Conv2d(3, 64, kernel_size=11, stride=stride, padding=2),  # (B, 64, 109, 109)
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),  # (B, 64, 54, 54)
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),  # (B, 192, 26, 26)
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),  # (B, 256, 12, 12)
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, HIDDEN),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(inplace=True),
            nn.Linear(HIDDEN, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (B, num_classes) for float images (B, 3, H, W), normalised by `data.py`.

        H and W are at least 35, or 63 with stride 4.
        """
        maps = self.features(images)
        mps = maps.device.type == "mps"  # it needs sizes that 6 divides, so the CPU pools
        maps = self.avgpool(maps.cpu() if mps else maps).to(maps.device)  # (B, 256, 6, 6)
        return self.classifier(torch.flatten(maps, 1))


def init_he(network: AlexNet) -> None:
    """Draw weights that keep the variance through ReLUs (https://arxiv.org/abs/1502.01852).

    The last layer's are small, as in that paper, so the first predictions are nearly uniform.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    nn.init.normal_(network.classifier[-1].weight, std=0.01)


@torch.no_grad()
def whiten(layer: nn.Conv2d, images: torch.Tensor) -> None:
    """Set filters to the leading principal components of image patches, and their negatives.

    They are scaled to outputs of variance near 1 on `images`, (B, 3, H, W). The idea is airbench's
    (https://arxiv.org/abs/2404.00498), where patches are smaller. Random filters nearly all respond
    to a patch's mean colour, where most of the variance is.
    """
    # every 7th place: the layer's own stride gives many more patches, all much alike
    patches = F.unfold(images, layer.kernel_size, stride=7)  # (B, 3 * 11 * 11, places)
    patches = patches.movedim(1, 2).flatten(0, 1)  # (B * places, 3 * 11 * 11)
    variances, directions = torch.linalg.eigh(patches.T.double().cov())  # in ascending order
    filters = (directions / (variances + 0.1).sqrt()).T.flip(0)  # 0.1: less is noise
    filters = filters[: layer.out_channels // 2]
    layer.weight.copy_(torch.cat([filters, -filters]).view_as(layer.weight))


def transfer(network: AlexNet, checkpoint: dict, classes: list[str], path="checkpoint") -> bool:
    """Copy the weights of `checkpoint` into `network`, whose logits are for `classes`.

    The last layer stays as it is where the checkpoint has another number of classes, or classes
    of other names.

    Returns:
        Whether the last layer is copied too.

    Raises:
        CheckpointError: the weights are not AlexNet's, or not finite.
    """
    source = build(checkpoint, path).state_dict()
    num_classes = len(source["classifier.6.bias"])
    whole = num_classes == len(classes) and checkpoint.get("classes", classes) == classes
    if not whole:
        del source["classifier.6.weight"], source["classifier.6.bias"]
    network.load_state_dict(source, strict=False)
    return whole


def save(checkpoint: dict, path: str | Path) -> None:
    """Write `checkpoint` to `path`, wholly or not at all; a link stays a link.

    Raises:
        CheckpointError: the file cannot be written; an older one of that name is untouched.
    """
    path = os.path.realpath(path)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # a power cut must not leave the new name without content
        for seconds in (1, 4, 0):  # on Windows, this fails while a program reads the file
            try:
                os.replace(temporary, path)
                break
            except PermissionError:
                if not seconds:  # the last try
                    raise
                time.sleep(seconds)
    except (OSError, RuntimeError) as error:  # torch turns some OSErrors into RuntimeErrors
        reason = error.strerror if isinstance(error, OSError) else "the disk may be full"
        raise CheckpointError(
            f"{path}: cannot be written ({reason}); free some space or fix the folder; what was "
            "saved before is untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def load(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU without running any code that it may hold.

    Weights that another script saved come back as `{"state_dict": ...}`: a bare state_dict, or
    one inside a dict, whatever wrapper's prefixes its keys have.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, or holds no AlexNet.
    """
    try:
        if zipfile.is_zipfile(path):  # files from before PyTorch 1.6 are not
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # torch.load compares no checksums
                    raise zipfile.BadZipFile
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error says what matters
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        hint = "; train.py writes one" if isinstance(error, FileNotFoundError) else ""
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}){hint}"
        ) from error
    except Exception as error:  # a damaged file makes the readers raise anything
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            raise
        reason = "damaged, or not a PyTorch checkpoint; use a backup or train again"
        unsafe = ("Unsupported global", "Unsupported class", "call reduce", "TorchScript")
        if any(words in str(error) for words in unsafe):
            reason = "refused: it holds objects that could run code; save a state_dict() instead"
        raise CheckpointError(f"{path}: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    if isinstance(checkpoint.get("versions"), dict) and "state_dict" in checkpoint:
        return checkpoint  # train.py's
    return {"state_dict": find_state_dict(checkpoint, path)}


def find_state_dict(checkpoint: dict, path: str | Path) -> dict:
    """Return the weights in a file of another script, under AlexNet's own names.

    They may lie in a dict in a dict. DataParallel and DDP put `module.` at the start or in the
    middle of a name, torch.compile `_orig_mod.`, and a class around the network the name of its
    attribute.
    """
    candidates = [checkpoint]
    for candidate in candidates:  # the list grows: dicts inside are appended
        inner = [value for value in candidate.values() if isinstance(value, dict)]
        candidates += [value for value in inner if all(value is not known for known in candidates)]
        plain = {
            re.sub(r"\b(module|_orig_mod)\.", "", str(name)): value
            for name, value in candidate.items()
            if isinstance(value, torch.Tensor)
        }
        for first in plain:
            if first.endswith("features.0.weight"):
                prefix = first.removesuffix("features.0.weight")
                parameter = re.compile(re.escape(prefix) + r".*\b(weight|bias)")  # no buffers
                own = filter(parameter.fullmatch, plain)
                return {name.removeprefix(prefix): plain[name] for name in own}
    raise CheckpointError(f"{path}: holds no AlexNet's weights, such as features.0.weight")


def build(checkpoint: dict, path: str | Path = "checkpoint", stride: int = 2) -> AlexNet:
    """Return the network that `checkpoint` holds, on the CPU, in evaluation mode.

    Args:
        checkpoint: as `load` returns it.
        path: named in an error.
        stride: used where the checkpoint, another script's, does not hold it.

    Raises:
        CheckpointError: the weights are not AlexNet's, or not finite.
    """
    weights = checkpoint["state_dict"]
    try:
        with torch.device("meta"):  # only shapes: the weights are replaced anyway
            network = AlexNet(len(weights["classifier.6.weight"]), checkpoint.get("stride", stride))
        weights = {name: tensor.float() for name, tensor in weights.items()}
        network.load_state_dict(weights, assign=True)
        finite = all(tensor.isfinite().all() for tensor in weights.values())
    except (RuntimeError, LookupError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path}: its weights are not AlexNet's: {reason}") from error
    if not finite:
        raise CheckpointError(f"{path}: its weights are not finite; use others")
    return network.eval()
