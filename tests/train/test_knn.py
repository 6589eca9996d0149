"""kNN against scikit-learn; feature std and effective rank of features with known values."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from dspnet_fast.errors import InputError
from train.evaluation.accuracy import interval95
from train.evaluation.collapse import effective_rank, feature_std
from train.evaluation.knn import TEMPERATURE, knn


def blobs(n: int, m: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    """Features around one centre per class, near enough that neighbours disagree."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 8, generator=generator, dtype=dtype)
    labels = torch.randint(0, classes, (n + m,), generator=generator)
    features = centres[labels] + 1.2 * torch.randn(n + m, 8, generator=generator, dtype=dtype)
    return features[:n], labels[:n], features[n:], labels[n:]


def sklearn_accuracy(data, k: int, weights) -> float:
    train, train_labels, test, test_labels = (tensor.numpy() for tensor in data)
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights).fit(train, train_labels)
    return (model.predict(test) == test_labels).mean()


@pytest.mark.parametrize("k", [1, 2, 5, 20, 300])
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_scikit_learn(k, classes, seed):
    """Few neighbours among many classes tie often, above all at k = 2."""
    data = blobs(300, 200, classes, seed)
    found = knn(*data, num_classes=classes, k=k)
    assert found.majority == sklearn_accuracy(data, k, "uniform")
    assert found.weighted == sklearn_accuracy(data, k, lambda distances: np.exp((1 - distances) / TEMPERATURE))


@pytest.mark.parametrize("network", ["c8-d1111", "c16-d1111"])
def test_equals_scikit_learn_on_real_features(real_features, network):
    (train, train_labels), (test, test_labels) = real_features
    data = train[network].double(), train_labels, test[network].double(), test_labels
    found = knn(*data, num_classes=10)
    assert found.majority == sklearn_accuracy(data, 20, "uniform")
    assert found.weighted == sklearn_accuracy(data, 20, lambda distances: np.exp((1 - distances) / TEMPERATURE))


def test_weighted_vote_prefers_near_neighbours():
    """Two far neighbours of class 1 win the majority vote, one near neighbour of class 0 the weighted vote."""
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    data = (train, torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    found = knn(*data, num_classes=2, k=3)
    assert (found.majority, found.weighted) == (0.0, 1.0)


@pytest.mark.parametrize("labels", [[2, 1], [1, 2]])
def test_ties_go_to_the_smallest_label(labels):
    data = (torch.eye(2), torch.tensor(labels), torch.tensor([[1.0, 0.9]]), torch.tensor([1]))
    assert knn(*data, num_classes=4, k=2).majority == 1.0


@pytest.mark.parametrize("chunk", [1, 7 * 300, 10**9])
def test_chunk_size_does_not_change_the_result(chunk):
    data = blobs(300, 50, 10)
    assert knn(*data, num_classes=10, chunk=chunk) == knn(*data, num_classes=10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_features_are_compared_in_float32(dtype):
    data = blobs(300, 100, 10, dtype=torch.float32)
    rounded = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in data]
    upcast = [tensor.float() if tensor.is_floating_point() else tensor for tensor in rounded]
    assert knn(*rounded, num_classes=10) == knn(*upcast, num_classes=10)


def test_length_of_features_does_not_change_the_result():
    train, train_labels, test, test_labels = blobs(300, 100, 10)
    lengths = torch.rand(300, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    found = knn(train * lengths, train_labels, test * 9, test_labels, num_classes=10)
    assert found == knn(train, train_labels, test, test_labels, num_classes=10)


@pytest.mark.parametrize("k", [0, 11])
def test_invalid_k_is_refused(k):
    with pytest.raises(InputError, match="from 1 to 10"):
        knn(*blobs(10, 5, 2), num_classes=2, k=k)


def test_empty_test_set_is_refused():
    with pytest.raises(InputError, match="no test images"):
        knn(*blobs(10, 0, 2), num_classes=2, k=3)


def test_interval_is_wilsons():
    assert knn(*blobs(300, 200, 2), num_classes=2).interval > 0
    assert interval95(0.5, 10000) == pytest.approx(1.96 * 0.5 / 100, rel=1e-3)  # equals the normal approximation
    # Wilson's interval for 8 of 10: 0.4902 to 0.9433
    assert interval95(0.8, 10) == pytest.approx((0.9433 - 0.4902) / 2, abs=1e-4)
    assert interval95(1.0, 100) == pytest.approx(interval95(0.0, 100))
    assert 0.01 < interval95(1.0, 100) < 0.03


@pytest.mark.parametrize("length", [1.0, 50.0])
def test_feature_std_of_isotropic_constant_and_partial_features(length):
    generator = torch.Generator().manual_seed(0)
    isotropic = length * torch.randn(4000, 64, generator=generator)
    assert feature_std(isotropic) == pytest.approx(1, abs=0.02)
    assert feature_std(isotropic[:1].expand(100, 64)) == pytest.approx(0, abs=1e-5)
    half = isotropic * (torch.arange(64) < 32)  # half of the dimensions, each with sqrt(2) times the std
    assert feature_std(half) == pytest.approx(math.sqrt(0.5), abs=0.02)


@pytest.mark.parametrize("rank", [1, 5, 20])
@pytest.mark.parametrize("shape", [(200, 20), (20, 200)])
def test_effective_rank_of_equal_singular_values(rank, shape):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 20, generator=generator, dtype=torch.float64))[0] for n in shape)
    features = 3 * left[:, :rank] @ right[:, :rank].T
    assert effective_rank(features) == pytest.approx(rank, rel=1e-4)


def test_effective_rank_equals_its_definition():
    features = torch.randn(60, 30, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 30)
    shares = torch.linalg.svdvals(features.double())
    shares = shares / shares.sum()
    assert effective_rank(features) == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_effective_rank_of_zero_or_non_finite_features_is_nan(value):
    assert math.isnan(effective_rank(torch.full((5, 4), value)))
