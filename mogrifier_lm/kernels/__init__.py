"""Kernels: pure functions that know no modules; a reference and its fast siblings."""
