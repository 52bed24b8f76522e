"""Every product of the model goes through `product`: operands in one dtype, sums in float32 or wider. The twin is
`torch_ref/products.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_impl.backend import machine


def accumulator(dtype) -> jnp.dtype:
    """float32, or float64 for float64: where sums, norms, softmax and loss are computed."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """A parameter and its copy in the compute dtype, rounded once for many products; a gradient is the parameter's."""

    parameter: jax.Array
    copy: jax.Array
    sums: str = dataclasses.field(default="", metadata={"static": True})
    """The logical axis over which products with it are sums, if a mesh may divide that (`exchange.whole_product`)."""

    @property
    def dtype(self) -> jnp.dtype:
        return self.parameter.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parameter.shape

    def astype(self, dtype) -> jax.Array:
        return self.copy if dtype == self.copy.dtype else self.parameter.astype(dtype)

    def __getitem__(self, index):
        """As a Flax variable asks for its value, itself; rows are the parameter's."""
        return self if index is ... else self.parameter[index]


def gradient_like(y: jax.Array | Rounded, grad: jax.Array) -> jax.Array | Rounded:
    """The gradient in the form that JAX wants for y: nothing flows into a rounded copy."""
    return dataclasses.replace(y, parameter=grad, copy=jnp.zeros_like(y.copy)) if isinstance(y, Rounded) else grad


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(spec: str, x: jax.Array, y: jax.Array | Rounded, dtype) -> jax.Array:
    """Two-operand einsum on x's dtype, accumulated in float32 or wider and returned in `dtype`.

    y is cast to x's dtype. Every index must stand in two of the three terms. The gradients are the two products one
    would write by hand, on operands of x's dtype; y's is returned unrounded in y's own dtype, which is what the
    parameters want, and plain autodiff would multiply float32 by bfloat16, which no fast kernel does.
    """
    y = y.astype(x.dtype)
    if not machine().lays_out_products:
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.promote_types(dtype, x.dtype)).astype(dtype)
    if x.dtype.itemsize > 2:
        return jnp.einsum(spec, x, y, preferred_element_type=accumulator(x.dtype)).astype(dtype)
    z = jnp.einsum(*_lay_out(spec, x, y), preferred_element_type=accumulator(x.dtype))
    # Else jax 0.10 folds a transpose of the result into the product and then has no kernel for it: it fails to run.
    return jax.lax.optimization_barrier(z).astype(dtype)


def in_memory(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """x with its axes in this order, written out; else XLA would hand the order on to the product that reads x.

    On a CPU the order decides which kernel multiplies (`product`); on a GPU every order is a fast one.
    """
    x = jnp.transpose(x, axes)
    # Flat behind the barrier: the compiler must not see that it is a transpose.
    return jax.lax.optimization_barrier(x.reshape(-1)).reshape(x.shape) if machine().lays_out_products else x


def _lay_out(spec: str, x: jax.Array, y: jax.Array) -> tuple[str, jax.Array, jax.Array]:
    """The same product with that operand first whose own index leads the result, its summed index last in memory."""
    operands, z_axes = spec.split("->")
    x_axes, y_axes = operands.split(",")
    batch = [axis for axis in z_axes if axis in x_axes and axis in y_axes]
    if next(axis for axis in z_axes if axis not in batch) in y_axes:
        x, y, x_axes, y_axes = y, x, y_axes, x_axes
    own = [axis for axis in z_axes if axis not in y_axes]
    axes = "".join([*batch, *own, *(axis for axis in x_axes if axis not in z_axes)])
    if axes != x_axes:
        x = in_memory(x, tuple(x_axes.index(axis) for axis in axes))
    return f"{axes},{y_axes}->{z_axes}", x, y


def _product_forward(spec, x, y, dtype):
    return product(spec, x, y, dtype), (x, y)


def _product_backward(spec, dtype, residuals, cotangent):
    x, y = residuals
    operands, z_axes = spec.split("->")
    x_axes, y_axes = operands.split(",")
    cotangent = cotangent.astype(x.dtype)
    grad_x = product(f"{z_axes},{y_axes}->{x_axes}", cotangent, y, x.dtype)
    grad_y = product(f"{x_axes},{z_axes}->{y_axes}", x, cotangent, y.dtype)
    return grad_x, gradient_like(y, grad_y)


product.defvjp(_product_forward, _product_backward)


def product_held(weight_OI: jax.Array, x_MI: jax.Array, dtype) -> jax.Array:
    """x weight^T (M, O) for weights as generation holds them: torch's layout, and x is cast to their dtype instead.

    XLA's CPU backend multiplies few rows two to four times as fast with the weights first; the barrier keeps it from
    turning the product round to save the transpose of the result.
    """
    return jax.lax.optimization_barrier(product("oi,mi->om", weight_OI, x_MI, dtype)).T
