"""Images that disappear or become unreadable, and a shard with paths that point outside."""

import io
import signal
import tarfile
from pathlib import Path

from fault_lab import Lab
from fault_table import Outcome, fault

STOPPED_AT = 5


@fault("the image folder disappears during a run")
def folder_disappears(lab: Lab) -> Outcome:
    process = lab.start(pause_at=STOPPED_AT)
    lab.paused()
    away = lab.images.rename(lab.folder / "away")
    lab.go()

    def restore() -> None:
        away.rename(lab.images)
        lab.resume()

    return Outcome(*process.end(), go_on=restore)


@fault("the image folder is missing when the run is resumed")
def folder_missing(lab: Lab) -> Outcome:
    process = lab.start(pause_at=STOPPED_AT)
    lab.paused()
    process.send(signal.SIGTERM)
    lab.go()
    process.end()
    away = lab.images.rename(lab.folder / "away")

    def restore() -> None:
        away.rename(lab.images)
        lab.resume()

    return Outcome(*lab.start(resume=True).end(), go_on=restore)


def damage_image(lab: Lab, **options: object) -> tuple[Outcome, Path, bytes]:
    """Truncate an image while the run is paused."""
    process = lab.start(pause_at=STOPPED_AT, **options)
    lab.paused()
    image = lab.images / "017.png"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    lab.go()
    return Outcome(*process.end()), image, content


@fault("an image becomes unreadable, above the limit `--max-bad-images`")
def unreadable(lab: Lab) -> Outcome:
    outcome, image, content = damage_image(lab)

    def repair() -> None:
        image.write_bytes(content)
        lab.resume()

    outcome.go_on = repair
    return outcome


@fault("an image becomes unreadable, within the limit `--max-bad-images`")
def left_out(lab: Lab) -> Outcome:
    return damage_image(lab, max_bad_images=1)[0]


def files_outside(lab: Lab) -> set[Path]:
    """All files and folders around the run directory, without its contents."""
    return {path for path in lab.folder.parent.rglob("*") if lab.out not in path.parents}


@fault("a shard with member names and links that point outside")
def path_tricks(lab: Lab) -> Outcome:
    """Pack the images under such names, with links to files outside of the shard between them."""
    outside = lab.folder / "outside.png"
    outside.write_bytes((lab.images / "000.png").read_bytes())
    shard = lab.folder / "shard.tar"
    with tarfile.open(shard, "w") as tar:
        for index, image in enumerate(sorted(lab.images.iterdir())):
            content = image.read_bytes()
            prefix = ("../../", "/", f"{lab.folder}/", "a/../../")[index % 4]
            member = tarfile.TarInfo(f"{prefix}{image.name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo(f"link{index}.png")
            link.type, link.linkname = (tarfile.SYMTYPE, tarfile.LNKTYPE)[index % 2], f"../{outside.name}"
            tar.addfile(link)
    before = files_outside(lab)
    outcome = Outcome(*lab.start(data=shard).end())
    assert files_outside(lab) - before == {lab.out, lab.folder / "printed1"}
    assert not any(path.suffix == ".png" for path in Path("/").iterdir())
    return outcome
