"""From folders of pictures to batches on the device.

    store = ImageStore("data", cache=default_cache())  # decoded once, mapped into memory
    manifest = split(store.paths, seed=0)  # {"train": [...], "valid": [...], "test": [...]}
    rows = store.rows(manifest["train"])
    images, labels = store.batch(rows[:64], device)  # uint8 (64, 3, 224, 224), int64 (64,)
    inputs = prepare(images)  # float, normalised

A picture is decoded and resized once, into one file of bytes; from then on a batch is one indexed
read, one transfer and one set of tensor operations, and no worker process is needed.
"""

import contextlib
import functools
import hashlib
import io
import math
import os
import random
import shutil
import sys
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch.utils.data import random_split
from torchvision.datasets import Caltech101
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from model import remove_leftovers, replacing

DEFAULT_DATA = "data"  # where Caltech101 is downloaded to
CALTECH101_IMAGES = 8677  # without BACKGROUND_Google, which is no class
SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
SIZE = 224  # pixels, both sides, of a stored picture
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's weights use
AUGMENTATIONS = ("crop", "flip", "color", "trivial")
CROP_SCALE, CROP_RATIO = (0.35, 1.0), (3 / 4, 4 / 3)
COLOR = 0.3  # largest change, either way, as a factor
OPERATIONS = {  # of which "trivial" does one, and their largest change, either way
    "rotation": math.radians(30), "shear_x": 0.3, "shear_y": 0.3,
    "x": 0.25, "y": 0.25,  # a shift, as a share of half a side
    "brightness": 0.6, "contrast": 0.7, "saturation": 0.7,
}  # fmt: skip
COLUMNS = ("area", "ratio", "x", "y", "flip", "brightness", "contrast", "saturation", "operation", "strength")
UNIFORMS = len(COLUMNS)  # random numbers that the augmentation of one picture takes


class DataError(Exception):
    """Pictures that can't be used as they are; the message says what to do."""


# ------------------------------------------------------------------------ where the pictures are


def default_cache() -> str:
    """Return this program's folder among the user's caches, where the platform keeps those."""
    home = {"win32": os.environ.get("LOCALAPPDATA"), "darwin": "~/Library/Caches"}.get(
        sys.platform, os.environ.get("XDG_CACHE_HOME")
    )
    return os.path.join(os.path.expanduser(home or "~/.cache"), "alexnet-caltech101")


def locate(data: str, cache: str) -> Path:
    """Return the folder of class folders that `--data` means, drawing or downloading it if need be.

    Raises:
        DataError: there is none, or it could not be had.
    """
    if data == "sample":
        return draw_sample(Path(cache) / "sample")
    folder = Path(data)
    places = [folder / name / "101_ObjectCategories" for name in (".", "caltech101", "caltech-101")]
    for place in [*places, folder]:
        if place.is_dir() and scan(place)[0]:
            return place
    if folder.resolve() == Path(DEFAULT_DATA).resolve():
        return download(folder)
    problem = "no class folders with images there" if folder.is_dir() else "no such folder"
    raise DataError(
        f"{data}: {problem}; --data takes the folder that holds 101_ObjectCategories or any folder of "
        "class folders; leave it out to download Caltech101, or try --data sample"
    )


def download(folder: Path) -> Path:
    """Download Caltech101 (137 MB) into `folder`, and return its folder of class folders.

    It takes its final name when complete; an archive that arrived whole is not fetched twice.
    """
    partial, final = folder / ".partial", folder / "caltech101"
    shutil.rmtree(partial / "caltech101" / "101_ObjectCategories", ignore_errors=True)  # extraction cut short
    print(f"downloading Caltech101 (CC BY 4.0, Li, Andreeto, Ranzato, Perona) to {folder}", file=sys.stderr)
    try:
        with warnings.catch_warnings():  # the extraction's, about Python 3.14
            warnings.simplefilter("ignore")
            Caltech101(partial, download=True)
        found = len(scan(partial / "caltech101" / "101_ObjectCategories")[0])
        if found != CALTECH101_IMAGES:
            raise RuntimeError(f"{found} images arrived instead of {CALTECH101_IMAGES}")
        final.mkdir(exist_ok=True)
        os.replace(partial / "caltech101" / "101_ObjectCategories", final / "101_ObjectCategories")
        shutil.rmtree(partial)
    except Exception as error:  # connections and archives that break off raise almost anything
        raise DataError(
            f"Caltech101 could not be downloaded ({error}); try again, or unpack caltech-101.zip from "
            f"https://data.caltech.edu/records/mzrjq-6wc02, and 101_ObjectCategories.tar.gz in it, in {folder}, "
            "or try --data sample"
        ) from error
    return final / "101_ObjectCategories"


