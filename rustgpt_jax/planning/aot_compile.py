"""The training step of a config, compiled ahead of time for devices that need not be there, from shapes alone.

It is compiled by the compiler of CPUs, for as many virtual ones as there would be devices. Where that compiler would do
what one for accelerators does not, it is kept from it:

- It computes products of bfloat16 in float32, so that its copies of weights and activations have twice the size. So
  float16 stands in for bfloat16: of the same size, and left as it is with the pass that widens it switched off.
- It adds up gradients whole where an accelerator scatters their sums. So sums are not combined into one, and one of
  which only a slice is used is read as a reduce-scatter (see `collectives`).
- Kernels of attention that never hold all scores are those of accelerators; blockwise attention, which holds a block of
  them, stands in for these.
- Gradients from arrays that are kept for it (see `model.derivatives`) are faster with this compiler alone.
"""

from dataclasses import dataclass

import jax

from rustgpt_jax.config.schema import Config, is_on, read, split, with_values
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.planning import hlo
from rustgpt_jax.planning.collectives import Collective, collectives
from rustgpt_jax.planning.compiler_log import heard
from rustgpt_jax.planning.hlo_cost import product_flops, product_traffic
from rustgpt_jax.sharding.sharding_plan import Placement
from rustgpt_jax.training.memory_estimate import batch_shapes, state_shapes
from rustgpt_jax.training.train_step import State, as_arguments, train_step

DTYPES = ("model.dtype", "model.mixer_dtype", "model.feedforward_dtype", "model.logits_dtype", "model.matmul")
OPTIONS: dict[str, str | bool] = {"xla_disable_hlo_passes": "change-op-data-type,cpu-all-reduce-combiner"}


@dataclass(frozen=True, eq=False)
class Compiled:
    """What is known of a step from its compiled program, for one device: bytes, FLOPs, collectives, warnings.

    arguments, results, shared: bytes of what goes in, what comes out, and what of these is the same memory.
    working: bytes of everything else that the step holds at its fullest.
    flops: of all matrix products, what is computed again among them. traffic: bytes that these, and the reading and
    writing of the state, move at least. counted_once: FLOPs as XLA counts them, the body of each loop once.
    """

    arguments: int
    results: int
    shared: int
    working: int
    flops: float
    traffic: float
    counted_once: float
    collectives: tuple[Collective, ...]
    warnings: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Bytes in use when the step holds most."""
        return self.arguments + self.results - self.shared + self.working


def compiled_step(config: Config, window: int, placement: Placement, for_cpu: bool = False) -> Compiled:
    """One training step on windows of so many tokens, its state and batch laid out as a run would lay them out.

    for_cpu: as this compiler makes it for a CPU, and nothing stands in for anything.
    """
    structure, numbers = split(config if for_cpu else _stand_in(config))
    state = placed_state(config, placement)
    batch = _placed(batch_shapes(config.training.batch_size, window), placement)
    with placement.active(), heard() as warnings:
        jitted = jax.jit(train_step, static_argnums=0, donate_argnums=1)
        lowered = jitted.lower(structure, state, batch, as_arguments(numbers))
        compiled = lowered.compile(compiler_options={} if for_cpu else OPTIONS)
    memory, text, cost = compiled.memory_analysis(), compiled.as_text(), compiled.cost_analysis()
    assert memory is not None and text is not None and cost is not None, "the compiler of CPUs tells all of these"
    program = hlo.read(text)
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        shared=memory.alias_size_in_bytes,
        working=memory.temp_size_in_bytes,
        flops=product_flops(program),
        traffic=product_traffic(program) + memory.argument_size_in_bytes + memory.output_size_in_bytes,
        counted_once=cost["flops"],
        collectives=tuple(collectives(text, placement.n_devices)),
        warnings=tuple(warnings),
    )


def placed_state(config: Config, placement: Placement) -> State:
    """The state of a run as shapes and types, with the places where its arrays lie."""
    return placement.like(state_shapes(config))


def _stand_in(config: Config) -> Config:
    """The config with float16 for bfloat16, gradients as JAX derives them, and an attention kernel of every device."""
    values = {path: "float16" for path in DTYPES if read(config, path) == "bfloat16"}
    values["model.derivatives"] = "plain"
    if config.model.attention_kernel != "plain":
        values["model.attention_kernel"] = "portable" if is_on(config.model.dropout) else "blockwise"
    return with_values(config, values)


def _placed(batch: Batch, placement: Placement) -> Batch:
    if placement.mesh is None:
        return batch
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement.batch_sharding(leaf.shape)), batch
    )
