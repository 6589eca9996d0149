"""Switchable: all networks of a family from one file equal those of slim(); choice by latency; damaged files."""

import json
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspnet_fast import exported, latency, switchable
from dspnet_fast.cost import parameter_count
from dspnet_fast.errors import InputError
from dspnet_fast.latency import Latency
from dspnet_fast.models import build, family
from dspnet_fast.slim import slim
from dspnet_fast.statistics import post_statistics
from dspnet_fast.switchable import Switchable

NORMALIZATION = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
FAMILIES = {
    "mobilenet_v3_large": ["w0.60", "w0.66"],  # equal channel counts in some layers
    "resnet": ["c8-d1111", "c8-d2121", "c16-d1112", "c16-d2222"],  # with fewer blocks
}


def measured(network, stem="small"):
    """A family with measured statistics and random affine parameters, and images."""
    torch.manual_seed(0)
    made = family(network, FAMILIES[network])
    model = build(network, made.full, stem)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
    images = torch.randn(6, 3, 24, 24)
    post_statistics(model, made, images.split(3))
    return made, model, images


def parts(path):
    """Tensors and metadata of a safetensors file."""
    with switchable.safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    made, model, images = measured("resnet")
    path = tmp_path_factory.mktemp("switchable") / "family.safetensors"
    Switchable.of(model, made, 24, NORMALIZATION).save(path)
    return path, made, model, images


@pytest.mark.parametrize(
    ("network", "stem"), [("mobilenet_v3_large", "standard"), ("resnet", "standard"), ("resnet", "small")]
)
@torch.no_grad()
def test_every_network_equals_the_one_cut_out_by_slim(network, stem, tmp_path):
    made, model, images = measured(network, stem)
    runtime = Switchable.of(model, made, 24, NORMALIZATION)
    runtime.save(tmp_path / "new" / "family.safetensors")
    loaded = Switchable.load(tmp_path / "new" / "family.safetensors")
    assert loaded.names == made.names and loaded.active == made.full.name
    assert (loaded.image_size, loaded.normalization) == (24, NORMALIZATION)
    plain = {dn.name: slim(model, dn) for dn in made}
    for name in (*made.names, *reversed(made.names)):  # in both directions: a switch must leave no state
        expected = plain[name](images)
        for one in (runtime, loaded):
            torch.testing.assert_close(one.use(name)(images), expected, rtol=0, atol=1e-6)
            assert one.active == name
    assert len({tuple(features.flatten().tolist()) for features in (plain[n](images)[:, :8] for n in made.names)}) > 1


@torch.no_grad()
def test_file_and_runtime_hold_the_weights_once(resnet):
    path, made, model, images = resnet
    full = slim(model, made.full)
    tensors, _ = parts(path)
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("weights/")}
    assert sum(tensor.numel() for tensor in weights.values()) == parameter_count(full)
    statistics = sum(sum(b.numel() for name, b in slim(model, dn).named_buffers() if "running" in name) for dn in made)
    assert sum(tensor.numel() for tensor in tensors.values()) == parameter_count(full) + statistics
    assert path.stat().st_size < 4 * (parameter_count(full) + statistics) + 100_000

    runtime = Switchable.load(path)
    before = runtime.use("c8-d1111")(images)
    runtime._tensors["weights/conv1.weight"].mul_(2)  # shared by all networks
    assert not torch.equal(runtime(images), before)


@torch.no_grad()
def test_moves_and_conversions_apply_to_all_networks(resnet):
    path, made, model, images = resnet
    runtime = Switchable.load(path).double()
    for dn in made:
        features = runtime.use(dn.name)(images.double())
        torch.testing.assert_close(features, slim(model, dn).double()(images.double()), rtol=0, atol=1e-12)
    runtime.float()
    assert torch.equal(runtime.use("c8-d2121")(images), slim(model, "c8-d2121")(images))
    assert runtime.to("meta").use("c8-d1111")(images.to("meta")).shape == (6, 64)


def test_training_and_unknown_networks_are_rejected(resnet):
    runtime = Switchable.load(resnet[0])
    assert not runtime.eval().training and not runtime(resnet[3]).requires_grad
    with pytest.raises(InputError, match="exported.load"):
        runtime.train()
    with pytest.raises(InputError, match="c8-d1111, c8-d2121"):
        runtime.use("w0.50")
    assert runtime.active == "c16-d2222"


