"""AlexNet, and the file that a checkpoint is.

network = AlexNet(num_classes=101)
logits = network(torch.rand(64, 3, 224, 224))  # (64, 101)

save({"state_dict": network.state_dict(), ...}, "alexnet.pth")
network = build(load("alexnet.pth"))
"""

import contextlib
import glob
import os
import platform
import tempfile
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN = 4096  # units of the two hidden linear layers
FORMAT = 1  # of the checkpoint; a reader refuses a higher one


class CheckpointError(Exception):
    """A checkpoint that can't be read, used or written; the message says what to do."""


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """As PyTorch's. MPS can't divide maps unevenly, so there the CPU does: they are small."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if maps.device.type == "mps" and any(side % 6 for side in maps.shape[-2:]):
            return super().forward(maps.cpu()).to(maps.device)
        return super().forward(maps)


class AlexNet(nn.Module):
    """Krizhevsky's network in its one-tower form (https://arxiv.org/abs/1404.5997).

    Parameters have the names and shapes of torchvision's `alexnet`, so weights move between the
    two; with `stride=4` the outputs are equal as well.

    Args:
        num_classes: how many logits to return.
        stride: of the first convolution. 2 is this experiment's; 4 is the paper's and torchvision's,
            with a quarter of the arithmetic.
        dropout: the probability with which an input of the first two linear layers is zeroed.
    """

    def __init__(self, num_classes: int = 101, stride: int = 2, dropout: float = 0.5):
        super().__init__()
        self.features = nn.Sequential(  # shapes for 224 x 224 pictures and stride 2
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
        self.avgpool = AdaptiveAvgPool2d((6, 6))
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

        H and W are at least 35 (63 with stride 4).
        """
        maps = self.avgpool(self.features(images))  # (B, 256, 6, 6)
        return self.classifier(torch.flatten(maps, 1))


def init_he(network: AlexNet) -> None:
    """Draw weights that keep the variance through ReLUs (https://arxiv.org/abs/1502.01852).

    Those of the last layer are small, as in that paper: so training starts from even odds.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    nn.init.normal_(network.classifier[-1].weight, std=0.01)


@torch.no_grad()
def whiten(layer: nn.Conv2d, images: torch.Tensor) -> None:
    """Give a first layer filters whose outputs on `images`, (B, 3, H, W), are uncorrelated, of variance near 1.

    Those are half of them, the principal components of the patches that the layer sees; the others
    are their negatives, so that ReLU loses nothing. airbench (https://arxiv.org/abs/2404.00498)
    starts so, with smaller patches. Random filters nearly all see the same, a patch's mean colour,
    for it has most of the variance.
    """
    # a sample of the patches, every 7th place: the layer's own stride would give many more, much alike
    patches = F.unfold(images, layer.kernel_size, stride=7).movedim(1, 2).flatten(0, 1)  # (N, 3 * 11 * 11)
    variances, directions = torch.linalg.eigh(patches.T.double().cov())  # from small to large
    filters = (directions / (variances + 0.1).sqrt()).T.flip(0)[: layer.out_channels // 2]  # 0.1 bounds noise
    layer.weight.copy_(torch.cat([filters, -filters]).view_as(layer.weight))


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "wb", **options):
    """Open a temporary file that takes `path`'s place when the block ends well.

    Whatever happens and whenever, `path` holds either its old content or the whole new one. A link
    stays, and the file that it leads to is replaced; a device or a pipe is written to.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, mode, **options) as file:
            yield file
        return
    path = os.path.realpath(path)
    remove_leftovers(path)
    temporary = f"{path}.{platform.node()}.{os.getpid()}.tmp"  # no other process's, on no other machine
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name without its content
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename = path
        raise


def remove_leftovers(path: str | Path) -> None:
    """Remove what processes of this machine that were killed while they wrote `path`, or a longer name, have left."""
    for temporary in glob.glob(f"{glob.escape(str(path))}*.{glob.escape(platform.node())}.*.tmp"):
        with contextlib.suppress(OSError, ValueError, OverflowError):  # a name without a process's number
            pid = int(temporary.split(".")[-2])
            try:
                if os.name != "nt":  # there kill() would be one, and an open file can't be removed
                    os.kill(pid, 0)  # passes if that process lives
                    continue
            except ProcessLookupError:
                pass
            os.unlink(temporary)


def save(checkpoint: dict, path: str | Path) -> None:
    """Write `checkpoint` to `path`, wholly or not at all.

    Raises:
        CheckpointError: the file can't be written; an older one under that name is untouched.
    """
    try:
        with replacing(path) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # torch's writer turns some of the first into the second
        reason = error.strerror if isinstance(error, OSError) else "the file system refused the data"
        raise CheckpointError(
            f"{path}: can't be written ({reason}); what was saved before is untouched; make room or "
            "mend the folder, then go on with --resume"
        ) from error


def check_writable(path: str | Path, size: int) -> None:
    """Make sure, before the work, that `size` bytes can be written beside `path`.

    Raises:
        CheckpointError: they can't.
    """
    path = Path(os.path.realpath(path))
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "it is a folder" if path.is_dir() else "it is a device")
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with tempfile.TemporaryFile(dir=path.parent) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.write(b"\0")
    except OSError as error:
        raise CheckpointError(
            f"{path}: checkpoints of {size / 1e6:.0f} MB can't be saved there ({error.strerror}); "
            "make room or give another --ckpt"
        ) from error


def load(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU without running any code that it may hold.

    A bare `state_dict`, as the report's script or torchvision saves one, comes back as a checkpoint
    that holds nothing else.

    Raises:
        CheckpointError: there is no such file, or it is damaged, unsafe, foreign or too new.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load itself checks no checksums
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        hint = "; train.py writes one" if isinstance(error, FileNotFoundError) else ""
        raise CheckpointError(f"{path}: can't be read ({error.strerror or error}){hint}") from error
    except Exception as error:  # a damaged file can make the readers raise anything
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise
        if "Unsupported global" in str(error) or "weights_only" in str(error).lower():
            reason = "refused: it holds objects that could run code when loaded, not only tensors"
        else:
            reason = "damaged, or no PyTorch checkpoint; use a backup or train again"
        raise CheckpointError(f"{path}: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    if checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        return {"state_dict": dict(checkpoint)}
    versions = checkpoint.get("versions")
    if not isinstance(checkpoint.get("state_dict"), dict) or not isinstance(versions, dict):
        raise CheckpointError(f"{path}: is no checkpoint of this program")
    if versions.get("format", FORMAT) not in range(1, FORMAT + 1):
        raise CheckpointError(f"{path}: was made by a newer version of this program; update it")
    return checkpoint


def build(checkpoint: dict, stride: int = 2) -> AlexNet:
    """Return the network that `checkpoint` holds, on the CPU, in evaluation mode.

    Args:
        checkpoint: as `load` returns it.
        stride: used where the checkpoint, a bare `state_dict`, does not say it.

    Raises:
        CheckpointError: the weights are no AlexNet's.
    """
    weights = checkpoint["state_dict"]
    try:
        with torch.device("meta"):  # shapes alone: no time is spent on weights that are replaced
            network = AlexNet(len(weights["classifier.6.weight"]), checkpoint.get("stride", stride))
        network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    except (RuntimeError, LookupError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"the weights are no AlexNet's: {reason}") from error
    return network.eval()
