"""Chips that models are trained on, as their makers' data sheets have them."""

from dataclasses import dataclass

GB, GIB = 1e9, 2.0**30
# FLOP/s.
T = 1e12


@dataclass(frozen=True)
class Chip:
    """A chip at its peak: FLOP/s without sparsity, bytes, and bytes a second in each direction.

    kind: what JAX's `device_kind` has in it. 'TPU v5' is a v5p, and the beginning of 'TPU v5 lite', a v5e.
    float8: peak of float8 products; None where they are no faster than those of bfloat16.
    links: to the `linked` chips (itself among them) that have fast links to each other, over all its links together.
    network: to all others, its share of the adapters of its machine.
    """

    kind: str
    bfloat16: float
    float8: float | None
    memory: float
    bandwidth: float
    links: float
    linked: int
    network: float

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s of matrix products of a type. What is wider than bfloat16 is counted as bfloat16 is."""
        return self.float8 or self.bfloat16 if dtype.startswith("float8") else self.bfloat16


# Makers give a link's both directions together; here is one of them. GPUs are those of an HGX board of eight with an
# adapter each; links of TPUs reach all of a pod.
CHIPS = {
    # NVIDIA A100 data sheet (SXM, 80 GB): NVLink 600 GB/s. DGX A100: adapters of 200 Gbit/s.
    "a100": Chip("A100", 312 * T, None, 80 * GB, 2.039e12, 300 * GB, 8, 25 * GB),
    # NVIDIA H100 data sheet (SXM): NVLink 900 GB/s. DGX H100: adapters of 400 Gbit/s.
    "h100": Chip("H100", 989 * T, 1979 * T, 80 * GB, 3.35e12, 450 * GB, 8, 50 * GB),
    # NVIDIA H200 data sheet (SXM).
    "h200": Chip("H200", 989 * T, 1979 * T, 141 * GB, 4.8e12, 450 * GB, 8, 50 * GB),
    # NVIDIA DGX B200 data sheet, an eighth of it: 1,440 GB, 64 TB/s, 72 PFLOP/s of float8, NVLink 14.4 TB/s.
    "b200": Chip("B200", 2250 * T, 4500 * T, 180 * GB, 8e12, 900 * GB, 8, 50 * GB),
    # docs.cloud.google.com/tpu/docs/v4; six links of 50 GB/s (arXiv 2304.01433).
    "v4": Chip("TPU v4", 275 * T, None, 32 * GIB, 1.2e12, 300 * GB, 4096, 6.25 * GB),
    # docs.cloud.google.com/tpu/docs/v5e: 400 GB/s both ways; 6.4 Tbit/s for the pod of 256.
    "v5e": Chip("TPU v5 lite", 197 * T, None, 16 * GIB, 8.19e11, 200 * GB, 256, 3.125 * GB),
    # docs.cloud.google.com/tpu/docs/v5p: 1200 GB/s both ways; 50 Gbit/s a chip.
    "v5p": Chip("TPU v5", 459 * T, None, 95 * GIB, 2.765e12, 600 * GB, 8960, 6.25 * GB),
    # docs.cloud.google.com/tpu/docs/v6e: 800 GB/s both ways; four adapters of 200 Gbit/s for eight chips.
    "v6e": Chip("TPU v6 lite", 918 * T, None, 32 * GIB, 1.638e12, 400 * GB, 256, 12.5 * GB),
}
