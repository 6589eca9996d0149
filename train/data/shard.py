"""`python -m train.data.shard`: write an image dataset as WebDataset shards."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from dspnet_fast.atomic import check_writable, sync
from dspnet_fast.errors import InputError

from .. import cli
from ..run.interruption import NOTHING
from ..run.options import check_options, count, not_negative, option
from ..run.progress import Monitor
from .bad_images import BadImages
from .datasets import open_images
from .datasets.arrays import decode_array, is_array, is_eight_bit
from .datasets.folder_files import EXTENSIONS
from .datasets.images import ImageDataset, decode
from .datasets.webdataset import CLASSES, LABEL, TEST, write_index
from .sampler import mix

DESCRIPTION = """\
Write an image dataset as tar files, which need fewer and larger reads than single files: OUT/000.tar, ... with an index
each, and the test split in OUT/test. Every image is decoded once as a check and stored unchanged. OUT appears once it
is complete; after an error nothing is left."""
EXAMPLE = """\
  dspnet-shard --data photos --out shards
  dspnet-pretrain --data 'shards/{000..015}.tar' --out runs/first"""


@dataclass(kw_only=True)
class ShardOptions:
    """Options of `train.data.shard`."""

    data: str = option("", "images, as in dspnet-pretrain: a folder, a name or shards", metavar="IMAGES")
    out: str = option("", "new folder for the shards", metavar="DIR")
    shards: int = count(16, "tar files of the training split, each with a random part of it")
    max_bad_images: int = not_negative(0, "unreadable images that are left out; one more is an error")


def write_shards(options: ShardOptions) -> int:
    """Write the shards of both splits.

    Returns:
        The number of images written.

    Raises:
        InputError: an option is missing, the folder exists, more images are unreadable than allowed, or writing fails,
            for example on a full disk.
    """
    check_options(options)
    if not options.data or not options.out:
        raise InputError("--data IMAGES and --out DIR are needed: see dspnet-shard --help")
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} exists already: give a new folder")
    check_writable(out.absolute().parent)
    train = open_images(options.data, "train")
    bad = BadImages(options.max_bad_images)
    temporary = out.absolute().with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        with Monitor("shard", len(train)) as monitor:

            def tick() -> None:
                monitor.advance()
                monitor.status("images")
                for line in bad.new_messages():
                    monitor.line(line)

            written = _write_split(train, temporary, options.shards, bad, tick)
            if train.labels is not None:
                try:
                    test = open_images(options.data, "test")
                except InputError as error:
                    monitor.line(f"no test split: {error}")
                else:
                    (temporary / TEST).mkdir()
                    shards = max(1, round(options.shards * len(test) / len(train)))
                    written += _write_split(test, temporary / TEST, shards, bad, lambda: None)
            for line in bad.new_messages():
                monitor.line(line)
        os.rename(temporary, out)
        sync(out.absolute().parent)
    except OSError as error:
        raise InputError(
            f"cannot write {out} ({error.strerror}): nothing was kept; mend this and start again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def _write_split(images: ImageDataset, folder: Path, shards: int, bad: BadImages, tick: Callable[[], None]) -> int:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(mix(0))).tolist()
    shards = min(shards, len(images))
    written = 0
    for k in range(shards):
        shard = folder / f"{k:03}.tar"
        with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in order[k::shards]:
                try:
                    name, content = _file(images, i)
                except InputError as error:
                    bad.add([(images.file(i), str(error))])
                else:
                    _add(tar, name, content)
                    if images.labels is not None:
                        _add(tar, f"{i:08}.{LABEL}", str(images.labels[i].item()).encode())
                tick()
        written += write_index(shard, shard.with_suffix(".idx"))
    if images.classes:
        names = "".join(f"{name}\n" for name in images.classes)
        (folder / CLASSES).write_text(names, "utf-8", errors="surrogateescape")
    for path in (*folder.iterdir(), folder):
        sync(path)
    return written


def _file(images: ImageDataset, i: int) -> tuple[str, bytes]:
    """Name and content of the image's member of the shard; InputError if the image cannot be decoded."""
    suffix = Path(images.file(i)).suffix.lower()
    if is_array(suffix):
        raise InputError(f"{images.file(i)} is an array: shards hold images; train on the folder")
    if suffix in EXTENSIONS:
        content = images.encoded(i)
        if is_eight_bit(content, images.file(i)):
            decode(content, images.file(i))
        else:
            decode_array(content, images.file(i))
        return f"{i:08}{suffix}", content
    image = images.load(i)
    file = io.BytesIO()
    assert isinstance(image, Image.Image)
    image.save(file, "png")
    return f"{i:08}.png", file.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _main(argv: Sequence[str]) -> None:
    parser = cli.parser("shard", DESCRIPTION, EXAMPLE, "[options] --data IMAGES --out DIR")
    cli.add_options(parser, ShardOptions)
    options = cli.to_config(ShardOptions, parser.parse_args(argv))
    written = write_shards(options)
    print(f"wrote {written} images to {options.out}")


main = cli.command(_main, interrupted=NOTHING)

if __name__ == "__main__":
    main()
