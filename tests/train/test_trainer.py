"""The trainer's lifetime; its steps are tested with the algorithm, ranks, graphs and resuming."""

import gc
import weakref

import pytest
import torch

from train.pretraining.trainer import Trainer


@pytest.mark.parametrize("options", [{}, {"grad_accum_steps": 2}], ids=str)
def test_memory_of_a_trainer_is_freed_without_the_garbage_collector(small, options):
    """A reference cycle would keep the weights of a finished run in memory while the next one trains."""
    config = small(**options)
    trainer = Trainer(config, 2, torch.device("cpu"))
    trainer.train_step(torch.randint(256, (2 * config.batch_size, 3, 12, 12), dtype=torch.uint8))
    model, weights = weakref.ref(trainer.model), weakref.ref(trainer.flat_buffers.params)
    gc.collect()
    gc.disable()
    try:
        del trainer
        assert model() is None and weights() is None
    finally:
        gc.enable()
