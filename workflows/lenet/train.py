"""LeNet in plain PyTorch: the network, its training, and its weights as a file that the pipeline reads."""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool2d

from workflows.lenet.data import Array, Labelled

Activation = Literal["tanh", "sigmoid"]
ACTIVATIONS: tuple[Activation, ...] = ("tanh", "sigmoid")

BATCH = 100
RATES: dict[Activation, float] = {"tanh": 1e-3, "sigmoid": 2e-3}  # of Adam at the first step; it falls to 0 along half a cosine
N_EPOCHS: dict[Activation, int] = {"tanh": 8, "sigmoid": 16}  # a sigmoid, whose values are never below 0, learns more slowly
INFERENCE_BATCH = 1000


class LeNet(nn.Module):
    """The network of the Theano tutorial: two layers of convolution and pooling, a hidden layer, a softmax.

    Each layer does what a layer of the pipeline does: a valid convolution, a max-pool, the bias, the activation.

    Parameters
    ----------
    activation : str
        "tanh" or "sigmoid".
    n_classes : int
    seed : int
        Of the weights it starts with.
    """

    def __init__(self, activation: Activation, n_classes: int, seed: int) -> None:
        super().__init__()
        self.activation = torch.tanh if activation == "tanh" else torch.sigmoid
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.conv3 = nn.Conv2d(50, 500, 4)  # the hidden layer: all 50 x 4 x 4 values, which is a convolution with one position
        self.top = nn.Linear(500, n_classes)
        generator = torch.Generator().manual_seed(seed)
        # Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS 2010: values keep their
        # spread from layer to layer. A sigmoid is four times as flat as a tanh around 0.
        gain = 1.0 if activation == "tanh" else 4.0
        for layer, pooled in ((self.conv1, 4), (self.conv2, 4), (self.conv3, 1)):
            n_in = layer.weight[0].numel()
            n_out = len(layer.weight) * math.prod(layer.kernel_size) / pooled
            limit = gain * math.sqrt(6 / (n_in + n_out))
            nn.init.uniform_(layer.weight, -limit, limit, generator=generator)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.top.weight)
        nn.init.zeros_(self.top.bias)

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """Every layer's maps of (n, 1, 28, 28) pixels / 256: what the pipeline stores."""
        conv1 = self.activation(max_pool2d(self.conv1(x), 2))  # (n, 20, 12, 12)
        conv2 = self.activation(max_pool2d(self.conv2(conv1), 2))  # (n, 50, 4, 4)
        conv3 = self.activation(self.conv3(conv2))  # (n, 500, 1, 1)
        return {"conv1": conv1, "conv2": conv2, "conv3": conv3}

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, class) of (n, 1, 28, 28) pixels / 256."""
        logits: Tensor = self.top(self.maps(x)["conv3"].flatten(1))
        return logits


@dataclass(frozen=True, slots=True)
class Training:
    """How a network came about."""

    activation: Activation
    seed: int
    n_epochs: int
    n_train: int
    best_epoch: int
    """The epoch, from 1, whose weights were kept: those that do best on the images that validate."""
    losses: tuple[float, ...]
    """Per epoch the mean cross entropy of its batches."""
    validation: tuple[float, ...]
    """Per epoch the accuracy on the images that validate."""
    elapsed_s: float
    batch: int = BATCH
    """Images per step."""


def train(
    images: Labelled,
    activation: Activation,
    seed: int,
    n_epochs: int,
    say: Callable[[str], None] = lambda _: None,
    *,
    batch: int = BATCH,
) -> tuple[LeNet, Training]:
    """Train from scratch by Adam, and keep the epoch that does best on the images that validate.

    The same seed gives the same weights on the same kind of processor, whatever else it does: all is computed by one thread.
    """
    start = time.monotonic()
    torch.set_num_threads(1)
    network = LeNet(activation, len(images.classes), seed).to(memory_format=torch.channels_last)  # twice as fast on processors
    inputs, labels = torch.from_numpy(images.inputs[images.train]), torch.from_numpy(images.labels[images.train])
    optimiser = torch.optim.Adam(network.parameters(), lr=RATES[activation])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_epochs * math.ceil(len(labels) / batch))
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    validation: list[float] = []
    kept = copy.deepcopy(network.state_dict())
    for epoch in range(1, n_epochs + 1):
        total = 0.0
        for rows in torch.randperm(len(labels), generator=generator).split(batch):
            loss = cross_entropy(network(inputs[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
        losses.append(total / len(labels))
        validation.append(accuracy(network, images, images.validation))
        say(
            f"{activation}, epoch {epoch} of {n_epochs}: loss {losses[-1]:.3f}, {validation[-1]:.2%} of the validation images right"
        )
        if validation[-1] > max(validation[:-1], default=-1.0):
            kept = copy.deepcopy(network.state_dict())
    network.load_state_dict(kept)
    best_epoch = 1 + validation.index(max(validation))
    elapsed_s = time.monotonic() - start
    return network, Training(
        activation, seed, n_epochs, len(labels), best_epoch, tuple(losses), tuple(validation), elapsed_s, batch
    )


@torch.inference_mode()
def predict(network: LeNet, inputs: Array) -> Array:
    """Most likely class (n,) of (n, 1, 28, 28) float32 pixels / 256."""
    return np.concatenate([network(batch).argmax(1).numpy() for batch in torch.from_numpy(inputs).split(INFERENCE_BATCH)])


def accuracy(network: LeNet, images: Labelled, rows: Array) -> float:
    """Share of the images of some rows that the network puts into their class."""
    return float(np.mean(predict(network, images.inputs[rows]) == images.labels[rows]))


def trained(
    images: Labelled,
    work: Path,
    seed: int,
    n_epochs: int,
    activation: Activation,
    say: Callable[[str], None] = lambda _: None,
    *,
    batch: int = BATCH,
) -> tuple[LeNet, Training]:
    """`train`, unless the same was done before: then what is in the work folder.

    Leaves ``<activation>.safetensors`` there, which is what the pipeline takes: conv1.weight (filters, channel, y, x), conv1.bias
    (filters,), ... PyTorch and the pipeline both cross-correlate, so the kernels stay as they are. The softmax on top is no layer of maps
    and has a file of its own, ``<activation>-top.safetensors``.
    """
    file, top_file, record = (work / f"{activation}{end}" for end in (".safetensors", "-top.safetensors", ".json"))
    if record.is_file():
        values = json.loads(record.read_text())
        training = Training(**values | {key: tuple(values[key]) for key in ("losses", "validation")})
        if (training.seed, training.n_epochs, training.n_train, training.batch) == (seed, n_epochs, len(images.train), batch):
            network = LeNet(activation, len(images.classes), seed)
            network.load_state_dict(load_file(file) | load_file(top_file))
            return network, training
    network, training = train(images, activation, seed, n_epochs, say, batch=batch)
    for old in (*work.glob(f"{activation}*.zarr"), *work.glob(f"probe-{activation}*.json")):  # of other weights
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    state = {name: values.contiguous() for name, values in network.state_dict().items()}
    record.unlink(missing_ok=True)  # it is written last, so that it vouches for both files
    save_file({name: values for name, values in state.items() if not name.startswith("top.")}, file)
    save_file({name: values for name, values in state.items() if name.startswith("top.")}, top_file)
    record.write_text(json.dumps(asdict(training), indent=1))
    return network, training