def refuse(error: OSError) -> None:
    """Raise DataError for a folder that can't be listed, which `os.walk` would pass over."""
    raise DataError(f"{error.filename}: can't be listed ({error.strerror})") from error


def scan(root: Path) -> tuple[list[tuple[str, int, int]], list[str]]:
    """List the images in `root`'s class folders, however deep, and the classes that have any.

    Returns:
        (path relative to `root` with forward slashes, bytes, modification time in ns) of each image
        by its name, sorted by path; and the classes' names in the order of their labels.
    """
    images = []
    for name in os.listdir(root):
        if name == "BACKGROUND_Google" or name.startswith(".") or not os.path.isdir(root / name):
            continue
        visited = {os.path.realpath(root)}
        for folder, folders, files in os.walk(root / name, onerror=refuse, followlinks=True):
            real = os.path.realpath(folder)
            if real in visited:  # a link back to where we have been
                folders.clear()
                continue
            visited.add(real)
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(folder, file) for file in files):
                if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                    status = path.stat() if path.exists() else path.lstat()  # a broken link: decoding will tell
                    images.append((path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns))
    return sorted(images), sorted({path.split("/")[0] for path, _, _ in images})


def draw_sample(folder: Path, images_per_class: int = 80) -> Path:
    """Draw the sample data set, 10 classes of shapes, into `folder` unless it is there; return it.

    Colours, size, place, rotation, proportions and background vary. The same pictures come out
    everywhere.
    """
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        for name, outline in SHAPES.items():
            (temporary / name).mkdir(parents=True, exist_ok=True)
            for index in range(images_per_class):
                picture = draw_shape(outline, random.Random(f"{name} {index}"))
                picture.save(temporary / name / f"image_{index + 1:04d}.jpg", quality=90)
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(temporary, folder)
    except OSError as error:
        raise DataError(f"{folder}: the sample can't be written ({error.strerror}); give --cache") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def around(*radii: float) -> list[tuple[float, float]]:
    """Return the corners of an outline with those radii at evenly spaced angles, clockwise from the top."""
    turn = 2 * math.pi / len(radii)
    return [(r * math.sin(i * turn), -r * math.cos(i * turn)) for i, r in enumerate(radii)]


SHAPES = {  # within the unit circle
    "arrow": [(0, -1), (0.6, -0.2), (0.2, -0.2), (0.2, 1), (-0.2, 1), (-0.2, -0.2), (-0.6, -0.2)],
    "bar": [(-1, -0.15), (1, -0.15), (1, 0.15), (-1, 0.15)],
    "circle": around(*[1] * 48),
    "flower": around(*[0.75 + 0.25 * math.cos(i * math.pi / 4) for i in range(48)]),
    "halfmoon": around(*[1] * 24, *[0] * 24),
    "hourglass": [(-0.7, -1), (0.7, -1), (-0.7, 1), (0.7, 1)],
    "spark": around(*[1, 0.3] * 4),
    "square": around(1, 1, 1, 1),
    "star": around(*[1, 0.4] * 5),
    "triangle": around(1, 1, 1),
}


def draw_shape(outline: list[tuple[float, float]], rng: random.Random) -> Image.Image:
    """Return an RGB picture, 120 to 200 pixels a side, of one shape on a noisy ground."""

    def colour(level: int) -> tuple[int, ...]:
        return tuple(min(255, max(0, level + rng.randint(-50, 50))) for _ in range(3))

    width, height = rng.randint(120, 200), rng.randint(120, 200)
    ground, ink = rng.sample([rng.randint(0, 80), rng.randint(150, 255)], 2)
    noise = Image.frombytes("RGB", (16, 16), rng.randbytes(16 * 16 * 3)).resize((width, height))
    picture = Image.blend(Image.new("RGB", (width, height), colour(ground)), noise, 0.2)
    radius, angle, stretch = min(width, height) * rng.uniform(0.32, 0.46), rng.uniform(-0.35, 0.35), rng.uniform(0.8, 1)
    x0, y0 = (rng.uniform(radius, side - radius) for side in (width, height))
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)
    corners = [(x0 + stretch * x * cos - y * sin, y0 + stretch * x * sin + y * cos) for x, y in outline]
    ImageDraw.Draw(picture).polygon(corners, fill=colour(ink))
    return picture.filter(ImageFilter.GaussianBlur(0.7))


