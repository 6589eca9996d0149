"""Synchronised batch normalisation: two ranks with half of the batch each equal one rank with the whole batch."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dspnet_fast.nn import MomentumBatchNorm2d, SlimBatchNorm2d, SlimConv2d, configure_batch_norm
from dspnet_fast.nn.functional import conv_norm_act, materialize

RANKS, VIEWS = 2, 2


class Layers(torch.nn.Module):
    """A deferred normalisation, an immediate one, and one with momentum statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = SlimConv2d(3, 5, 3, padding=1, bias=False)
        self.norms = torch.nn.ModuleList([SlimBatchNorm2d(5), SlimBatchNorm2d(5), MomentumBatchNorm2d(5)])
        self.norms[2].alpha = 0.7

    def forward(self, x):
        y = materialize(conv_norm_act(x, self.conv, self.norms[0]))
        return self.norms[2](self.norms[1](y * y))


def make() -> tuple[Layers, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layers = Layers().double()
    for norm in layers.norms:
        norm.views = VIEWS
    images = torch.randn(VIEWS, 4, 3, 6, 5).double() * torch.tensor([1.0, 4.0]).view(VIEWS, 1, 1, 1, 1) + 2
    return layers, images, torch.randn(VIEWS, 4, 5, 6, 5).double()


def run(layers: Layers, images: torch.Tensor, cotangent: torch.Tensor) -> dict[str, torch.Tensor]:
    leaf = images.flatten(0, 1).requires_grad_()
    y = layers(leaf)
    y.backward(cotangent.flatten(0, 1))
    gradients = {name: parameter.grad for name, parameter in layers.named_parameters() if parameter.grad is not None}
    return {"y": y.detach(), "x.grad": leaf.grad, **gradients, **dict(layers.named_buffers())}


def one_rank(rank: int, file: str, results: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    layers, images, cotangent = make()
    configure_batch_norm(layers, process_group=dist.group.WORLD)
    part = slice(2 * rank, 2 * rank + 2)
    got = run(layers, images[:, part], cotangent[:, part])
    results[rank] = {name: value.numpy() for name, value in got.items()}
    dist.destroy_process_group()


def test_two_ranks_equal_one_rank_with_the_whole_batch(tmp_path):
    layers, images, cotangent = make()
    want = run(layers, images, cotangent)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(one_rank, (str(tmp_path / "rendezvous"), results), nprocs=RANKS)
        ranks = [{name: torch.from_numpy(value) for name, value in results[rank].items()} for rank in range(RANKS)]
    for name, value in want.items():
        got = [rank[name] for rank in ranks]
        if name in ("y", "x.grad"):
            parts = [part.unflatten(0, (VIEWS, -1)) for part in got]
            torch.testing.assert_close(torch.cat(parts, 1).flatten(0, 1), value)
        elif name in dict(layers.named_buffers()):
            for part in got:
                torch.testing.assert_close(part, value)
        else:
            torch.testing.assert_close(sum(got), value)
