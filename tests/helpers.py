"""Tiny networks, the objective of spec 5.2 written down a second time in plain torch, and workers of one student."""

import hashlib
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from cvdd_ray.core.workers import Workers
from cvdd_ray.data.imagesets import image_table, table_bytes
from cvdd_ray.data.labels import write_label_file
from cvdd_ray.stages.runtime import LocalRuntime


def tiny_net(seed=0, num_classes=4, width=4, norm=nn.BatchNorm2d, dropout=0.0):
    """An eval-mode classifier of images of any size with two normalisation layers, non-trivial statistics included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            norm(width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            norm(2 * width),
            nn.ReLU(inplace=True),  # the real networks change BatchNorm's output in place, too
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, num_classes),
        )
        randomise_statistics(net, seed)
        for layer in net:
            if isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.normal_(layer.weight, 1.0, 0.3)
                nn.init.normal_(layer.bias, 0.0, 0.3)
        nn.init.normal_(net[-1].weight, 0.0, 1.0)
    return net.eval()


class Listener(nn.Module):
    """A linear classifier of mean colours that shows every batch it is given, and itself, to `hear`."""

    def __init__(self, num_classes, hear):
        super().__init__()
        self.linear, self._hear = nn.Linear(3, num_classes), hear

    def forward(self, x):
        self._hear(x, self)
        return self.linear(x.mean((2, 3)))


def two_group_norm(channels):
    return nn.GroupNorm(2, channels)


def randomise_statistics(net, seed):
    """Give every BatchNorm2d other running statistics."""
    draw = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0.0, 0.5, generator=draw)
            layer.running_var.uniform_(0.5, 2.0, generator=draw)


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_objective(net, views_BCHW, labels_B, *, bn_weight, first_bn_multiplier):
    """(CE + bn_weight * R, CE, R) of one group for an eval-mode network, with hooks and elementary operations."""
    inputs = {}
    layers = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    hooks = [layer.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0]})) for layer in layers]
    cross_entropy = F.cross_entropy(net(views_BCHW), labels_B)
    for hook in hooks:
        hook.remove()
    bn_term = 0.0
    for position, layer in enumerate(layers):
        x = inputs[layer].transpose(0, 1).flatten(1)
        mean = x.sum(1) / x.shape[1]
        var = ((x - mean[:, None]) ** 2).sum(1) / x.shape[1]
        distance = ((layer.running_var - var) ** 2).sum().sqrt() + ((layer.running_mean - mean) ** 2).sum().sqrt()
        bn_term = bn_term + (first_bn_multiplier if position == 0 else 1.0) * distance
    return cross_entropy + bn_weight * bn_term, cross_entropy, bn_term


def state_hash(net):
    """sha256 of every parameter and buffer of a network."""
    hasher = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        hasher.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def in_processes(num_workers, folder, function, *args):
    """function(Workers(rank, W), *args) in W processes that torch.distributed joins over gloo, this one and others; the
    results by rank. The function must be importable: one of a test module's own."""
    given = (num_workers, str(folder), function, args)
    others = torch.multiprocessing.spawn(_another_process, given, nprocs=num_workers - 1, join=False)
    try:
        _join_and_run(0, *given)
        while not others.join():
            pass
    finally:
        for process in others.processes:
            process.kill()
    return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(num_workers)]


def _another_process(index, *given):
    torch.set_num_threads(1)
    _join_and_run(index + 1, *given)


def _join_and_run(rank, num_workers, folder, function, args):
    meeting, patience = f"file://{folder}/meeting", timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_workers, timeout=patience)
    try:
        Path(folder, f"result{rank}").write_bytes(pickle.dumps(function(Workers(rank, num_workers), *args)))
    finally:
        dist.destroy_process_group()


class Interrupted(LocalRuntime):
    """Stops a network in training when `share` of its epochs are done."""

    def __init__(self, share):
        super().__init__(1)
        self._share = share

    def map(self, function, items, shared=(), on_report=None):
        def report(said):
            if said["done"] >= self._share:
                raise KeyboardInterrupt

        yield from ((name, function(item, *shared, report=report)) for name, item in items.items())


class Threads:
    """W workers as threads of this process: `run(function)` gives function(workers) of each, sums are made in order of rank."""

    def __init__(self, num_workers):
        self.num_workers, self.messages = num_workers, 0
        self._barrier, self._parts = threading.Barrier(num_workers), [None] * num_workers

    def run(self, function):
        members = [_Member(rank, self.num_workers, self) for rank in range(self.num_workers)]
        with ThreadPoolExecutor(self.num_workers) as pool:
            calls = [pool.submit(self._call, function, member) for member in members]
        errors = [call.exception() for call in calls if call.exception()]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error  # the cause, and not what the others met because of it
        return [call.result() for call in calls]

    def _call(self, function, member):
        try:
            return function(member)
        except BaseException:
            self._barrier.abort()  # or the others would wait for this one
            raise

    def add_up(self, rank, tensors):
        self._parts[rank] = [tensor.detach().clone() for tensor in tensors]
        self._barrier.wait(60)
        for position, tensor in enumerate(tensors):
            tensor.copy_(sum(part[position] for part in self._parts))
        if self._barrier.wait(60) == 0:
            self.messages += 1


class _Member(Workers):
    def __init__(self, rank, world_size, threads):
        super().__init__(rank, world_size)
        object.__setattr__(self, "threads", threads)

    def all_reduce(self, tensors):
        with torch.no_grad():
            self.threads.add_up(self.rank, list(tensors))


def write_image_set(images, encoded=None) -> bytes:
    """The file of a whole image set, as shards are written."""
    return table_bytes(image_table(images, encoded), images.classes, images.metadata)


def write_labels(epochs, metadata) -> bytes:
    """The file of a whole label set, as workers write it."""
    sink = pa.BufferOutputStream()
    write_label_file(sink, epochs, metadata)
    return sink.getvalue().to_pybytes()
