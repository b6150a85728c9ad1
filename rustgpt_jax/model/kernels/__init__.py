"""Attention kernels: specs and inputs, portable and library kernels, and their verification on a device."""