@pytest.mark.parametrize(
    ("milliseconds", "budget", "chosen"),
    [
        ((1, 2, 3, 4), 3, "c16-d1112"),
        ((1, 2, 3, 4), 3.999, "c16-d1112"),
        ((1, 2, 3, 4), 100, "c16-d2222"),
        ((1, 2, 3, 4), 1, "c8-d1111"),
        ((2, 1, 5, 4), 4, "c16-d2222"),  # the larger network is faster
        ((2, 1, 5, 4), 1.5, "c8-d2121"),
    ],
)
def test_choose_returns_the_largest_network_within_the_budget(resnet, milliseconds, budget, chosen):
    runtime = Switchable.load(resnet[0])
    runtime.latency = {name: Latency(ms, 10 * ms, 30) for name, ms in zip(runtime.names, milliseconds)}
    runtime.conditions = {"batch_size": 4}
    assert runtime.choose(budget) == chosen
    assert runtime.active == "c16-d2222", "choose must not switch"
    with pytest.raises(InputError, match=r"the fastest, c8-d\d\d\d1, takes 1 ms for a batch of 4"):
        runtime.choose(0.99)


def test_measured_latencies_are_saved_in_the_file(resnet, tmp_path):
    runtime = Switchable.load(resnet[0])
    with pytest.raises(InputError, match=r"call measure\(\) first"):
        runtime.choose(1000)
    runtime.measure(batch_size=2, image_size=16, threads=1)
    assert list(runtime.latency) == list(runtime.names)
    for taken in runtime.latency.values():
        assert 0 < taken.median_ms <= taken.p90_ms and taken.calls == latency.ROUNDS * latency.CALLS
    assert {"threads": 1, "batch_size": 2, "image_size": 16}.items() <= runtime.conditions.items()
    runtime.save(tmp_path / "measured.safetensors")
    again = Switchable.load(tmp_path / "measured.safetensors")
    assert (again.latency, again.conditions) == (runtime.latency, runtime.conditions)
    slowest = max(taken.median_ms for taken in again.latency.values())
    assert again.choose(slowest) == again.family.full.name


def test_latency_excludes_warm_up_calls_and_restores_threads(monkeypatch):
    clock, calls = [0.0], []

    def call(name, durations):
        def run():
            calls.append((name, torch.get_num_threads()))
            clock[0] += next(durations)

        return run

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    before = torch.get_num_threads()
    slow, fast = iter([9, 1, 2, 9, 3, 4]), iter([9, 0.5, 0.5, 9, 0.5, 0.5])
    taken = latency.measure({"a": call("a", slow), "b": call("b", fast)}, threads=3, rounds=2, calls=2)
    assert taken == {"a": Latency(2500, 4000, 4), "b": Latency(500, 500, 4)}
    assert calls == [("a", 3)] * 3 + [("b", 3)] * 3 + [("a", 3)] * 3 + [("b", 3)] * 3
    assert torch.get_num_threads() == before


def test_import_needs_neither_train_nor_onnx(run_python):
    code = (
        "import sys; sys.modules.update(onnx=None, onnxruntime=None, onnxscript=None); "
        "import dspnet_fast.switchable, dspnet_fast.onnx_file; "
        "print(sorted(n for n in sys.modules if 'train' in n.split('.')))"
    )
    assert run_python("-c", code).strip() == "[]"


class Bomb:
    """Exits the process if it is unpickled."""

    def __reduce__(self):
        return sys.exit, ("unpickled",)


def write_pickle(path):
    path.write_bytes(pickle.dumps(Bomb()))


