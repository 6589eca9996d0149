"""Evaluation of the target network, and of lists of labelled images."""

import json

import pytest
import torch

from dspnet_fast.errors import InputError
from train import evaluate
from train.data.datasets import open_images
from train.evaluation.pretrained import PretrainedFamily
from train.evaluation.protocols.semi import SemiOptions, evaluate_semi
from train.run import checkpoint


def test_target_weights_are_evaluated_beside_the_online_ones(trained):
    state = checkpoint.load(checkpoint.newest_of_run(trained))["model"]
    family = PretrainedFamily(trained, torch.device("cpu"), part="target")
    for name, parameter in family.encoder.named_parameters():
        torch.testing.assert_close(parameter, state[f"target.encoder.{name}"], rtol=0, atol=0)
    for part in ("online", "target"):
        evaluate._main(["knn", str(trained), "--k=5", "--workers=0", "--device=cpu", "--network-part", part])
    online, target = (json.loads((trained / "evaluation" / f"{n}.json").read_text()) for n in ("knn", "knn-target"))
    assert "network_part" not in online and target["network_part"] == "target"
    with pytest.raises(InputError, match="--network-part must be online or target, not 'both'"):
        PretrainedFamily(trained, torch.device("cpu"), part="both")


@pytest.fixture
def numbered(images, tmp_path):
    """A copy of the image folder in which every name occurs once."""
    for path in sorted(images.rglob("*.png")):
        *_, split, name, file = path.parts
        copy = tmp_path / "numbered" / split / name / f"{name}_{split}_{file}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return tmp_path / "numbered"


def test_listed_images_are_the_labelled_ones(trained, numbered, tmp_path):
    train = open_images(str(numbered), "train")
    lists = {}
    for name, indices in (("few.txt", [0, 50, 3, 70]), ("more.txt", range(1, 80, 5))):
        lists[name] = sorted(indices)
        (tmp_path / name).write_text("".join(f"any/{train.file(i).rsplit('/', 1)[1]}\n" for i in indices))
    files = ",".join(str(tmp_path / name) for name in lists)
    options = {"data": str(numbered), "workers": 0, "device": "cpu", "epochs": 2, "methods": "linear"}
    report = evaluate_semi(trained, SemiOptions(subset_file=files, **options))
    assert {name: subset["images"] for name, subset in report["subsets"].items()} == {"5 %": 4, "20 %": 16}
    for share, indices in zip(("5", "20"), lists.values()):
        written = (trained / "evaluation" / f"semi-{share}-percent.txt").read_text()
        assert list(map(int, written.split())) == indices
    assert {"5 % linear", "20 % linear"} <= report["networks"]["c8-d1111"].keys()


@pytest.mark.parametrize(("content", "reason"), [("", "is empty"), ("other.png\n", "names other.png, which is not in")])
def test_unusable_lists_are_named(trained, numbered, tmp_path, content, reason):
    (tmp_path / "list.txt").write_text(content)
    options = SemiOptions(subset_file=str(tmp_path / "list.txt"), data=str(numbered), workers=0, methods="linear")
    with pytest.raises(InputError, match=f"list.txt {reason}"):
        evaluate_semi(trained, options)
