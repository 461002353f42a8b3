"""From folders of images to batches on the device.

    store = ImageStore("data", cache=DEFAULT_CACHE)  # decoded once, mapped into memory
    manifest = split(store, seed=0)  # {"train": [paths], "valid": [paths], "test": [paths]}
    rows = store.rows(manifest["train"])
    images, labels = store.batch(rows[:64], device)  # uint8 (64, 3, 224, 224), int64 (64,)
    inputs = to_inputs(images)  # float32 (64, 3, 224, 224), normalised

An image is decoded and resized once, into one file of bytes. After that a batch is one indexed
read, one transfer and one set of tensor operations, and no worker process is needed.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import mmap
import os
import random
import re
import sys
import tempfile
import time
import uuid
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps, PngImagePlugin
from torch.utils.data import random_split
from torchvision.datasets.utils import download_and_extract_archive, extract_archive
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

DEFAULT_DATA = "data"  # where Caltech101 is downloaded to
DEFAULT_CACHE = os.path.join(torch.hub.get_dir(), "alexnet-caltech101")  # see TORCH_HOME
CALTECH101_URL = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"
CALTECH101_MD5 = "3138e1922a9193bfa496528edbbc45d0"
CALTECH101_IMAGES = 8677  # without BACKGROUND_Google, which is not a class
SYSTEM_NAMES = {
    "#recycle", "#snapshot", "$recycle.bin", "@eadir", "@tmp", "__macosx", "__pycache__",
    "background_google", "lost+found", "recycler", "system volume information",
    "thumbs.db", "desktop.ini",
}  # fmt: skip
PARTS = {  # a folder is a ready-made part of the split if a word of its name matches
    "train": r"train(ing|val)?(set|data|images)?",
    "valid": r"(val|valid|validate|validation|dev)(set|data|images)?",
    "test": r"(test|tests|testing|eval|evaluation)(set|data|images)?",
}
DECODE_VERSION = 4  # of `decode`; a new number gives each cache a new name
SIZE = 224  # pixels, height and width of a stored image
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in torchvision's weights
SUFFIXES = {  # of files that Pillow decodes without other programs
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if kind in set(Image.OPEN) - {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
}

Image.MAX_IMAGE_PIXELS = 128_000_000  # Pillow refuses twice as many; here that is 1 GB as RGBA
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**27  # editors write megabytes
warnings.filterwarnings("ignore", module="PIL")  # about damaged metadata, without the file's name
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # our own errors name the file


class DataError(Exception):
    """Images that cannot be used as they are; the message says what to do."""


# --------------------------------------------------------------------------- finding the images


def visible(names: Iterable[str]) -> list[str]:
    """Return the names of files or folders that are neither hidden nor the system's, sorted."""
    return sorted(n for n in names if not n.startswith(".") and n.lower() not in SYSTEM_NAMES)


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and those in it, however deep, each with the names of its visible files.

    Links are followed, except to a folder above. Within a class folder, which lies directly in
    `folder`, each real folder is visited once, however many links lead to it.

    Raises:
        DataError: a folder cannot be listed.
    """

    def refuse(error: OSError):
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    visited = set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = visible(folders)
        real, top = os.path.realpath(place), Path(place).relative_to(folder).parts[:1]
        above = map(os.path.realpath, Path(os.path.abspath(place)).parents)
        if (top, real) in visited or real in above:
            folders.clear()
        else:
            visited.add((top, real))
            yield Path(place), visible(files)


def is_image(name: str) -> bool:
    """Tell whether a file is an image by its name."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def images_in(folder: Path) -> Iterator[Path]:
    """Yield the images in a folder, however deep."""
    return (place / name for place, files in walk(folder) for name in files if is_image(name))


def class_folders(folder: Path) -> list[str]:
    """Return the names of a folder's folders that hold images, however deep."""
    names = visible(path.name for path in folder.iterdir() if path.is_dir())
    return [name for name in names if any(images_in(folder / name))]


