"""Writes torchvision_layer.npz: state_dict, inputs and output of torchvision's DeformConv2d. Run where it is installed:

python tests/record_torchvision.py tests/recorded/torchvision_layer.npz
"""

import sys

import numpy as np
import torch
import torchvision

torch.manual_seed(0)
layer = torchvision.ops.DeformConv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(1, 2), groups=2)
input, offset = torch.rand(2, 4, 7, 8), torch.randn(2, 24, 7, 3)
mask = torch.rand(2, 12, 7, 3)
arrays = {f"state.{name}": value.numpy() for name, value in layer.state_dict().items()}
with torch.no_grad():
    output = layer(input, offset, mask)
np.savez(
    sys.argv[1],
    versions=f"torch {torch.__version__}, torchvision {torchvision.__version__}",
    input=input.numpy(),
    offset=offset.numpy(),
    mask=mask.numpy(),
    output=output.numpy(),
    **arrays,
)
