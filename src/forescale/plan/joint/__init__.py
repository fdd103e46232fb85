"""Joint choice of stages, data-parallel and tensor-parallel degrees, and recomputation."""