def locate(data: str, cache: str) -> Path:
    """Return the folder of class folders, or of parts, that `--data` means.

    It is downloaded or drawn if need be. If only one folder in it holds images, and has folders
    with images itself, that is taken instead, as in an unpacked archive.

    Raises:
        DataError: there is none, or it cannot be downloaded or drawn.
    """
    if data == "sample":
        return draw_sample(Path(cache) / "sample")
    folder = Path(data)
    for place in (*folder.glob("101_ObjectCategories"), *folder.glob("caltech*101/101_*"), folder):
        while place.is_dir() and (names := class_folders(place)):
            if len(names) > 1 or not class_folders(place / names[0]):
                return place
            place /= names[0]
    if folder.resolve() == Path(DEFAULT_DATA).resolve():
        return download(folder)
    problem = "no such folder"
    if folder.is_dir():
        kinds = {Path(name).suffix.lower() for _, files in walk(folder) for name in files} - {""}
        kinds = f" (but {shortened(sorted(kinds), 5)})" if kinds else ""
        problem = f"no class folders with images there{kinds}"
    raise DataError(f"{data}: {problem}; --data takes a folder of class folders, or 'sample'")


def download(folder: Path) -> Path:
    """Download Caltech101 (137 MB) into `folder` and return its folder of class folders.

    Raises:
        DataError: it cannot be downloaded or written.
    """
    final = folder / "caltech101" / "101_ObjectCategories"
    try:
        with (
            complete_folder(final) as new,
            warnings.catch_warnings(),
            contextlib.redirect_stdout(sys.stderr),  # older versions of torchvision print
        ):
            print(f"downloading Caltech101 by Li, Andreeto, Ranzato, Perona, CC BY 4.0 to {folder}")
            warnings.simplefilter("ignore")  # Python 3.12 and later warn of how archives are read
            download_and_extract_archive(CALTECH101_URL, new.parent, md5=CALTECH101_MD5)
            archive = new.parent / "caltech-101" / f"{new.name}.tar.gz"
            extract_archive(archive, new.parent)
            found = sum(1 for _ in images_in(new))
            if found != CALTECH101_IMAGES:
                raise RuntimeError(f"{found} images arrived instead of {CALTECH101_IMAGES}")
    except Exception as error:  # a broken connection or archive raises almost anything
        raise DataError(
            f"Caltech101 cannot be downloaded ({error}); try again, or unpack {CALTECH101_URL} "
            f"and the archive of images in it in {folder}, or try --data sample"
        ) from error
    return final


