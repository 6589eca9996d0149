"""The programs in examples/ run and print what they promise."""

import re
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_every_example_has_a_test():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "pretrain_family.py",
        "slimmable_layers.py",
        "one_operator.py",
    }


def test_pretrain_family_finds_similar_images(run_python, tmp_path):
    printed = run_python(str(EXAMPLES / "pretrain_family.py"), str(tmp_path / "out"))
    hits = re.findall(
        r"^(c\d+-d1111): [\d,]+ parameters, the most similar image has the same shape in (\d+)%", printed, re.M
    )
    assert [name for name, _ in hits] == ["c8-d1111", "c16-d1111"]
    assert all(int(share) > 40 for _, share in hits), "a random image has the same shape in 33 %"


def test_slimmable_layers_classify_at_every_width(run_python):
    printed = run_python(str(EXAMPLES / "slimmable_layers.py"))
    accuracies = dict(re.findall(r"^width (\S+): [\d,]+ parameters, accuracy ([\d.]+)%", printed, re.M))
    assert accuracies.keys() == {"0.5", "1.0"}
    assert all(float(accuracy) > 90 for accuracy in accuracies.values())


def test_one_operator_agrees_with_plain_pytorch(run_python):
    printed = run_python(str(EXAMPLES / "one_operator.py"))
    differences = [float(value) for value in re.findall(r"difference (\S+)", printed)]
    assert len(differences) == 7 and max(differences) < 1e-4
    assert printed.count(" ms forward") == 2
