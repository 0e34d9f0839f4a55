"""The benchmarks' models are those of the literature."""

import pytest
import torch

from benchmarks.common import models


def test_autoencoder_is_784_400_200_100_50_25_6_and_back():
    model = models.autoencoder()
    linears = [m for m in model if isinstance(m, torch.nn.Linear)]
    widths = [linears[0].in_features, *(m.out_features for m in linears)]
    assert widths == [784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784]
    assert isinstance(model[-1], torch.nn.Linear)
    code = next(i for i, m in enumerate(model) if isinstance(m, torch.nn.Linear) and m.out_features == 6)
    assert isinstance(model[code + 1], torch.nn.Linear)  # no ReLU after the code
    assert all(m.bias.abs().max() == 0 for m in linears)
    assert abs(linears[0].weight.std().item() - (2 / 784) ** 0.5) < 1e-3


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_resnet_takes_small_images_and_cifar(shape):
    model = models.ResNet18(shape[0], width=4)
    assert model(torch.rand(2, *shape)).shape == (2, 10)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == 17  # and the head: 18 layers