@contextlib.contextmanager
def complete_folder(path: Path):
    """Yield a temporary path; a folder made there becomes `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"prefix": ".", "dir": path.parent, "ignore_cleanup_errors": True}
    with tempfile.TemporaryDirectory(**options) as temporary:
        new = Path(temporary, path.name)
        yield new
        try:
            os.replace(new, path)
        except OSError:
            if not (path.is_dir() and class_folders(path)):  # else another process was faster
                raise


def part_of(name: str) -> str | None:
    """Return train, valid or test if a folder's name, such as `seg_train` or `ValSet`, says so."""
    words = re.split(r"[\W_\d]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    # the last word decides: a test_train is a train
    found = (part for word in reversed(words) for part in PARTS if re.fullmatch(PARTS[part], word))
    return next(found, None)


def class_in_part(path: str) -> str | None:
    """Return the class folder in PART/CLASS/FILE or PART/PART/CLASS/FILE; None without one."""
    top, *folders, _ = path.split("/")
    while len(folders) > 1 and part_of(folders[0]) == part_of(top):
        folders.pop(0)
    return folders[0] if folders else None


def classify(paths: list[str]) -> dict[str, tuple[str, str | None]]:
    """Return path -> (class, part), read from the names of folders.

    The part is None in a data set that is not split yet. In one that is, images outside of its
    parts or class folders are left out.

    Raises:
        DataError: there are parts alone, but train is missing or has no class folders.
    """
    tops = {path: path.partition("/")[0] for path in paths}
    parts = {top: part for top in sorted(set(tops.values())) if (part := part_of(top))}
    plain = {path: (top, None) for path, top in tops.items()}
    if not parts:  # each class folder may be split itself, into train and at least another part
        inner = {path: part_of(path.split("/")[1]) for path in tops if path.count("/") > 1}
        found = {path: (tops[path], part) for path, part in inner.items() if part}
        complete = {label for label, _ in found.values()} == set(tops.values())
        return found if complete and {"train"} < {part for _, part in found.values()} else plain
    labels = {path: class_in_part(path) for path, top in tops.items() if top in parts}
    trained = {label for path, label in labels.items() if parts[tops[path]] == "train"} - {None}
    alone = parts.keys() == set(tops.values())  # there are parts and nothing else
    several = len(set(parts.values())) > 1
    if trained and (several or (alone and len(trained) > 1)):
        # a part without any of train's classes, such as images to predict, is left out
        known = {tops[path] for path, label in labels.items() if label in trained}
        return {p: (c, parts[tops[p]]) for p, c in labels.items() if c and tops[p] in known}
    if several and alone:
        raise DataError(
            f"{', '.join(parts)}: without class folders in train, nothing can be learned"
        )
    return plain


def find_images(root: Path) -> tuple[dict[str, tuple[str, str | None]], list[str]]:
    """Return the images in `root`'s folders, sorted, and notes about what is passed over.

    Images are path -> (class, part), as `classify` has it. A path is relative to `root`, with
    forward slashes. No file is opened.
    """
    paths, empty, others = [], set(), Counter()
    for place, files in walk(root):
        folder = place.relative_to(root)
        rest = [name for name in files if not is_image(name)]
        suspects = (name for name in rest if place == root or "." not in name)
        # broken links: perhaps to folders on a drive that is not there
        empty.update(folder / name for name in suspects if not (place / name).exists())
        if place != root:
            empty.add(folder)  # unless an image is found in it
            paths += [(folder / name).as_posix() for name in files if is_image(name)]
            others.update(os.path.splitext(n)[1].lower() or "without suffix" for n in rest)
    images, notes = classify(sorted(paths)), []
    if empty := empty - {parent for path in paths for parent in Path(path).parents}:
        notes.append(f"folders without images: {shortened(sorted(map(Path.as_posix, empty)))}")
    for top, count in Counter(p.partition("/")[0] for p in paths if p not in images).items():
        notes.append(f"{top}: {count} images in no class folder of train's are passed over")
    if others:
        kinds = [f"{count} {suffix}" for suffix, count in others.most_common()]
        notes.append(f"files that are not images by their names: {shortened(kinds, 5)}")
    return images, notes


def shortened(items: Sequence, most: int = 20) -> str:
    """Return the items as text, at most `most` of them."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


# -------------------------------------------------------------------------------- the drawn sample


def draw_sample(folder: Path, images_per_class: int = 80) -> Path:
    """Draw the sample, 10 classes of shapes, into `folder` unless it exists; return it.

    Colours, size, place, rotation, proportions and background vary. The images are the same
    everywhere.
    """
    if folder.is_dir():
        return folder
    try:
        with complete_folder(folder) as new:
            for name, outline in SHAPES.items():
                (new / name).mkdir(parents=True)
                for index in range(images_per_class):
                    image = draw_shape(outline, random.Random(f"{name} {index}"))
                    image.save(new / name / f"image_{index + 1:04d}.jpg", quality=90)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); give --cache") from error
    return folder


def around(*radii: float) -> list[tuple[float, float]]:
    """Return the corners of an outline with those radii at evenly spaced angles, clockwise."""
    turn = 2 * math.pi / len(radii)
    return [(r * math.sin(i * turn), -r * math.cos(i * turn)) for i, r in enumerate(radii)]


SHAPES = {  # outlines within the unit circle
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
    """Return an RGB image, 120 to 200 pixels a side, of one shape on a noisy background."""

    def colour(level: int) -> tuple[int, ...]:
        return tuple(min(255, max(0, level + rng.randint(-50, 50))) for _ in range(3))

    width, height = rng.randint(120, 200), rng.randint(120, 200)
    background, foreground = rng.sample([rng.randint(0, 80), rng.randint(150, 255)], 2)
    noise = Image.frombytes("RGB", (16, 16), rng.randbytes(16 * 16 * 3)).resize((width, height))
    image = Image.blend(Image.new("RGB", (width, height), colour(background)), noise, 0.2)
    radius = min(width, height) * rng.uniform(0.32, 0.46)
    angle, stretch = rng.uniform(-0.35, 0.35), rng.uniform(0.8, 1)
    x0, y0 = (rng.uniform(radius, side - radius) for side in (width, height))
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)
    corners = [
        (x0 + stretch * x * cos - y * sin, y0 + stretch * x * sin + y * cos) for x, y in outline
    ]
    ImageDraw.Draw(image).polygon(corners, fill=colour(foreground))
    return image.filter(ImageFilter.GaussianBlur(0.7))


# ------------------------------------------------------------------------------ decoding, once


def digest(value: object) -> str:
    """Return 16 hexadecimal digits that tell one plain value from another."""
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def decode(file: str | Path | io.BytesIO) -> torch.Tensor:
    """Return an image of any kind that Pillow decodes as uint8 (SIZE, SIZE, 3), RGB.

    It is turned upright by its EXIF tag; what is transparent becomes white. Both sides are resized
    to SIZE, so the aspect ratio is not kept: the report's choice.

    Raises:
        Exception: almost any, on a damaged file; the message says why it cannot be decoded.
    """
    with Image.open(file) as image:
        image.draft("RGB", (SIZE, SIZE))  # the JPEG decoder may drop detail of a far larger image
        image.load()  # damaged pixels raise here
        with contextlib.suppress(Exception):  # it turns the image first, then may fail on the rest
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "La":  # Pillow converts La only to LA
            image = image.convert("LA")
        if image.mode.startswith("I"):  # 16 bits a pixel: convert() cuts instead of scaling
            levels = pil_to_tensor(image.convert("I"))[0]
            ambiguous = image.mode == "I" and 0 < levels.max() < 256  # perhaps 8 bits a pixel
            if ambiguous or levels.max() > 65_535 or levels.min() < 0:
                raise ValueError("32-bit integers: which value is white is unknown")
            levels[levels == image.info.get("transparency", -1)] = 65_535
            image = Image.fromarray((levels >> 8).byte().numpy())
        elif image.mode == "F":
            raise ValueError("floating point: which value is white is unknown")
        elif "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return pil_to_tensor(image).permute(1, 2, 0)


def try_decode(path: Path) -> tuple[torch.Tensor, int | str]:
    """Return `decode(path)` and the CRC-32 of the file; or black pixels and the error, as text."""
    try:
        content = path.read_bytes()
        return decode(io.BytesIO(content)), zlib.crc32(content)
    except Exception as error:  # Pillow raises almost anything on a damaged file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image of a known kind"
        return torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8), reason.splitlines()[0]


def build_cache(root: Path, paths: list[str], target: Path) -> list[int | str]:
    """Decode the images under `root` into TARGET.uint8; return the CRC-32 or the error of each.

    Those go into TARGET.json, which is written last: where it is, the pixels are complete. Several
    processes may build one cache at once; each renames a complete one of its own.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target)
    checksums = []
    with (
        complete_file(target.with_suffix(".uint8")) as out,
        tqdm(total=len(paths), desc="decoding once", unit=" images", disable=None) as progress,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,  # more would wait for the GIL
    ):
        for start in range(0, len(paths), 256):  # bounds what waits in memory
            chunk = [root / path for path in paths[start : start + 256]]
            for pixels, checksum in pool.map(try_decode, chunk):
                out.write(pixels.numpy())
                checksums.append(checksum)
            progress.update(len(chunk))
    with complete_file(target.with_suffix(".json"), "w") as out:
        json.dump({"root": os.path.realpath(root), "checksums": checksums}, out)
    return checksums


