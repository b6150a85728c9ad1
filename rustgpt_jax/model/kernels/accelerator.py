"""What calls of a library's kernels have in common: they take a mask, and JAX can neither batch nor cut them."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from rustgpt_jax.errors import UserError
from rustgpt_jax.model.activation_sharding import partition_spec
from rustgpt_jax.model.kernels.types import Task, whole_mask

# A function of q_BTHC, k_BSKC, v_BSKC, mask_BTS that gives mixed_BTHC.
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def by_library(name: str, attend: Attend, task: Task) -> jax.Array:
    """mixed_BTKGC of a task, where there is a mesh on each device for its own rows and heads.

    Raises UserError once the program is batched by `jax.vmap`.
    """

    def grouped(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        mixed_BTHC = attend(q_BTHC, k_BSKC, v_BSKC, mask_BTS)
        return mixed_BTHC.reshape(*mixed_BTHC.shape[:2], k_BSKC.shape[2], -1, mixed_BTHC.shape[-1])

    arrays = (task.q_BTHC, task.k_BSKC, task.v_BSKC)
    mask_BTS = _unbatched(name, whole_mask(task), *arrays)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return grouped(*arrays, mask_BTS)
    rows, _, heads, _ = partition_spec("B.K.", task.k_BSKC.shape, dict(mesh.shape))
    cut = PartitionSpec(rows, None, heads)
    in_specs = (cut, cut, cut, PartitionSpec(rows))
    return jax.shard_map(grouped, in_specs=in_specs, out_specs=cut, check_vma=False)(*arrays, mask_BTS)


def _unbatched(name: str, mask_BTS: jax.Array, *arrays: jax.Array) -> jax.Array:
    """The mask as it is. Raises UserError once the program is batched over it or any of the arrays.

    JAX's rule for batching a call of cuDNN takes a mask for one with a mask for each head, and splash attention takes
    one mask at a time.
    """

    @jax.custom_batching.custom_vmap
    def guarded(mask_BTS: jax.Array, *arrays: jax.Array) -> jax.Array:
        return mask_BTS

    @guarded.def_vmap
    def refuse(*_: object) -> tuple[jax.Array, bool]:
        raise UserError(
            f"config.model.attention_kernel: {name} cannot compute several runs at once (fused); portable can."
        )

    return guarded(mask_BTS, *(jax.lax.stop_gradient(array) for array in arrays))
