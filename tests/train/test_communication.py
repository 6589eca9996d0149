"""Bytes that a step sends, counted from the networks; tests/faults/test_two_hosts.py measures them."""

from dataclasses import replace

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dspnet_fast.errors import InputError
from train.costs.communication import VECTORS, ring, traffic
from train.pretraining.dspnet import VIEWS, build_model
from train.pretraining.trainer import Trainer


def test_ring_sends_nearly_twice_the_buffer():
    assert ring(1000, 1) == 0 and ring(1000, 2) == 4000 and ring(1000, 4) == 6000
    assert ring(1000, 1000) == pytest.approx(8000, rel=2e-3)


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradient_and_statistics_equal_the_trainers_buffers(small, ranks):
    trainer = Trainer(small(), 10, torch.device("cpu"))
    counted = traffic(small(), ranks)
    assert counted.gradient == ring(trainer.flat_buffers.grads.numel(), ranks)
    assert counted.statistics == ring(trainer.flat_buffers.statistics.numel(), ranks)
    assert (counted.normalisation, counted.collectives) == (0, 2)
    assert counted.sent == counted.gradient + counted.statistics


def test_one_rank_sends_nothing(small):
    assert traffic(small(), 1).sent == 0 and traffic(small(bn_groups=4), 1).collectives == 0


def test_synchronised_batch_norm_is_counted_by_layer(small):
    """With a family of one network, every batch norm layer of its modules runs in every step."""
    config = small(dns="c8-d1121", bn_groups=2)
    model = build_model(small(dns="c8-d1121"))
    online, target = (
        [module.num_features for module in branch.modules() if isinstance(module, _BatchNorm)]
        for branch in (model.online, model.target)
    )
    counted = traffic(config, 4)
    assert counted.collectives == 2 + 2 * (2 * len(online) + len(target))
    assert counted.normalisation == ring(
        2 * 2 * (2 * sum(online) + sum(target)), 2
    )  # two ranks share a batch norm group
    assert traffic(config, 2).normalisation == 0
    assert counted.gradient == traffic(small(dns="c8-d1121"), 4).gradient


def test_randomly_drawn_subnets_count_by_their_probability(small):
    """Two subnets per step are the smallest and the full one; a third is the middle one."""
    two, three = (traffic(small(bn_groups=1, subnets_per_step=count), 2) for count in (2, 3))
    middle = traffic(small(dns="c8-d1121", bn_groups=1), 2)
    target = [m.num_features for m in build_model(small(dns="c8-d1121")).target.modules() if isinstance(m, _BatchNorm)]
    assert three.collectives - two.collectives == middle.collectives - 2 - 2 * len(target)
    drawn = traffic(small(dns="c8-d1111,c8-d1121,c8-d2121,c16-d2121", bn_groups=1), 2)
    assert drawn.collectives == three.collectives + 2 * 2 * 2 / 2  # one more block of two layers in half of the steps


def test_bn_groups_that_do_not_fit_the_ranks_are_refused(small):
    with pytest.raises(InputError, match="does not fit 6 ranks"):
        traffic(small(bn_groups=4, batch_size=24), 6)
    assert traffic(small(bn_groups=4), 2).collectives == 2


def test_batch_norm_traffic_counts_the_heads_of_a_run_with_a_teacher(small):
    plain = small(dns="c8-d1121")
    alone, beside = (
        replace(plain, teacher="x", teacher_features=5, self_weight=weight, bn_groups=1) for weight in (0.0, 0.5)
    )
    encoder = [m.num_features for m in build_model(plain).online.encoder.modules() if isinstance(m, _BatchNorm)]
    heads = 2 * plain.hidden_features
    per_channel = VECTORS * ring(VIEWS, 2)
    assert traffic(alone, 2).normalisation == per_channel * 2 * (sum(encoder) + 5)
    target = sum(encoder) + plain.hidden_features
    assert traffic(beside, 2).normalisation == per_channel * (target + 2 * (sum(encoder) + heads + 5))
