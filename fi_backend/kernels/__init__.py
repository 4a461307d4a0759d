"""One file per kernel: its KernelSpec, its memoised loader and one keyword-only function."""
