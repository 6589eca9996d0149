"""CUDA graphs: captured steps equal launched ones bit by bit, capturing keeps the state, steps never synchronise."""

from dataclasses import replace

import pytest
import torch

from train.pretraining import cuda_graphs
from train.pretraining.cuda_graphs import StepGraphs
from train.pretraining.trainer import Trainer

STEPS = 6
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def batches(config, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    shape = (2 * config.batch_size, 3, config.image_size, config.image_size)
    return [torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device) for _ in range(STEPS)]


def make(config, device="cpu"):
    return Trainer(config, STEPS, torch.device(device))


def run_and_return(functions):
    """Replacement of capturing: runs every function twice and returns it."""
    for function in functions:
        function()
        function()
    return functions


def state(trainer):
    return {
        **trainer.model.state_dict(),
        **{f"momentum {name}": m for name, m in trainer.flat_buffers.momentum().items()},
    }


@pytest.mark.parametrize("options", [{}, {"momentum_bn": "off"}, {"precision": "bf16"}], ids=str)
def test_captured_steps_equal_launched_steps(small, options):
    config = small(**options)
    plain, captured = make(config), make(config)
    captured.accumulate = cuda_graphs.captured(captured.model, captured.flat_buffers, captured._alpha, run_and_return)
    for batch in batches(config):
        torch.testing.assert_close(captured.train_step(batch), plain.train_step(batch), rtol=0, atol=0)
    torch.testing.assert_close(state(captured), state(plain), rtol=0, atol=0)


def graphs(trainer, batch):
    return StepGraphs(trainer.model, trainer.flat_buffers, batch, trainer._alpha, run_and_return)


def test_capturing_restores_the_state(small):
    config = small()
    trainer = make(config)
    trainer.train_step(batches(config)[0])
    before = {name: value.clone() for name, value in state(trainer).items()}
    graphs(trainer, batches(config)[1])
    torch.testing.assert_close(state(trainer), before, rtol=0, atol=0)
    assert not trainer.flat_buffers.grads.count_nonzero()


def test_losses_keep_their_values_after_the_next_step(small):
    config = small()
    trainer = make(config)
    first, second = batches(config)[:2]
    step = graphs(trainer, first)
    losses = step.accumulate(first, list(trainer.model.family))
    kept = {name: loss.clone() for name, loss in losses.items()}
    step.accumulate(second, list(trainer.model.family))
    assert losses == kept


def test_batch_of_another_shape_is_refused(small):
    config = small()
    trainer = make(config)
    batch = batches(config)[0]
    with pytest.raises(RuntimeError, match="captured for batches"):
        graphs(trainer, batch).accumulate(batch[2:], [trainer.model.family.full])


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("network", [{}, {"network": "mobilenet_v3_large", "dns": "w0.25,w0.50"}], ids=str)
def test_graph_replays_equal_launches_on_gpu(small, policy, network, precision):
    policy("any")
    config = small(precision=precision, **network)
    eager, graphed = make(replace(config, no_cuda_graphs=True), "cuda"), make(config, "cuda")
    for batch in batches(config, "cuda"):
        torch.testing.assert_close(graphed.train_step(batch), eager.train_step(batch), rtol=0, atol=0)
    torch.testing.assert_close(state(graphed), state(eager), rtol=0, atol=0)


@needs_gpu
@pytest.mark.parametrize("no_cuda_graphs", [False, True])
def test_step_never_synchronises_the_gpu(small, policy, no_cuda_graphs):
    policy("any")
    config = small(no_cuda_graphs=no_cuda_graphs)
    trainer = make(config, "cuda")
    everything = batches(config, "cuda")
    trainer.train_step(everything[0])  # compiles and captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in everything[1:]:
            trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
