"""A JAX training step under jit: the offsets of a deformable convolution learn a shift."""

import jax
import jax.numpy as jnp

from dcn_kernels.jax import deform_conv2d

image = jax.random.normal(jax.random.key(0), (1, 4, 16, 16))
kernel = jnp.ones((1, 1, 5, 5)) / 25  # smooth, so that the loss has one valley
image = jax.lax.conv_general_dilated(image.reshape(4, 1, 16, 16), kernel, (1, 1), "SAME").reshape(1, 4, 16, 16)
target = jnp.roll(image, -1, axis=3)  # every pixel is found one to the right
weight = jnp.eye(4).reshape(4, 4, 1, 1)


def loss(shift: jax.Array) -> jax.Array:
    offset = jnp.broadcast_to(shift.reshape(1, 2, 1, 1), (1, 2, 16, 16))
    return ((deform_conv2d(image, offset, weight) - target)[..., 2:-2, 2:-2] ** 2).mean()


@jax.jit
def step(shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    value, gradient = jax.value_and_grad(loss)(shift)
    return shift - 5 * gradient, value


shift = jnp.array([0.05, 0.05])  # dy, dx in pixels
first = loss(shift)
for _ in range(200):
    shift, value = step(shift)
print(f"loss {first:.4f} -> {value:.6f}; shift (dy, dx) = ({shift[0]:.2f}, {shift[1]:.2f}), sought (0, 1)")
assert value < first / 10
