"""Tiny networks, and the objective of spec 5.2 written down a second time in plain torch."""

import hashlib

import torch
from torch import nn
from torch.nn import functional as F


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