# ------------------------------------------------------------------------------------- decoding


def digest(value: object) -> str:
    """Return 16 hexadecimal digits that tell one plain value from another."""
    return hashlib.blake2b(repr(value).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def decode(file: str | Path | io.BytesIO) -> torch.Tensor:
    """Return a picture of any kind that Pillow reads, but floating point, as uint8 (SIZE, SIZE, 3).

    It is turned upright by its EXIF tag and made RGB. Both sides are resized to SIZE, so the aspect
    ratio is not kept: the report's choice. Pillow raises almost anything on a damaged file.
    """
    with Image.open(file) as image:
        image.draft("RGB", (SIZE, SIZE))  # lets the JPEG decoder drop detail of a far larger picture
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("floating point: nothing says which value is white")
        if image.mode.startswith("I"):  # 16 bits a pixel: convert() would cut, not scale
            image = Image.fromarray((pil_to_tensor(image.convert("I"))[0] >> 8).clamp(0, 255).byte().numpy())
        elif "transparency" in image.info:
            image = image.convert("RGBA")
        image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return pil_to_tensor(image).permute(1, 2, 0)


def try_decode(path: Path) -> tuple[torch.Tensor, int]:
    """Return `decode(path)` and a checksum of the file, black and 0 if it can't be read."""
    try:
        content = path.read_bytes() if path.is_file() else b""
        return decode(io.BytesIO(content)), zlib.crc32(content) or 1
    except Exception:  # Pillow raises almost anything on a damaged file
        return torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8), 0


def decode_once(root: Path, paths: list[str], file: Path) -> None:
    """Write the pictures under `root` to `file`, unless it is there: all pixels, then all checksums."""
    if file.exists() and file.stat().st_size == len(paths) * (SIZE * SIZE * 3 + 8):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = file.name.split("-")[0]
    remove_leftovers(file.with_name(folder))
    for stale in {*file.parent.glob(f"{folder}-*.uint8")} - {file}:  # other content
        with contextlib.suppress(OSError):  # Windows keeps a file that a process has mapped
            stale.unlink()
    checksums = []
    with (
        replacing(file) as out,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(paths), desc="decoding once", unit=" images", disable=None) as bar,
    ):
        for start in range(0, len(paths), 256):  # bounds what waits in memory to be written
            chunk = [root / path for path in paths[start : start + 256]]
            for pixels, checksum in pool.map(try_decode, chunk):
                out.write(pixels.numpy())
                checksums.append(checksum)
            bar.update(len(chunk))
        out.write(torch.tensor(checksums).numpy().tobytes())


