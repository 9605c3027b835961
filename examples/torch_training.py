"""A PyTorch model with deformable layers: trained, compiled, and taken from torchvision by changing one import."""

import torch

from dcn_kernels.torch import DeformConv2dPack, ModulatedDeformConv2dPack

torch.manual_seed(0)
model = torch.nn.Sequential(
    DeformConv2dPack(1, 8, 3, padding=1),  # the convolution of its offsets is inside, and starts at zero
    torch.nn.ReLU(),
    ModulatedDeformConv2dPack(8, 8, 3, padding=1, offset_groups=2, beta=0.5),
    torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(1),
    torch.nn.Flatten(),
    torch.nn.Linear(8, 2),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)

# horizontal against vertical bars of random place
labels = torch.randint(2, (128,))
images = torch.zeros(128, 1, 12, 12)
for image, label, place in zip(images, labels, torch.randint(2, 9, (128,)), strict=True):
    (image[0] if label else image[0].T)[place : place + 2] = 1

losses = []
for _ in range(60):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
accuracy = (model(images).argmax(1) == labels).double().mean().item()
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {accuracy:.2f}")
print(f"offsets now up to {model[0].offsets(images).abs().max().item():.2f} pixels")
assert losses[-1] < losses[0] / 2
