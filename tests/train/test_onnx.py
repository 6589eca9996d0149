"""Export for deployment: verified ONNX files, the manifest's measurements, the switchable file."""

import json
import shutil
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from dspnet_fast import exported, onnx_file
from dspnet_fast.cost import parameter_count
from dspnet_fast.errors import InputError
from dspnet_fast.models import build, family
from dspnet_fast.slim import slim
from dspnet_fast.statistics import post_statistics
from dspnet_fast.switchable import Switchable
from tests.commands import run as run_command
from train import export
from train.cli import DONE, FAILED, WRONG_INPUT
from train.data.datasets import open_images
from train.evaluation.pretrained import PretrainedFamily

ROOT = Path(__file__).parents[2]
DNS = ("c8-d1111", "c8-d1121", "c16-d2121")


run = partial(run_command, export)


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the finished run without exports."""
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("exported"))


@pytest.fixture(scope="module")
def deployed(finished, tmp_path_factory):
    """A run exported in all formats."""
    out = shutil.copytree(finished, tmp_path_factory.mktemp("deployed") / "run")
    assert run(out, "--onnx", "--switchable", "--threads", 1, "--batch-size", 2) == DONE
    return out


@pytest.fixture(scope="module")
def pixels(deployed, images):
    trained = PretrainedFamily(deployed, torch.device("cpu"))
    return torch.cat(list(trained.batches(open_images(str(images), "test"), "test", 0))).contiguous()


@pytest.mark.parametrize("dn", DNS)
@torch.no_grad()
def test_onnx_equals_the_network(deployed, pixels, dn):
    folder = deployed / "exported" / dn
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    network = exported.load(folder)
    for batch in (pixels, pixels[:1], pixels[:3]):
        (features,) = session.run(None, {"images": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(features), network(batch), rtol=1e-4, atol=1e-4)
    assert session.get_inputs()[0].shape == ["batch", 3, 12, 12]
    assert session.get_outputs()[0].name == "features"


@pytest.mark.parametrize("dn", DNS)
def test_onnx_file_contains_the_parameters_and_no_paths(deployed, dn):
    folder = deployed / "exported" / dn
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "manifest.json", "model.onnx"}
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / "model.onnx").read_bytes()
    assert len(content) == manifest["onnx"]["bytes"]
    assert 0.95 < len(content) / (4 * manifest["parameters"]) < 1.1
    assert b"stack_trace" not in content and str(ROOT).encode() not in content and b"site-packages" not in content
    onnx.checker.check_model(onnx.load(folder / "model.onnx"), full_check=True)


@pytest.mark.parametrize("dn", DNS)
def test_manifest_has_verification_and_latency(deployed, dn):
    manifest = json.loads((deployed / "exported" / dn / "manifest.json").read_text())
    assert manifest["onnx"]["verified_on"] == 8 and 0 <= manifest["onnx"]["largest_difference"] <= 1e-4
    latency = manifest["latency"]
    assert {"threads": 1, "batch_size": 2, "image_size": 12, "torch": torch.__version__}.items() <= latency.items()
    assert set(latency["of"]) == {"torch", "onnxruntime"}
    assert all(0 < times["median_ms"] <= times["p90_ms"] and times["calls"] > 1 for times in latency["of"].values())


@torch.no_grad()
def test_switchable_file_equals_the_exported_networks(deployed, pixels):
    runtime = Switchable.load(deployed / "exported" / "switchable.safetensors")
    assert runtime.names == DNS and set(runtime.latency) == set(DNS)
    assert {"threads": 1, "batch_size": 2, "image_size": 12}.items() <= runtime.conditions.items()
    for name in runtime.names:
        expected = exported.load(deployed / "exported" / name)(pixels)
        torch.testing.assert_close(runtime.use(name)(pixels), expected, rtol=0, atol=1e-6)


def test_switchable_file_can_contain_a_part_of_the_family(out):
    assert run(out, "--dn", "c8-d1111", "--dn", "c8-d2121", "--switchable") == DONE
    runtime = Switchable.load(out / "exported" / "switchable.safetensors")
    assert runtime.names == ("c8-d1111", "c8-d2121")
    full = exported.load(out / "exported" / "c8-d2121")
    weights = [tensor for name, tensor in runtime._tensors.items() if name.startswith("weights/")]
    assert sum(tensor.numel() for tensor in weights) == parameter_count(full), "only the weights of these networks"


def test_switchable_refuses_networks_that_do_not_nest(out, capsys):
    assert run(out, "--dn", "c16-d1111", "--dn", "c8-d2121", "--switchable") == WRONG_INPUT
    assert "does not nest" in capsys.readouterr().err
    assert not (out / "exported").exists()


@torch.no_grad()
def test_onnx_equals_mobilenet():
    """Squeeze-and-excite, hard-swish and depthwise convolutions; biases that are not 0."""
    made = family("mobilenet_v3_large", ["w0.35", "w0.50"])
    model = build("mobilenet_v3_large", made.full, "small")
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
    images = torch.randn(5, 3, 32, 32)
    post_statistics(model, made, [images])
    network = slim(model, "w0.35")
    converted = onnx_file.convert(network, 32)
    assert onnx_file.verify(onnx_file.Session(converted, 1), network, images) < 1e-4
    assert 0.95 < len(converted) / (4 * parameter_count(network)) < 1.1


@pytest.fixture(scope="module")
def converted():
    network = slim(build("resnet", family("resnet", ["c8-d1111"]).full, "small"), None)
    return network, onnx_file.convert(network, 12)


@pytest.mark.parametrize("value", [1.001, torch.nan])
@torch.no_grad()
def test_verify_detects_changed_weights(converted, value):
    network, model = converted
    session, images = onnx_file.Session(model), torch.randn(3, 3, 12, 12)
    assert onnx_file.verify(session, network, images) < 1e-5
    weight = network.layer4[0].bn2.weight
    before = weight.clone()
    weight.mul_(value)
    with pytest.raises(RuntimeError, match="differ from PyTorch's"):
        onnx_file.verify(session, network, images)
    weight.copy_(before)


def test_check_size_detects_missing_and_duplicate_weights(converted):
    network, content = converted
    model = onnx.load_from_string(content)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    whole = largest.raw_data
    for raw in (b"", whole + whole):  # as if stored in another file, or twice
        largest.raw_data = raw
        with pytest.raises(RuntimeError, match="bytes of weights"):
            onnx_file._check_size(network, model, len(model.SerializeToString()))
    largest.raw_data, model.doc_string = whole, "x" * 100_000
    with pytest.raises(RuntimeError, match="bytes of ONNX"):
        onnx_file._check_size(network, model, len(model.SerializeToString()))


def test_onnx_that_fails_verification_is_not_written(out, monkeypatch, capsys):
    monkeypatch.setattr(onnx_file, "TOLERANCE", -1.0)
    assert run(out, "--dn", "c8-d1111", "--onnx") == FAILED
    assert "differ from PyTorch's" in capsys.readouterr().err
    assert not list(out.glob("exported/**/*.onnx")) and not list(out.glob("exported/**/.*"))


def test_export_without_onnx_removes_an_earlier_onnx_file(deployed, out):
    shutil.copytree(deployed / "exported" / "c8-d1111", out / "exported" / "c8-d1111")
    assert run(out, "--dn", "c8-d1111") == DONE
    folder = out / "exported" / "c8-d1111"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "onnx" not in manifest and set(manifest["latency"]["of"]) == {"torch"}


def test_missing_package_error_names_the_install_command(out, monkeypatch, capsys):
    find = onnx_file.importlib.util.find_spec
    monkeypatch.setattr(
        onnx_file.importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else find(name, *a)
    )
    assert run(out, "--onnx") == WRONG_INPUT
    assert "ONNX needs onnxruntime, not installed here: pip install 'dspnet-fast[onnx]'" in capsys.readouterr().err
    assert not (out / "exported").exists()
    with pytest.raises(InputError, match="onnxruntime"):
        onnx_file.Session(b"")


@pytest.mark.parametrize("option", ["--threads", "--batch-size"])
def test_zero_threads_or_images_are_refused(out, capsys, option):
    assert run(out, option, 0) == WRONG_INPUT
    assert "must be at least 1" in capsys.readouterr().err
