"""Arrays of JAX in the Python client, bfloat16 and views of other arrays included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pid_client import PidClient
from pid_client.tensors import to_tensor

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_arrays_keep_their_dtype_shape_and_values(dtype: type):
    base = jax.random.normal(jax.random.key(0), (4, 3, 6), dtype)
    for array in (base, base.T, base[::2, :, 1:4], base[:, 3:], base[1, 2, 3], jnp.broadcast_to(base[:1], (5, 3, 6))):
        tensor = to_tensor(array)
        assert (tensor.dtype, tensor.shape) == (array.dtype.name, array.shape)
        np.testing.assert_array_equal(tensor.to_float32(), np.asarray(array, np.float32), strict=True)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.float8_e4m3fn])
def test_other_dtypes_are_rejected(dtype: type):
    with pytest.raises(TypeError, match=f"the dtype {jnp.dtype(dtype).name}; convert it to float16, bfloat16"):
        to_tensor(jnp.zeros(3, dtype))


def test_arrays_without_values_are_rejected():
    with pytest.raises(TypeError, match="Tracer' as a tensor; pass a numpy array, a tensor of torch or JAX"):
        jax.jit(lambda array: to_tensor(array).data)(jnp.zeros(3))


def test_an_array_is_decoded_like_the_same_values_of_numpy(flux: str):
    array = jax.random.normal(jax.random.key(0), (16, 8, 8), jnp.bfloat16)
    with PidClient(flux) as client:
        image = client.decode(array, seed=7, format="raw")
        expected = client.decode(np.asarray(array, np.float32), seed=7, format="raw")
    assert image.data == expected.data
    assert len(np.unique(image.numpy()[..., 0])) > 100  # shows the latent
