"""Images that go away, break or try to lead outside."""

import io
import signal
import tarfile
from pathlib import Path

from fault_lab import Lab
from fault_table import Outcome, fault

STOPPED_AT = 5


@fault("the folder of images goes away in the middle of a run")
def gone_in_the_middle(lab: Lab) -> Outcome:
    process = lab.start(pause_at=STOPPED_AT)
    lab.paused()
    away = lab.images.rename(lab.folder / "away")
    lab.go()

    def bring_back() -> None:
        away.rename(lab.images)
        lab.resume()

    return Outcome(*process.end(), go_on=bring_back)


@fault("the folder of images is not there when the run is resumed")
def gone_before_a_resume(lab: Lab) -> Outcome:
    process = lab.start(pause_at=STOPPED_AT)
    lab.paused()
    process.send(signal.SIGTERM)
    lab.go()
    process.end()
    away = lab.images.rename(lab.folder / "away")

    def bring_back() -> None:
        away.rename(lab.images)
        lab.resume()

    return Outcome(*lab.start(resume=True).end(), go_on=bring_back)


def broken_image(lab: Lab, **options: object) -> tuple[Outcome, Path, bytes]:
    """One image becomes unreadable while the run is paused."""
    process = lab.start(pause_at=STOPPED_AT, **options)
    lab.paused()
    image = lab.images / "017.png"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    lab.go()
    return Outcome(*process.end()), image, content


@fault("an image becomes unreadable")
def unreadable(lab: Lab) -> Outcome:
    outcome, image, content = broken_image(lab)

    def repair() -> None:
        image.write_bytes(content)
        lab.resume()

    outcome.go_on = repair
    return outcome


@fault("an image becomes unreadable, with `--max-bad-images`")
def left_out(lab: Lab) -> Outcome:
    return broken_image(lab, max_bad_images=1)[0]


def around(lab: Lab) -> set[Path]:
    """All files and folders near the run, but not those in it."""
    return {path for path in lab.folder.parent.rglob("*") if lab.out not in path.parents}


@fault("a shard with names and links that lead outside")
def path_tricks(lab: Lab) -> Outcome:
    """The images of the undisturbed run under such names, and between them links to files that are no part of it."""
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
    before = around(lab)
    outcome = Outcome(*lab.start(data=shard).end())
    assert around(lab) - before == {lab.out, lab.folder / "printed1"}
    assert not any(path.suffix == ".png" for path in Path("/").iterdir())
    return outcome
