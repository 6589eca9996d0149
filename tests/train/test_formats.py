"""Device formats: fp16 and int8 ONNX, OpenVINO and ExecuTorch, verified, measured and described in the manifest."""

import copy
import importlib.util
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import pytest
import torch

from dspnet_fast import device_formats, exported
from dspnet_fast.errors import InputError
from dspnet_fast.models import build, family
from dspnet_fast.slim import slim
from train import export as export_command
from train.data.datasets import open_images
from train.evaluation.pretrained import PretrainedFamily
from train.export import ExportOptions, export

LIBRARIES = device_formats.LIBRARIES
FORMATS = ["onnx-fp16", "onnx-int8", *filter(importlib.util.find_spec, LIBRARIES)]
DN = "c16-d2121"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def deployed(finished, tmp_path_factory):
    out = shutil.copytree(finished, tmp_path_factory.mktemp("formats") / "run")
    export(out, [DN], ExportOptions(formats=",".join(FORMATS), threads=1))
    return out / "exported" / DN


@pytest.fixture(scope="module")
def pixels(finished, images):
    trained = PretrainedFamily(finished, torch.device("cpu"))
    return torch.cat(list(trained.batches(open_images(str(images), "test"), "test", 0)))[:10].contiguous()


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("name", "tolerance"), [("onnx-fp16", 0.01), ("onnx-int8", 0.2), ("openvino", 1e-4), ("executorch", 1e-4)]
)
@torch.no_grad()
def test_files_compute_the_features_of_the_network(deployed, pixels, name, tolerance):
    if name not in FORMATS:
        pytest.skip(f"{LIBRARIES[name]} is not installed")
    expected = exported.load(deployed)(pixels)
    if name == "openvino":
        import openvino

        compiled = openvino.Core().compile_model(deployed / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        features = torch.from_numpy(compiled(pixels.numpy())[0])
    elif name == "executorch":
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(deployed / "model.pte")
        method = program.load_method("forward")
        features = torch.cat([method.execute([image])[0] for image in pixels.split(1)])
    else:
        session = onnxruntime.InferenceSession(deployed / device_formats.FILES[name][0])
        features = torch.from_numpy(session.run(None, {"images": pixels.numpy()})[0])
    assert (features - expected).norm() <= tolerance * expected.norm()
    entry = manifest(deployed)["formats"][name]
    assert entry["cosine"] >= device_formats.SMALLEST_COSINE[name] and entry["verified_on"] == 8
    assert entry["bytes"] == sum((deployed / file).stat().st_size for file in entry["files"])
    assert 0 <= entry["accuracy"] <= 1 and 0 <= entry["accuracy_fp32"] <= 1
    assert manifest(deployed)["latency"]["of"][name]["median_ms"] > 0


def test_smaller_types_make_smaller_files(deployed):
    formats, weights = manifest(deployed)["formats"], (deployed / "model.safetensors").stat().st_size
    assert formats["onnx-fp16"]["bytes"] < 0.6 * weights
    assert formats["onnx-int8"]["bytes"] < 0.4 * weights and formats["onnx-int8"]["calibrated_on"] == 80


def test_command_writes_a_table_of_networks_and_formats(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("exported"))
    with pytest.raises(SystemExit) as end:
        export_command.main([str(out), "--dn=c8-d1111", f"--dn={DN}", "--formats=onnx-fp16", "--threads=1"])
    assert end.value.code == 0
    title, _, heading, _, *rows = (out / "exported" / "formats.md").read_text().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:2] for row in cells] == [
        *(["c8-d1111", "PyTorch"], ["", "ONNX, fp32"], ["", "onnx-fp16"]),
        *([DN, "PyTorch"], ["", "ONNX, fp32"], ["", "onnx-fp16"]),
    ]
    entry, times = (manifest(out / "exported" / DN)[key] for key in ("formats", "latency"))
    entry = entry["onnx-fp16"]
    assert cells[-1][2:] == [
        f"{entry['bytes'] / 1e6:.2f}",
        f"{times['of']['onnx-fp16']['median_ms']:.2f}",
        f"{entry['largest_difference']:.2g}",
        f"{entry['cosine']:.5f}",
        f"{entry['accuracy']:.1%}",
    ]
    assert cells[3][6] == f"{entry['accuracy_fp32']:.1%}" and "Accuracy: of 40 test images." in title
    assert heading.startswith("| network | format | MB | ms |") and "onnx-fp16" in capsys.readouterr().out


def test_format_with_other_outputs_is_not_kept(finished, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setitem(device_formats.SMALLEST_COSINE, "onnx-int8", 2.0)
    (folder,) = export(out, [DN], ExportOptions(formats="onnx-int8", threads=1))
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "manifest.json"}
    assert "below 2.0" in manifest(folder)["formats"]["onnx-int8"]["refused"]
    assert f"{DN} onnx-int8 is not kept: " in capsys.readouterr().out


def test_export_without_formats_deletes_files_of_other_weights(deployed, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(deployed, out / "exported" / DN, dirs_exist_ok=True)
    (folder,) = export(out, [DN], ExportOptions(threads=1))
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "manifest.json"}


@pytest.mark.parametrize("package", LIBRARIES)
def test_missing_package_is_named(package, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    reason = f"the format {package} needs {LIBRARIES[package]}, not installed here: "
    with pytest.raises(InputError, match=f"{reason}pip install 'dspnet-fast\\[{package}\\]'"):
        ExportOptions(formats=package)


def test_unknown_format_is_named():
    with pytest.raises(InputError, match="--formats tflite: give some of onnx-fp16, onnx-int8, openvino, executorch"):
        ExportOptions(formats="tflite")


@pytest.mark.skipif("executorch" not in FORMATS, reason="ExecuTorch is not installed")
def test_executorch_program_is_reproducible_and_holds_no_paths():
    network = slim(build("resnet", family("resnet", ["c8-d1111"]).full, "small"), None)
    network.to(memory_format=torch.channels_last)  # as in an export
    images = torch.randn(3, 3, 12, 12)
    first, second = (device_formats.convert("executorch", network, b"", images, threads=1) for _ in range(2))
    assert first.files == second.files and first.runtime == f"executorch {version('executorch')}"
    assert b"site-packages" not in first.files["model.pte"] and str(ROOT).encode() not in first.files["model.pte"]
    assert device_formats.compare("executorch", first, network, images)["largest_difference"] < 1e-4
    with pytest.raises(RuntimeError, match="cosine similarity"):
        device_formats.compare("executorch", second, with_other_weights(network), images)


def with_other_weights(network):
    """A network with other weights."""
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    return other


@pytest.mark.skipif("executorch" not in FORMATS, reason="ExecuTorch is not installed")
def test_network_that_executorch_does_not_support_is_refused():
    class Branching(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    with pytest.raises(RuntimeError, match=r"torch.export does not support the network: "):
        device_formats.convert("executorch", Branching(), b"", torch.zeros(2, 3, 8, 8))
