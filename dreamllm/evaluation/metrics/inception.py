"""The Inception network of FID: features of 2048 from its last pooling.

It is Inception V3 (Szegedy et al. 2016) as trained by Google in 2015 with 1008 outputs, whose pooling branches differ
from later versions: average pooling leaves the padding out, and the last block pools by maximum. Module names are
those of the weight file in general use (`pt_inception-2015-12-05`), so that it loads as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

FEATURES, CLASSES, SIDE = 2048, 1008, 299
Resize = Literal["bilinear", "clean"]
"""How pictures become 299 pixels wide. "bilinear": on the tensor, without anti-aliasing, as in the original program's
FID; "clean": bicubic with anti-aliasing by Pillow, in float (Parmar et al. 2022). Scores of different modes do not
compare."""


class _Convolution(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(nn.Module):
    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(inputs, 64, 1)
        self.branch5x5_1 = _Convolution(inputs, 48, 1)
        self.branch5x5_2 = _Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, padding=1)
        self.branch_pool = _Convolution(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], 1)


class _BlockB(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Convolution(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class _BlockC(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        wide, tall = (1, 7), (7, 1)
        across, down = (0, 3), (3, 0)
        self.branch1x1 = _Convolution(inputs, 192, 1)
        self.branch7x7_1 = _Convolution(inputs, width, 1)
        self.branch7x7_2 = _Convolution(width, width, wide, padding=across)
        self.branch7x7_3 = _Convolution(width, 192, tall, padding=down)
        self.branch7x7dbl_1 = _Convolution(inputs, width, 1)
        self.branch7x7dbl_2 = _Convolution(width, width, tall, padding=down)
        self.branch7x7dbl_3 = _Convolution(width, width, wide, padding=across)
        self.branch7x7dbl_4 = _Convolution(width, width, tall, padding=down)
        self.branch7x7dbl_5 = _Convolution(width, 192, wide, padding=across)
        self.branch_pool = _Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class _BlockD(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Convolution(inputs, 192, 1)
        self.branch3x3_2 = _Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Convolution(inputs, 192, 1)
        self.branch7x7x3_2 = _Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Convolution(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class _BlockE(nn.Module):
    def __init__(self, inputs: int, largest: bool) -> None:
        super().__init__()
        self._largest = largest
        self.branch1x1 = _Convolution(inputs, 320, 1)
        self.branch3x3_1 = _Convolution(inputs, 384, 1)
        self.branch3x3_2a = _Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Convolution(inputs, 448, 1)
        self.branch3x3dbl_2 = _Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self._largest else _average(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class FidInception(nn.Module):
    """Pictures -> features. Random unless loaded by `load_inception`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        self.Mixed_5b = _BlockA(192, 32)
        self.Mixed_5c = _BlockA(256, 64)
        self.Mixed_5d = _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(768, 128)
        self.Mixed_6c = _BlockC(768, 160)
        self.Mixed_6d = _BlockC(768, 160)
        self.Mixed_6e = _BlockC(768, 192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b = _BlockE(1280, largest=False)
        self.Mixed_7c = _BlockE(2048, largest=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [N, 3, 299, 299] in [-1, 1] -> features [N, 2048]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pictures)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Features [N, 2048] -> logits [N, 1008]."""
        return self.fc(features)


def load_inception(path: Path) -> FidInception:
    """Loads the network from a weight file, `.safetensors` or a PyTorch state dict (nothing else is unpickled).

    Raises `FileNotFoundError`, and `ValueError` naming the tensors that are missing, unknown or of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the Inception weights {path} do not exist")
    state = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    )
    network = FidInception()
    own = network.state_dict()
    # Counters of training batches are in some copies of the file and mean nothing here.
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked") and not k.startswith("AuxLogits.")}
    needed = {k: v for k, v in own.items() if not k.endswith("num_batches_tracked")}
    wrong = sorted(set(needed) ^ set(state)) + [k for k in needed if k in state and state[k].shape != needed[k].shape]
    if wrong:
        raise ValueError(
            f"{path} does not hold the weights of the FID Inception network: {len(wrong)} tensors are missing, unknown "
            f"or of another shape, the first: {wrong[0]}"
        )
    network.load_state_dict(state, strict=False)
    return network.eval().requires_grad_(False)


def inception_pixels(pictures: Sequence[Image.Image], resize: Resize) -> Tensor:
    """RGB pictures, of any sizes -> [N, 3, 299, 299] in [-1, 1]."""
    if resize not in ("bilinear", "clean"):
        raise ValueError(f"resize must be 'bilinear' or 'clean', not {resize!r}")
    return torch.stack([_clean(picture) if resize == "clean" else _bilinear(picture) for picture in pictures])


def _bilinear(picture: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0).permute(2, 0, 1)
    if pixels.shape[1:] != (SIDE, SIDE):
        pixels = F.interpolate(pixels[None], (SIDE, SIDE), mode="bilinear", align_corners=False)[0]
    return 2 * pixels - 1


def _clean(picture: Image.Image) -> Tensor:
    channels = np.asarray(picture.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)
    resized = [Image.fromarray(c).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for c in channels]
    return torch.from_numpy(np.stack([np.asarray(c) for c in resized]).clip(0, 255)) / 127.5 - 1