class ImageStore:
    """The pictures of a folder of class folders, decoded, in one memory-mapped file.

    The file lies in `cache`. Its name says what it was made from, so it is never stale; it is
    written beside and renamed when complete. Pages are read when they are asked for and can be
    dropped at any time, so a data set may be larger than memory.

    Args:
        data: what `--data` takes.
        cache: the folder for the file, created when missing.
        skip_bad_images: go on without the pictures that can't be read.

    Attributes:
        root: the folder of the class folders.
        classes: their names; a label is a place in this list.
        paths: the paths, relative to `root`, of the images that can be read, sorted.
        labels: int64 (N,), of all images, also those that can't be read: `rows` says where one is.
        pixels: uint8 (N, SIZE, SIZE, 3), of the same.
        skipped: how many pictures could not be read and were left out.
        fingerprint: changes when an image is added, removed, renamed or gets another content.

    Raises:
        DataError: too few classes or images, some can't be read, or the cache can't be written.
    """

    def __init__(self, data: str, cache: str, skip_bad_images: bool = False):
        self.root = locate(data, cache)
        images, self.classes = scan(self.root)
        paths = [path for path, _, _ in images]
        if len(self.classes) < 2:
            raise DataError(f"{self.root}: at least two class folders with images are needed")
        size = len(paths) * SIZE * SIZE * 3
        file = Path(cache, f"{digest(os.path.realpath(self.root))}-{digest([SIZE, images])}.uint8")
        try:
            decode_once(self.root, paths, file)
        except OSError as error:
            raise DataError(
                f"{cache}: the decoded images ({size / 1e6:.0f} MB) can't be "
                f"kept there ({error.strerror}); give another folder with --cache"
            ) from error
        stored = torch.from_file(str(file), shared=False, size=size + 8 * len(paths), dtype=torch.uint8)
        checksums = stored[size:].view(torch.int64).tolist()
        bad = [path for path, checksum in zip(paths, checksums, strict=True) if not checksum]
        if any(try_decode(self.root / path)[1] for path in bad):  # mended since
            file.unlink()
            return self.__init__(data, cache, skip_bad_images)
        self.skipped = len(bad)
        if bad and not skip_bad_images:
            raise DataError(
                f"{self.root}: {len(bad)} of {len(paths)} images can't be read: "
                f"{', '.join(map(repr, bad))}; mend or remove them, or give --skip-bad-images"
            )
        self.pixels = stored[:size].view(len(paths), SIZE, SIZE, 3)
        self.fingerprint = digest([paths, checksums])
        self._row = {path: row for row, path in enumerate(paths) if checksums[row]}
        self.paths = list(self._row)
        label = {name: index for index, name in enumerate(self.classes)}
        self.labels = torch.tensor([label[path.split("/")[0]] for path in paths])
        self._stream = None

    def rows(self, paths: list[str]) -> torch.Tensor:
        """Return where the pictures of those paths are in `pixels` and `labels`, int64.

        Raises:
            DataError: one is not in the folder any more.
        """
        missing = [path for path in paths if path not in self._row]
        if missing:
            raise DataError(
                f"{self.root}: {len(missing)} of {len(paths)} images of the checkpoint's split are missing "
                f"or can't be read, {missing[0]!r} first; give the folder it was trained on with --data"
            )
        return torch.tensor([self._row[path] for path in paths])

    def move_to(self, device: torch.device) -> None:
        """Keep the pixels on `device` if it is a GPU where they fit well; else get ready to copy."""
        if device.type == "cuda":
            if self.pixels.numel() < torch.cuda.mem_get_info(device)[0] / 2:
                self.pixels, self.labels = self.pixels.to(device), self.labels.to(device)
            else:
                self._stream = torch.cuda.Stream(device)

    def batch(self, rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images, uint8 (B, 3, SIZE, SIZE) in channels_last, and labels, int64 (B,)."""
        rows = rows.to(self.pixels.device, non_blocking=True)
        images, labels = self.pixels.index_select(0, rows), self.labels[rows]
        if self._stream and device.type == "cuda":  # copy while the device is still busy with the step before
            with torch.cuda.stream(self._stream):
                images = images.pin_memory().to(device, non_blocking=True)
            torch.cuda.current_stream(device).wait_stream(self._stream)
            images.record_stream(torch.cuda.current_stream(device))
        return images.to(device).permute(0, 3, 1, 2), labels.to(device, non_blocking=device.type == "cuda")


def split(paths: list[str], seed: int) -> dict[str, list[str]]:
    """Return the manifest: `paths` split 8:1:1 at random under `seed`.

    Raises:
        DataError: there are fewer than 10, so that a part would be empty.
    """
    if len(paths) < 10:
        raise DataError(f"{len(paths)} images are too few to split 8:1:1; at least 10 are needed")
    parts = random_split(paths, [0.8, 0.1, 0.1], torch.Generator().manual_seed(seed))
    return {name: list(part) for name, part in zip(("train", "valid", "test"), parts, strict=True)}


# ----------------------------------------------------------------- from bytes to what a network sees


def seed_of(*key: object) -> int:
    """Return a seed that depends on `key`, a purpose and a place in the run, alone."""
    return zlib.crc32(repr(key).encode())


def generator(*key: object) -> torch.Generator:
    """Return a CPU generator under the seed of `key`."""
    return torch.Generator().manual_seed(seed_of(*key))


def layout(device: torch.device) -> torch.memory_format:
    """Return the order in memory in which convolutions are fast; on MPS the one that is well tried."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


@functools.cache
def statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return MEAN and STD (1, 3, 1, 1) on `device`; kept, for sending them anew makes a GPU wait."""
    return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))


def prepare(
    images: torch.Tensor, size: int = SIZE, augment: Sequence[str] = (), uniforms: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what the network sees: float32 (B, 3, size, size), in `layout`, augmented, normalised.

    Args:
        images: uint8 (B, 3, H, W).
        size: pixels, both sides.
        augment: names among AUGMENTATIONS.
        uniforms: an image's own random numbers in [0, 1), (B, UNIFORMS); needed with `augment`.
    """
    changes = draw_changes(augment, uniforms) if uniforms is not None else {}
    warped = len(images) and {"crop", "flip", "trivial"} & {*augment}  # a process's share of a batch may be empty
    # warping reads 2 x 2 pixels, so from pictures much larger than the result it would read noise
    side = min(int(1.5 * size), images.shape[-1]) if warped else size
    if side != images.shape[-1]:
        images = images if images.device.type == "cpu" else images.float()  # only the CPU resizes bytes, and faster
        images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    pixels = images.float().div_(255)
    if warped:
        pixels = warp(pixels, size, changes)
    if {"color", "trivial"} & {*augment}:
        pixels = jitter(pixels, changes)
    mean, std = statistics(pixels.device)
    return pixels.sub_(mean).div_(std).contiguous(memory_format=layout(pixels.device))


def denormalize(inputs: torch.Tensor) -> torch.Tensor:
    """Undo `prepare`'s normalisation: pixels in [0, 1] to look at."""
    mean, std = statistics(inputs.device)
    return (inputs * std + mean).clamp(0, 1)


def draw_changes(augment: Sequence[str], uniforms: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what is done to each picture, from its own random numbers (B, UNIFORMS); (B,) each.

    `crop` is torchvision's RandomResizedCrop: CROP_SCALE of the area, CROP_RATIO of width to height,
    each drawn evenly (the ratio on a log scale), at any place where it fits; a side longer than the
    picture's is cut to it, where torchvision draws anew. `trivial` is after TrivialAugment
    (https://arxiv.org/abs/2103.10158): to half of the pictures, drawn at random, one of OPERATIONS
    is done, at a strength drawn evenly.
    """
    numbers = dict(zip(COLUMNS, uniforms.unbind(1), strict=True))
    one = torch.ones_like(numbers["x"])
    changes = {"width": one, "height": one, "mirror": one, **dict.fromkeys(OPERATIONS, 0 * one)}
    if "crop" in augment:
        area = CROP_SCALE[0] + (CROP_SCALE[1] - CROP_SCALE[0]) * numbers["area"]
        ratio = CROP_RATIO[0] * (CROP_RATIO[1] / CROP_RATIO[0]) ** numbers["ratio"]
        for side, name, length in (("width", "x", area * ratio), ("height", "y", area / ratio)):
            changes[side] = length.sqrt().clamp(max=1)
            changes[name] = (1 - changes[side]) * (2 * numbers[name] - 1)
    if "flip" in augment:
        changes["mirror"] = torch.where(numbers["flip"] < 0.5, -one, one)
    if "color" in augment:
        changes |= {name: COLOR * (2 * numbers[name] - 1) for name in ("brightness", "contrast", "saturation")}
    if "trivial" in augment:
        chosen = (numbers["operation"] * 2 * len(OPERATIONS)).long()
        for index, (name, most) in enumerate(OPERATIONS.items()):
            changes[name] = changes[name] + (chosen == index) * most * (2 * numbers["strength"] - 1)
    return changes


def warp(pixels: torch.Tensor, size: int, changes: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cut out, scale, mirror, rotate, shear and shift each picture in one pass of bilinear sampling.

    A matrix maps places in the result to places in the picture, both from -1 to 1: a width of 0.5
    cuts out half of it, a negative one mirrors, and (x, y) is the cut's centre.
    """
    cos, sin = changes["rotation"].cos(), changes["rotation"].sin()
    width, height = changes["width"] * changes["mirror"], changes["height"]
    across = [width * cos, height * (changes["shear_x"] - sin), changes["x"]]
    down = [width * (changes["shear_y"] + sin), height * cos, changes["y"]]
    matrix = torch.stack(across + down, 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, [len(pixels), 3, size, size], align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


def jitter(pixels: torch.Tensor, changes: dict[str, torch.Tensor]) -> torch.Tensor:
    """Change brightness, contrast and saturation of each picture; it stays in [0, 1]."""
    brightness, contrast, saturation = (
        (1 + changes[name]).view(-1, 1, 1, 1) for name in ("brightness", "contrast", "saturation")
    )
    grey = pixels.mean(1, keepdim=True)
    level = grey.mean((2, 3), keepdim=True)
    pixels = level + contrast * (grey + saturation * (pixels - grey) - level)
    return pixels.mul_(brightness).clamp_(0, 1)