def write_checkpoint(path):
    torch.save({"weights": Bomb()}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "cannot be read|damaged"),
        (lambda path: path.write_bytes(b""), "damaged or not a safetensors file"),
        (lambda path: path.write_text("weights" * 100), "damaged or not a safetensors file"),
        (write_pickle, "damaged or not a safetensors file"),
        (write_checkpoint, "damaged or not a safetensors file"),
    ],
)
def test_other_files_are_rejected(tmp_path, write, message):
    path = tmp_path / "family.safetensors"
    write(path)
    with pytest.raises(InputError, match=message) as raised:
        Switchable.load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_truncated_file_is_rejected(resnet, tmp_path):
    whole = resnet[0].read_bytes()
    for length in (4, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(InputError, match="damaged or not a safetensors file"):
            Switchable.load(tmp_path / "cut")


def test_single_network_is_rejected_with_a_hint(resnet, tmp_path):
    _, made, model, _ = resnet
    exported.save(tmp_path, slim(model, made[0]), made[0], {})
    with pytest.raises(InputError, match="single network is read by dspnet_fast.exported.load"):
        Switchable.load(tmp_path / exported.WEIGHTS)


CONV, NORM = "weights/layer1.0.conv1.weight", "c8-d1111/layer1.0.bn1.running_mean"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(CONV), r"has no layer1\.0\.conv1\.weight"),
        (lambda tensors: tensors.pop(NORM), r"c8-d1111 has no layer1\.0\.bn1\.running_mean"),
        (lambda tensors: tensors.update({CONV: tensors[CONV][:4]}), r"layer1\.0\.conv1\.weight of c8-d1111 is \[4, "),
        (lambda tensors: tensors.update({CONV: torch.zeros(4)}), r"is \[4\]"),
        (lambda tensors: tensors.update({CONV: tensors[CONV].repeat(2, 1, 1, 1)}), "larger than the full network's"),
        (lambda tensors: tensors.update({NORM: torch.zeros(9)}), r"c8-d1111 is \[9\]"),
        (lambda tensors: tensors.update({NORM: torch.zeros(8, dtype=torch.int32)}), "torch.int32"),
        (lambda tensors: tensors.update({"weights/fc.weight": torch.zeros(2)}), "to no network: weights/fc.weight"),
        (lambda tensors: tensors.update({"w0.50/bn1.running_mean": torch.zeros(2)}), "to no network: w0.50/bn1"),
    ],
)
def test_unfit_tensors_are_rejected(resnet, tmp_path, change, message):
    tensors, metadata = parts(resnet[0])
    change(tensors)
    save_file(tensors, tmp_path / "changed", metadata)
    with pytest.raises(InputError, match=message) as raised:
        Switchable.load(tmp_path / "changed")
    assert "is damaged" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.pop("dns"), "it has no 'dns'"),
        (lambda manifest: manifest.pop("latency"), "it has no 'latency'"),
        (lambda manifest: manifest.update(network="vgg"), "unknown network 'vgg'"),
        (lambda manifest: manifest.update(stem="tiny"), "unknown stem 'tiny'"),
        (lambda manifest: manifest.update(dns="c8-d1111"), "damaged"),
        (lambda manifest: manifest["dns"][0].update(depths=[1, 1, 1]), "damaged"),
        (lambda manifest: manifest["dns"][0].update(depths=[1, 1, 1, 9]), "does not nest"),
        (lambda manifest: manifest["dns"][0].pop("channels"), "it has no 'channels'"),
        (lambda manifest: manifest.update(dns=manifest["dns"][:2]), "larger than the full network's"),
        (lambda manifest: manifest["dns"].pop(0), "to no network: c8-d1111/"),
        (lambda manifest: manifest.update(latency={"w0.50": {"median_ms": 1, "p90_ms": 1, "calls": 1}}), "latencies"),
        (lambda manifest: manifest.update(latency={"c8-d1111": {"ms": 1}}), "damaged"),
    ],
)
def test_unfit_manifests_are_rejected(resnet, tmp_path, change, message):
    tensors, metadata = parts(resnet[0])
    manifest = json.loads(metadata["manifest"])
    change(manifest)
    save_file(tensors, tmp_path / "changed", {**metadata, "manifest": json.dumps(manifest)})
    with pytest.raises(InputError, match=message) as raised:
        Switchable.load(tmp_path / "changed")
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"version": "2"}, "has format 2, but this version of dspnet-fast reads 1"),
        ({"manifest": "{"}, "damaged"),
        ({"manifest": "[]"}, "its manifest is not a JSON object"),
        ({"kind": "other"}, "contains no switchable family"),
    ],
)
def test_unfit_metadata_are_rejected(resnet, tmp_path, entry, message):
    tensors, metadata = parts(resnet[0])
    save_file(tensors, tmp_path / "changed", {**metadata, **entry})
    with pytest.raises(InputError, match=message):
        Switchable.load(tmp_path / "changed")