@contextlib.contextmanager
def complete_file(path: Path, mode: str = "wb", **options):
    """Open a temporary file; it becomes `path` if the block succeeds, and is deleted otherwise.

    A device or a pipe is written to as it is, and a link stays a link.
    """
    if path.exists() and not path.is_file():
        with open(path, mode, **options) as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # no other process's
    try:
        with open(temporary, mode, **options) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def remove_stale(target: Path) -> None:
    """Remove caches of images that have changed or are gone, and what killed processes left."""
    key = "[0-9a-f]" * 16
    for file in target.parent.glob(f"{key}-{key}.*"):
        with contextlib.suppress(OSError, ValueError, KeyError):  # Windows keeps a mapped file
            if file.suffix == ".json":
                changed = file.name[:16] == target.name[:16] and file.stem != target.name
                gone = not os.path.isdir(json.loads(file.read_bytes())["root"])
                old = time.time() - file.stat().st_mtime > 30 * 86_400
                if changed or (gone and old):  # for a month: another machine may have the images
                    file.unlink()
                    file.with_suffix(".uint8").unlink()
            elif not file.with_suffix(".json").exists():
                if time.time() - file.stat().st_mtime > 86_400:  # a day: no process writes it
                    file.unlink()


class ImageStore:
    """The images of a folder of class folders, decoded, in one memory-mapped file.

    The file lies in `cache`. Its name is a digest of what it was made from, so once an image has
    changed, another file is made, and `remove_stale` deletes the old one. Pages are read when they
    are needed and can be dropped at any time, so a data set may be larger than memory.

    Args:
        data: what `--data` takes.
        cache: the folder for the file; created when missing.
        skip_bad_images: continue without the images that cannot be read.

    Attributes:
        root: the folder of the class folders, or of the parts of a split.
        classes: their names; a label is an index into this list.
        paths: the paths, relative to `root`, of the images that can be read, sorted.
        labels: int64 (N,), of all images, also those that cannot be read; `rows` gives indices.
        pixels: uint8 (N, SIZE, SIZE, 3), of the same.
        parts: path -> train, valid or test where the data set is split already; else empty.
        checksums: path -> CRC-32 of each file that can be read.
        fingerprint: a digest of all paths and checksums.
        notes: lines for people about what is passed over.

    Raises:
        DataError: too few classes or images, some cannot be read, or the cache cannot be written.
    """

    def __init__(self, data: str, cache: str, skip_bad_images: bool = False):
        self.root = locate(data, cache)
        images, self.notes = find_images(self.root)
        if os.path.realpath(self.root) != os.path.realpath(data):
            self.notes.insert(0, f"images are read from {self.root}")
        paths, self.classes = list(images), sorted({label for label, _ in images.values()})
        label = {name: index for index, name in enumerate(self.classes)}
        self.labels = torch.tensor([label[name] for name, _ in images.values()])
        self.parts = {path: part for path, (_, part) in images.items() if part}
        if len(self.classes) < 2:
            raise DataError(f"{self.root}: at least two class folders with images are needed")
        key = digest([SIZE, DECODE_VERSION, [self.stamp(path) for path in paths]])
        target = Path(cache, f"{digest(os.path.realpath(self.root))}-{key}")
        self.pixels, found = self.map_cache(paths, target, retry=not skip_bad_images)
        found = dict(zip(paths, found, strict=True))
        errors = {path: reason for path, reason in found.items() if isinstance(reason, str)}
        if errors:
            bad = shortened([f"{path!r} ({reason})" for path, reason in errors.items()])
            if not skip_bad_images:
                raise DataError(
                    f"{self.root}: {len(errors)} of {len(paths)} images cannot be read: {bad}; "
                    "repair or remove them, or give --skip-bad-images"
                )
            self.notes.append(f"{len(errors)} images cannot be read and are skipped: {bad}")
        self.checksums = {path: found[path] for path in paths if path not in errors}
        self.fingerprint = digest([paths, [self.checksums.get(path, 0) for path in paths]])
        self._row = {path: row for row, path in enumerate(paths) if path not in errors}
        self.paths = list(self._row)

    def stamp(self, path: str) -> tuple:
        """Return what differs once a file has changed: its size and times. It is not opened.

        A file that is moved here keeps its time of modification; its ctime is new.
        """
        with contextlib.suppress(OSError):
            status = os.stat(self.root / path)
            return path, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        return (path,)  # a broken link

    def map_cache(self, paths: list[str], target: Path, retry: bool) -> tuple[torch.Tensor, list]:
        """Return the pixels, and the CRC-32 or the error of each image; build the cache if need be.

        With `retry`, it is built anew if an image that could not be read can be read now.
        """
        shape = (len(paths), SIZE, SIZE, 3)
        file = target.with_suffix(".uint8")
        try:
            try:
                checksums = json.loads(target.with_suffix(".json").read_bytes())["checksums"]
                complete = (len(checksums), file.stat().st_size) == (len(paths), math.prod(shape))
                bad = [p for p, c in zip(paths, checksums, strict=True) if isinstance(c, str)]
                if retry and any(isinstance(try_decode(self.root / p)[1], int) for p in bad):
                    complete = False
            except (OSError, ValueError, LookupError, TypeError):
                complete = False
            if not complete:
                checksums = build_cache(self.root, paths, target)
            with open(file, "rb") as opened, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns that the pixels are read-only
                mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
                return torch.frombuffer(mapped, dtype=torch.uint8).view(shape), checksums
        except OSError as error:
            raise DataError(
                f"{target.parent}: the decoded images ({math.prod(shape) / 1e6:.0f} MB) cannot be "
                f"kept there ({error.strerror}); give another folder with --cache"
            ) from error

    def rows(self, paths: list[str]) -> torch.Tensor:
        """Return the indices of those images in `pixels` and `labels`, int64.

        Raises:
            DataError: an image is missing.
        """
        missing = [path for path in paths if path not in self._row]
        if missing:
            raise DataError(
                f"{self.root}: {len(missing)} of {len(paths)} images of the checkpoint's split are "
                f"missing or cannot be read, such as {missing[0]!r}; give the right --data"
            )
        return torch.tensor([self._row[path] for path in paths], dtype=torch.int64)

    def differences(self, checksums: dict[str, int]) -> str:
        """Say in words how the images differ from those of earlier checksums."""
        both = self.checksums.keys() & checksums.keys()
        kinds = {
            "new": self.checksums.keys() - both,
            "missing": checksums.keys() - both,
            "changed": {path for path in both if self.checksums[path] != checksums[path]},
        }
        return ", ".join(f"{len(p)} {kind} (such as {min(p)!r})" for kind, p in kinds.items() if p)

    def move_to(self, device: torch.device) -> None:
        """Move the pixels to a GPU if they take less than a quarter of its free memory."""
        if device.type == "cuda" and self.pixels.numel() < torch.cuda.mem_get_info(device)[0] / 4:
            self.pixels, self.labels = self.pixels.to(device), self.labels.to(device)

    def batch(self, rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images, uint8 (B, 3, SIZE, SIZE) in channels_last, and labels, int64 (B,).

        Args:
            rows: int64 (B,), on the device of `pixels`.
        """
        images, labels = self.pixels.index_select(0, rows), self.labels.index_select(0, rows)
        cuda = device.type == "cuda"
        if cuda and not images.is_cuda:  # from pinned memory, a copy does not make the CPU wait
            images, labels = images.pin_memory(), labels.pin_memory()
        images, labels = (t.to(device, non_blocking=cuda) for t in (images, labels))
        return images.permute(0, 3, 1, 2), labels


def split(store: ImageStore, seed: int) -> dict[str, list[str]]:
    """Return the manifest, the paths in train, valid and test: 8:1:1 at random under `seed`.

    Ready-made parts stay as they are; a missing one is drawn from train. If train would lack a
    class, the first image of each class in the drawn order moves to train.

    Raises:
        DataError: a part is empty.
    """
    manifest = {part: [p for p in store.paths if store.parts.get(p) == part] for part in PARTS}
    drawn_parts = [part for part in PARTS if part == "train" or not manifest[part]]
    pool = manifest["train"] if store.parts else store.paths
    shares = [8 if part == "train" else 1 for part in drawn_parts]
    shares = [share / sum(shares) for share in shares]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty part is an error below
        drawn = random_split(pool, shares, torch.Generator().manual_seed(seed))
    labels = dict(zip(store.paths, store.labels[store.rows(store.paths)].tolist(), strict=True))
    order = [path for subset in drawn for path in subset]
    first = {labels[path]: path for path in reversed(order)}  # of each class
    if first.keys() - {labels[path] for path in drawn[0]}:  # train lacks a class
        # False sorts before True, so these come first; the others keep their order
        order.sort(key=lambda path: path != first[labels[path]])
    rest = iter(order)
    for part, subset in zip(drawn_parts, drawn, strict=True):
        manifest[part] = list(itertools.islice(rest, len(subset)))
    if not all(manifest.values()):
        raise DataError(f"{len(pool)} images are too few to split 8:1:1; at least 10 are needed")
    return manifest


# --------------------------------------------------------------- from bytes to the network's inputs

# Random numbers are a function of the seed and of where a run stands, so a run that is resumed
# anywhere sees the same ones, and no random state is saved. Each augmentation has a stream of its
# own: adding one, here and in `find_changes`, does not change the others.
# augmentation -> random numbers for each image
AUGMENTATIONS = {"crop": 4, "flip": 1, "color": 3, "gray": 1, "trivial": 2}
CROP_SCALE, CROP_RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
GRAY = 0.1  # the share of images that lose their colour
COLOR = 0.3  # factors are from 0.7 to 1.3
OPERATIONS = {  # "trivial" does one of these; the number is its largest change, up or down
    "rotation": math.radians(30), "shear_x": 0.3, "shear_y": 0.3,
    "x": 0.25, "y": 0.25,  # a shift, as a share of half a side
    "brightness": 0.6, "contrast": 0.7, "saturation": 0.7,
}  # fmt: skip


def seed_of(*key: object) -> int:
    """Return a seed that depends only on `key`, a purpose and a place in the run."""
    return zlib.crc32(repr(key).encode())


def generator(*key: object) -> torch.Generator:
    """Return a CPU generator under the seed of `key`."""
    return torch.Generator().manual_seed(seed_of(*key))


def draw_uniforms(names: Sequence[str], images: int, seed: int, epoch: int) -> dict:
    """Return an epoch's random numbers in [0, 1): augmentation -> (images, k)."""
    shapes = {name: (images, AUGMENTATIONS[name]) for name in names}
    return {n: torch.rand(s, generator=generator(n, seed, epoch)) for n, s in shapes.items()}


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the memory format in which convolutions are fast; on MPS, the well-tested one."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


@functools.cache
def mean_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return MEAN and STD, (1, 3, 1, 1); cached: a copy to a GPU makes the CPU wait."""
    return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))


def to_inputs(
    images: torch.Tensor, size: int = SIZE, changes: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Return the network's inputs: float32 (B, 3, size, size), augmented and normalised.

    Args:
        images: uint8 (B, 3, S, S), of any size S.
        size: pixels, height and width.
        changes: what augmentation does to each image, as `find_changes` returns it.
    """
    changes = changes or {}
    if not len(images):  # a process's share of the last batch; CUDA cannot resize an empty tensor
        return torch.empty(0, 3, size, size, device=images.device)
    warped = "matrix" in changes
    # warping reads 2 x 2 pixels, so images much larger than the result would alias
    side = min(int(1.5 * size), images.shape[-1]) if warped else size
    if side != images.shape[-1]:
        if images.device.type != "cpu":  # the CPU resizes uint8, which is faster
            images = images.float()
        images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    pixels = images.float().div_(255)
    if warped:
        # crop, scale, mirror, rotate, shear and shift each image in one pass of bilinear sampling
        grid = F.affine_grid(changes["matrix"], [len(pixels), 3, size, size], align_corners=False)
        pixels = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    if "factors" in changes:
        pixels = jitter(pixels, changes["factors"])
    if "gray" in changes:
        gray = changes["gray"].view(-1, 1, 1, 1)
        pixels = torch.where(gray, pixels.mean(1, keepdim=True), pixels)
    mean, std = mean_std(pixels.device)
    pixels = pixels.sub_(mean).div_(std)
    return pixels.contiguous(memory_format=memory_format(pixels.device))


def to_pixels(inputs: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation of `to_inputs`: pixels in [0, 1] to look at."""
    mean, std = mean_std(inputs.device)
    return (inputs * std + mean).clamp(0, 1)


def find_changes(uniforms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what is done to each of B images, from their random numbers.

    "crop" is torchvision's RandomResizedCrop: CROP_SCALE of the area, CROP_RATIO of width to
    height, each uniform (the ratio on a log scale), at any place where it fits. A side longer than
    the image's is cut to it, where torchvision draws again. "trivial" follows TrivialAugment
    (https://arxiv.org/abs/2103.10158): half of the images, at random, get one of OPERATIONS, of
    uniform strength.

    Returns:
        A dict of what the augmentations need: "matrix" (B, 2, 3), for `F.affine_grid`; "factors"
        (B, 3), for `jitter`; "gray" (B, 1), bool.
    """
    if not uniforms:
        return {}
    one = torch.ones_like(next(iter(uniforms.values()))[:, 0])
    values = {"width": one, "height": one, **dict.fromkeys(OPERATIONS, 0 * one)}
    if "crop" in uniforms:
        area, ratio, x, y = uniforms["crop"].unbind(1)
        area = CROP_SCALE[0] + (CROP_SCALE[1] - CROP_SCALE[0]) * area
        ratio = CROP_RATIO[0] * (CROP_RATIO[1] / CROP_RATIO[0]) ** ratio
        values["width"] = (area * ratio).sqrt().clamp(max=1)
        values["height"] = (area / ratio).sqrt().clamp(max=1)
        values["x"] = (1 - values["width"]) * (2 * x - 1)
        values["y"] = (1 - values["height"]) * (2 * y - 1)
    if "flip" in uniforms:
        values["width"] = values["width"] * torch.where(uniforms["flip"][:, 0] < 0.5, -1, 1)
    if "color" in uniforms:
        factors = COLOR * (2 * uniforms["color"] - 1)
        values |= zip(("brightness", "contrast", "saturation"), factors.unbind(1), strict=True)
    if "trivial" in uniforms:
        choice, strength = uniforms["trivial"].unbind(1)
        slot = (choice * 2 * len(OPERATIONS)).long()  # half of the slots have no operation
        for index, (name, most) in enumerate(OPERATIONS.items()):
            # added to what crop and color chose
            values[name] = values[name] + (slot == index) * most * (2 * strength - 1)
    found = {}
    if {"crop", "flip", "trivial"} & uniforms.keys():
        found["matrix"] = matrices(values)
    if {"color", "trivial"} & uniforms.keys():
        factors = [1 + values[name] for name in ("brightness", "contrast", "saturation")]
        found["factors"] = torch.stack(factors, 1)
    if "gray" in uniforms:
        found["gray"] = uniforms["gray"] < GRAY
    return found


def matrices(values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return (B, 2, 3) matrices from places in the result to places in the image, from -1 to 1.

    A width of 0.5 crops half of the image, a negative one mirrors it, and (x, y) is the centre of
    the crop.
    """
    cos, sin = values["rotation"].cos(), values["rotation"].sin()
    width, height = values["width"], values["height"]
    across = [width * cos, height * (values["shear_x"] - sin), values["x"]]
    down = [width * (values["shear_y"] + sin), height * cos, values["y"]]
    return torch.stack(across + down, 1).view(-1, 2, 3)


def jitter(pixels: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Change brightness, contrast and saturation of each image; pixels stay in [0, 1]."""
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)
    gray = pixels.mean(1, keepdim=True)
    level = gray.mean((2, 3), keepdim=True)
    pixels = level + contrast * (gray + saturation * (pixels - gray) - level)
    return pixels.mul_(brightness).clamp_(0, 1)


def cutmix(inputs: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, float]:
    """Replace a rectangle of each image by that of its partner (https://arxiv.org/abs/1905.04899).

    The partner of image i is image B - 1 - i; the rectangle is the same for all.

    Returns:
        The inputs, changed in place, and the share of each image that is still its own.
    """
    side = inputs.shape[-1]
    cut = math.sqrt(1 - rng.random())  # the rectangle's side, as a share of the image's
    x, y = rng.random(), rng.random()
    left, right = (round(side * min(1, max(0, x + half))) for half in (-cut / 2, cut / 2))
    top, bottom = (round(side * min(1, max(0, y + half))) for half in (-cut / 2, cut / 2))
    patch = inputs[:, :, top:bottom, left:right].flip(0)  # a copy
    inputs[:, :, top:bottom, left:right] = patch
    return inputs, 1 - (right - left) * (bottom - top) / side**2
